"""What others run beside `optimise`, as installed: no option is set."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import shared_runtime as rt
from benchmarks.optimise_cases import Case, Sample
from shared_runtime.backends.base import backends
from shared_runtime.host import host

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
"""torch starts compile workers on all cores, which would take them from whatever is measured first."""


def peers(model: rt.Model, case: Case, inputs: Sample, device: str) -> Iterable[tuple[str, Callable[[], Any]]]:
    """What others run, as installed."""
    if device == "cpu":
        import onnxruntime as ort

        options = ort.SessionOptions()
        if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < (os.cpu_count() or 1):
            options.intra_op_num_threads = len(os.sched_getaffinity(0))  # it would leave the cores that this process may use
        session = ort.InferenceSession(str(model.graph), options, providers=["CPUExecutionProvider"])
        yield "onnxruntime", lambda: session.run(None, inputs)
        try:
            import openvino

            compiled = openvino.Core().compile_model(str(model.graph), "CPU")
            request = compiled.create_infer_request()
            chosen = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
            yield "openvino" if chosen == "f32" else f"openvino ({chosen} by default)", lambda: request.infer(inputs)
        except (ImportError, RuntimeError):
            pass
    elif backends()["onnxruntime"].availability("cuda").available:
        import onnxruntime as ort

        ort.preload_dlls()
        on_gpu = ort.InferenceSession(str(model.graph), providers=["CUDAExecutionProvider"])
        if on_gpu.get_providers()[0] == "CUDAExecutionProvider":  # it falls back to the CPU where CUDA's libraries are missing
            yield "onnxruntime", lambda: on_gpu.run(None, inputs)
    if model.name == "fraud-boosting":
        import xgboost

        booster = xgboost.XGBClassifier()
        booster.load_model(model.graph.parent / "booster.ubj")
        yield "xgboost scikit-learn predict", lambda: booster.predict_proba(inputs["features"])
    if case.module is not None or device == "cuda":
        yield from _torch_peers(model, case.module, inputs, device)


def _torch_peers(model: rt.Model, module: Any, inputs: Sample, device: str) -> Iterable[tuple[str, Callable[[], Any]]]:
    import copy

    import torch

    torch.set_num_threads(host().cores)
    if module is None:  # a model of the suite: its graph as torch calls
        from shared_runtime.backends.torch_graph import GraphProgram

        resident: Any = GraphProgram(model.graph, device).straight({n: torch.from_numpy(v).to(device) for n, v in inputs.items()})
    else:
        resident = copy.deepcopy(module).to(device).eval()
    compiled = torch.compile(copy.deepcopy(resident))

    def run(net: Any) -> Any:
        with torch.inference_mode():
            outputs = net(*(torch.from_numpy(value).to(device) for value in inputs.values()))
            return [value.cpu().numpy() for value in (outputs if isinstance(outputs, tuple) else (outputs,))]

    yield "torch eager", lambda: run(resident)
    yield "torch.compile", lambda: run(compiled)
