"""ONNX Runtime on the CPU, and on an NVIDIA GPU through its CUDA provider."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort

from shared_runtime.backends.base import Availability
from shared_runtime.errors import BackendUnavailableError, UnsupportedModelError
from shared_runtime.host import host
from shared_runtime.model import Model
from shared_runtime.signature import Tensors

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeExecutable:
    """One inference session; ONNX Runtime lets several threads run it at once."""

    precision = "float32"

    def __init__(self, session: ort.InferenceSession, device: str) -> None:
        self._session, self.device = session, device
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, inputs: Tensors) -> Tensors:
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))

    def close(self) -> None:
        del self._session


class OnnxRuntimeBackend:
    """The backend `onnxruntime`."""

    name = "onnxruntime"
    requires = "onnxruntime (CPU); onnxruntime-gpu, an NVIDIA driver, CUDA and cuDNN libraries (GPU)"
    devices = ("cpu", "cuda")
    planned = ("cpu", "cuda")

    def availability(self, device: str) -> Availability:
        if device == "cpu":
            return Availability(version=ort.__version__)
        if not host().gpus:
            return Availability(lacks="an NVIDIA GPU with its driver (nvidia-smi finds none)")
        if PROVIDERS["cuda"] not in ort.get_available_providers():
            return Availability(lacks="the CUDA provider (install onnxruntime-gpu)")
        return Availability(version=ort.__version__)

    def compile(self, model: Model, device: str, threads: int) -> OnnxRuntimeExecutable:
        provider = PROVIDERS[device]
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        settings: dict[str, Any] = {"use_tf32": "0"} if device == "cuda" else {}
        try:
            session = ort.InferenceSession(str(model.graph), options, providers=[(provider, settings)])
        except Exception as error:
            raise UnsupportedModelError(f"ONNX Runtime can't load {model.name!r}: {error}") from error
        if session.get_providers()[0] != provider:
            raise BackendUnavailableError(
                f"ONNX Runtime was asked for {provider} and would run on {session.get_providers()[0]}: "
                "its CUDA or cuDNN libraries are missing; install them or ask for device='cpu'"
            )
        return OnnxRuntimeExecutable(session, device)
