"""torch on an NVIDIA GPU (or, asked for by name, the CPU): an ONNX graph run operator by operator."""

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


class TorchExecutable:
    """The graph's nodes in order, with weights resident on the device; float32 without TF32."""

    precision = "float32"

    def __init__(self, program: Any, device: str, threads: int) -> None:
        self._program, self.device, self._threads = program, device, threads
        self._lock = threading.Lock()

    def run(self, inputs: Tensors) -> Tensors:
        if any(len(value) == 0 for value in inputs.values()):
            # torch's normalisations refuse empty batches: run one row of zeros, keep none of it.
            one = {name: np.zeros((1, *value.shape[1:]), value.dtype) for name, value in inputs.items()}
            return {name: value[:0] for name, value in self.run(one).items()}
        import torch

        with self._lock, torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            previous = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = False
            if self.device == "cpu" and torch.get_num_threads() != self._threads:
                torch.set_num_threads(self._threads)
            try:
                given = {name: torch.tensor(value, device=self.device) for name, value in inputs.items()}
                return {name: value.cpu().numpy() for name, value in self._program(given).items()}
            finally:
                torch.backends.cuda.matmul.allow_tf32 = previous

    def close(self) -> None:
        del self._program


class TorchBackend:
    """The backend `torch`. On a CPU the two other engines are faster, so "auto" tries it on a GPU alone."""

    name = "torch"
    requires = "torch (the extra 'torch'); an NVIDIA GPU for device 'cuda'"
    devices = ("cuda", "cpu")
    planned = ("cuda",)

    def availability(self, device: str) -> Availability:
        if importlib.util.find_spec("torch") is None:
            return Availability(lacks="the package torch (pip install 'triscope[torch]')")
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            built = "a GPU that its driver shows" if torch.version.cuda else "a CUDA build of torch (this one is for CPUs)"
            return Availability(lacks=built)
        return Availability(version=importlib.metadata.version("torch"))

    def compile(self, model: Model, device: str, threads: int) -> TorchExecutable:
        if lacks := self.availability(device).lacks:
            raise BackendUnavailableError(f"torch on {device} lacks {lacks}")
        from shared_runtime.backends.torch_graph import GraphProgram, UnsupportedOperator

        try:
            program = GraphProgram(model.graph, device)
        except UnsupportedOperator as error:
            raise UnsupportedModelError(f"the torch backend can't run {model.name!r}: {error}") from error
        return TorchExecutable(program, device, threads)
