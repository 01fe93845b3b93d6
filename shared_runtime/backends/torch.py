"""torch on an NVIDIA GPU (or, asked for by name, the CPU): an ONNX graph operator by operator, compiled, or captured as a CUDA graph."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared_runtime.backends.base import Availability, precision_of, refuse_foreign, refuse_unknown_mode, zero_rows
from shared_runtime.backends.streams import TOLERANCE, difference_of_rows
from shared_runtime.errors import BackendUnavailableError, UnsupportedModelError
from shared_runtime.host import host
from shared_runtime.model import Model
from shared_runtime.signature import Tensors
from shared_runtime.variants import Variant

MOST_CAPTURES = 8
GPU_NODES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu")
"""Where a driver shows itself without nvidia-smi: natively, on WSL, on Jetson."""
COPY_ALONE = 1 << 18
"""Numbers up to which one core copies to and from the GPU's staging: waking others takes about as long."""
COPY_THREADS = 4
"""Cores that copy more: with 16, one copy in ten waited 3 ms for the last to wake; four copy nearly as fast."""


@dataclass
class _Capture:
    """A CUDA graph with the buffers that it reads and writes, and pinned ones on the host, through which copies run at full speed."""

    replay: Callable[[], None]
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    staged_inputs: dict[str, Any]
    staged_outputs: dict[str, Any]


class TorchExecutable:
    """The graph's nodes in order, with weights resident on the device; float32 without TF32 unless the variant allows it.

    Prepared shapes run compiled, or as a captured CUDA graph whose rows a smaller request fills in part, where no row depends on another.
    """

    def __init__(self, program: Any, device: str, threads: int, precision: str, mode: str, has_rows: bool) -> None:
        """`has_rows`: every tensor counts rows on its first axis."""
        self._program, self.device, self._threads, self.precision = program, device, threads, precision
        self._captured, self._compiled = "graph" in mode, "compiled" in mode
        self._ready: dict[tuple[Any, ...], Callable[[dict[str, Any]], dict[str, Any]]] = {}
        self._captures: dict[tuple[Any, ...], _Capture] = {}
        self._by_rows: bool | None = None if has_rows else False  # not known yet, or whether rows stand by themselves
        self._lock = threading.Lock()

    def run(self, inputs: Tensors) -> Tensors:
        if (empty := zero_rows(self, inputs)) is not None:
            return empty
        import torch

        with self._lock, torch.inference_mode(), self._numerics():
            call = self._ready.get(_shapes(inputs), self._program)
            try:
                if (found := self._capture_for(inputs)) is not None:
                    return self._replay(*found, inputs)
                outputs = call({name: torch.tensor(value, device=self.device) for name, value in inputs.items()})
            except Exception as error:
                shapes = {name: list(value.shape) for name, value in inputs.items()}
                raise UnsupportedModelError(f"torch failed on inputs of shape {shapes}: {' '.join(str(error).split())[:400]}") from error
            return _on_host(outputs)

    def specialise(self, inputs: Tensors) -> None:
        """Compile or capture for exactly these shapes."""
        key = _shapes(inputs)
        if not (self._captured or self._compiled) or key in self._ready or len(self._ready) >= MOST_CAPTURES:
            return
        import torch

        with self._lock, torch.inference_mode(), self._numerics():
            try:
                given = {name: torch.tensor(value, device=self.device) for name, value in inputs.items()}
                module = self._program.straight(given)
            except Exception as error:
                raise UnsupportedModelError(f"torch can't run this graph: {' '.join(str(error).split())[:300]}") from error
            run = torch.compile(module, fullgraph=True, dynamic=False) if self._compiled else module
            names = self._program.outputs

            def call(tensors: dict[str, Any]) -> dict[str, Any]:
                laid = (self._program.laid_out(tensors[name]) for name in given)
                return dict(zip(names, run(*laid), strict=True))

            try:
                call(given)
                if self._captured:
                    self._captures[key] = _capture(call, given)
            except Exception as error:
                raise UnsupportedModelError(f"torch can't compile or capture this graph: {str(error).splitlines()[0]}") from error
            self._ready[key] = call

    def close(self) -> None:
        self._ready.clear()
        self._captures.clear()
        del self._program

    def _capture_for(self, inputs: Tensors) -> tuple[_Capture, int | None] | None:
        """The graph that was captured for these shapes, or the smallest that the rows fit into, with their number."""
        if (exact := self._captures.get(_shapes(inputs))) is not None:
            return exact, None
        if not self._captures or not self._may_be_parted(inputs):
            return None
        rows = len(next(iter(inputs.values())))
        fits = [
            (len(next(iter(capture.inputs.values()))), capture)
            for capture in self._captures.values()
            if all(tuple(capture.inputs[n].shape[1:]) == v.shape[1:] and len(capture.inputs[n]) >= rows for n, v in inputs.items())
        ]
        return (min(fits, key=lambda pair: pair[0])[1], rows) if fits else None

    def _may_be_parted(self, inputs: Tensors) -> bool:
        """Whether rows do not depend on one another, so that others may stand beside them: tried once, on the first request."""
        if self._by_rows is None:
            self._by_rows = difference_of_rows(self._plainly, inputs) <= TOLERANCE
        return self._by_rows

    def _plainly(self, inputs: Tensors) -> Tensors:
        """Run operator by operator, whatever was captured."""
        import torch

        return _on_host(self._program({name: torch.tensor(value, device=self.device) for name, value in inputs.items()}))

    def _replay(self, capture: _Capture, rows: int | None, inputs: Tensors) -> Tensors:
        """Run a captured graph on inputs of its shapes, or on fewer `rows`."""
        import torch

        def part(tensor: Any) -> Any:
            return tensor if rows is None else tensor[:rows]

        for name, value in inputs.items():
            staged = part(capture.staged_inputs[name])
            if value.size > COPY_ALONE and value.flags.writeable and value.flags.c_contiguous:
                with _threads(min(self._threads, COPY_THREADS)):
                    staged.copy_(torch.from_numpy(value))
            else:
                np.copyto(staged.numpy(), value)
            part(capture.inputs[name]).copy_(staged, non_blocking=True)
        capture.replay()
        for name, value in capture.outputs.items():
            part(capture.staged_outputs[name]).copy_(part(value), non_blocking=True)
        torch.cuda.synchronize()
        staged_outputs = {name: part(value) for name, value in capture.staged_outputs.items()}
        with _threads(min(self._threads, COPY_THREADS)):
            return {n: v.clone().numpy() if v.numel() > COPY_ALONE else v.numpy().copy() for n, v in staged_outputs.items()}

    def _numerics(self) -> AbstractContextManager[Any]:
        """float32 means float32: TF32 only in the variant of that name; threads as asked."""
        import torch

        allowed = self.precision == "tf32"
        stack = ExitStack()
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed, benchmark=True))
        previous = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = allowed
        stack.callback(lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", previous))
        if self.device == "cpu" and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        return stack


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many of torch's CPU threads for a while."""
    import torch

    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)


