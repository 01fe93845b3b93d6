"""The accelerated runtime of Triscope: load a model, plan it on this host, run it, batch it.

    import shared_runtime as rt

    model = rt.load("resnet50.onnx")
    with rt.Session(model) as session:
        outputs = session.run({"image": x})
    async with rt.Batcher(session, max_batch=64, deadline_ms=15) as batcher:
        outputs = await batcher.submit({"image": x})

It knows tensors, models and devices; it knows no DICOM, no money, no defect.
"""

from shared_runtime.errors import (
    BackendUnavailableError,
    BatcherClosedError,
    BatcherError,
    InputError,
    ModelError,
    ModelIntegrityError,
    ModelNotFoundError,
    QueueFullError,
    SharedRuntimeError,
    UnsupportedModelError,
)
from shared_runtime.model import Model, load
from shared_runtime.planning.planner import Candidate, Plan
from shared_runtime.scheduling.batcher import Batcher, BatcherStatistics
from shared_runtime.session import Session
from shared_runtime.signature import Signature, TensorSpec

__all__ = [
    "BackendUnavailableError",
    "Batcher",
    "BatcherClosedError",
    "BatcherError",
    "BatcherStatistics",
    "Candidate",
    "InputError",
    "Model",
    "ModelError",
    "ModelIntegrityError",
    "ModelNotFoundError",
    "Plan",
    "QueueFullError",
    "Session",
    "SharedRuntimeError",
    "Signature",
    "TensorSpec",
    "UnsupportedModelError",
    "load",
]
