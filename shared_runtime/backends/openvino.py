"""OpenVINO on the CPU, held to float32: left alone it computes in bfloat16 on some CPUs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import threading
from typing import Any

import numpy as np

from shared_runtime.backends.base import Availability
from shared_runtime.errors import BackendUnavailableError, UnsupportedModelError
from shared_runtime.model import Model
from shared_runtime.signature import Tensors


class OpenVinoExecutable:
    """One compiled model with an infer request a thread."""

    device = "cpu"

    def __init__(self, compiled: Any, outputs: list[str]) -> None:
        self._compiled, self._outputs = compiled, outputs
        self._local = threading.local()
        self.precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()).replace("f32", "float32")

    def run(self, inputs: Tensors) -> Tensors:
        if not hasattr(self._local, "request"):
            self._local.request = self._compiled.create_infer_request()
        results = self._local.request.infer(inputs, share_inputs=True, share_outputs=False)
        return {name: np.array(results[index]) for index, name in enumerate(self._outputs)}

    def close(self) -> None:
        del self._compiled
        self._local = threading.local()


class OpenVinoBackend:
    """The backend `openvino`."""

    name = "openvino"
    requires = "openvino"
    devices = ("cpu",)
    planned = ("cpu",)

    def availability(self, device: str) -> Availability:
        if importlib.util.find_spec("openvino") is None:
            return Availability(lacks="the package openvino (pip install openvino)")
        return Availability(version=importlib.metadata.version("openvino"))

    def compile(self, model: Model, device: str, threads: int) -> OpenVinoExecutable:
        if lacks := self.availability(device).lacks:
            raise BackendUnavailableError(f"OpenVINO lacks {lacks}")
        import openvino

        core = openvino.Core()
        properties = {
            "INFERENCE_PRECISION_HINT": "f32",
            "EXECUTION_MODE_HINT": "ACCURACY",
            "INFERENCE_NUM_THREADS": str(threads),
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            compiled = core.compile_model(core.read_model(str(model.graph)), "CPU", properties)
        except RuntimeError as error:
            raise UnsupportedModelError(f"OpenVINO can't load {model.name!r}: {error}") from error
        executable = OpenVinoExecutable(compiled, [spec.name for spec in model.signature.outputs])
        if executable.precision != "float32":
            raise BackendUnavailableError(f"OpenVINO would compute {model.name!r} in {executable.precision}; float32 was asked for")
        return executable