def _on_host(outputs: dict[str, Any]) -> Tensors:
    return {name: value.float().cpu().numpy() if _narrow(value) else value.cpu().numpy() for name, value in outputs.items()}


def _narrow(value: Any) -> bool:
    return str(value.dtype) == "torch.bfloat16"


def _shapes(inputs: Tensors) -> tuple[Any, ...]:
    return tuple((name, inputs[name].shape) for name in sorted(inputs))


def _capture(call: Callable[[dict[str, Any]], dict[str, Any]], given: dict[str, Any]) -> _Capture:
    import torch

    static = {name: value.clone() for name, value in given.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(static)
    pinned = {name: torch.empty(value.shape, dtype=value.dtype, pin_memory=True) for name, value in static.items()}
    wide = {name: torch.float32 if _narrow(value) else value.dtype for name, value in outputs.items()}
    answers = {name: torch.empty(value.shape, dtype=wide[name], pin_memory=True) for name, value in outputs.items()}
    return _Capture(graph.replay, static, outputs, pinned, answers)


def _cuda_lacks(version: str) -> str:
    """What is missing for CUDA, "" where nothing is; torch is imported, which takes seconds and memory, only where there is a GPU."""
    if version.endswith("+cpu"):
        return "a CUDA build of torch (this one is for CPUs)"
    if not host().gpus and not any(Path(node).exists() for node in GPU_NODES):
        return "an NVIDIA GPU with its driver (nvidia-smi finds none)"
    import torch

    if torch.cuda.is_available():
        return ""
    return "a GPU that its driver shows" if torch.version.cuda else "a CUDA build of torch (this one is for CPUs)"


class TorchBackend:
    """The backend `torch`. On a CPU the other engines are faster, so "auto" tries it on a GPU alone."""

    name = "torch"
    requires = "torch (the extra 'torch'); an NVIDIA GPU for device 'cuda'; a C++ compiler for the mode 'compiled' on a CPU"
    devices = ("cuda", "cpu")
    planned = ("cuda",)

    def availability(self, device: str) -> Availability:
        if importlib.util.find_spec("torch") is None:
            return Availability(lacks="the package torch (pip install 'triscope[torch]')")
        version = importlib.metadata.version("torch")
        if device == "cuda" and (lacks := _cuda_lacks(version)):
            return Availability(lacks=lacks)
        return Availability(version=version)

    def modes(self, device: str) -> tuple[str, ...]:
        if device == "cuda":
            return ("", "graph", "channels-last graph", "compiled graph", "channels-last compiled graph")
        return ("", "compiled") if shutil.which("g++") or shutil.which("clang++") else ("",)

    def compile(self, model: Model, device: str, threads: int, variant: Variant | None = None, mode: str = "") -> TorchExecutable:
        if lacks := self.availability(device).lacks:
            raise BackendUnavailableError(f"torch on {device} lacks {lacks}")
        refuse_unknown_mode(self.name, device, mode, self.modes(device))
        refuse_foreign(self.name, device, variant)
        from shared_runtime.backends.torch_graph import GraphProgram

        graph = model.graph if variant is None else variant.graph(model.graph)
        try:
            program = GraphProgram(graph, device, "channels-last" in mode)
        except Exception as error:  # also what torch has no type of number for
            raise UnsupportedModelError(f"the torch backend can't run {model.name!r}: {error}") from error
        return TorchExecutable(program, device, threads, precision_of(variant), mode, model.signature.has_rows)
