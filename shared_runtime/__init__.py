"""The accelerated runtime of Triscope: load a model, plan it on this host, run it, batch it.

    import shared_runtime as rt

    model = rt.load("resnet50.onnx")
    with rt.Session(model) as session:
        outputs = session.run({"image": x})
    async with rt.Batcher(session, max_batch=64, deadline_ms=15) as batcher:
        outputs = await batcher.submit({"image": x})

It knows tensors, models and devices; it knows no DICOM, no money, no defect.
"""

from shared_runtime.auto import auto_optimize
from shared_runtime.certificate import Certificate
from shared_runtime.errors import (
    BackendUnavailableError,
    BatcherClosedError,
    BatcherError,
    CalibrationError,
    ImportMismatchError,
    InputError,
    MemoryBudgetError,
    MetricError,
    ModelError,
    ModelIntegrityError,
    ModelNotFoundError,
    OptimizationError,
    QueueFullError,
    SharedRuntimeError,
    UnsupportedModelError,
    VariantRefusedError,
)
from shared_runtime.graph.fuse import fuse
from shared_runtime.importers import import_model
from shared_runtime.model import Model, load
from shared_runtime.optimize import Quantizer, optimize, verify
from shared_runtime.planning.objective import Objective
from shared_runtime.planning.plan import Candidate, Plan
from shared_runtime.quantization import metrics
from shared_runtime.rewrite import rewrite
from shared_runtime.scheduling.batcher import Batcher, BatcherStatistics
from shared_runtime.session import Session
from shared_runtime.signature import Signature, TensorSpec
from shared_runtime.telemetry.profiler import profile
from shared_runtime.telemetry.trace import trace
from shared_runtime.windows import SlidingWindow

__all__ = [
    "BackendUnavailableError",
    "Batcher",
    "BatcherClosedError",
    "BatcherError",
    "BatcherStatistics",
    "CalibrationError",
    "Candidate",
    "Certificate",
    "ImportMismatchError",
    "InputError",
    "MemoryBudgetError",
    "MetricError",
    "Model",
    "ModelError",
    "ModelIntegrityError",
    "ModelNotFoundError",
    "Objective",
    "OptimizationError",
    "Plan",
    "Quantizer",
    "QueueFullError",
    "Session",
    "SharedRuntimeError",
    "Signature",
    "SlidingWindow",
    "TensorSpec",
    "UnsupportedModelError",
    "VariantRefusedError",
    "auto_optimize",
    "fuse",
    "import_model",
    "load",
    "metrics",
    "optimize",
    "profile",
    "rewrite",
    "trace",
    "verify",
]
