"""Our own kernel for small networks: the whole network in one call, where an engine's operators cost more to call than to compute."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from shared_runtime.backends.base import Availability, Executable, refuse_foreign, refuse_unknown_mode, zero_rows
from shared_runtime.backends.cores import Cores
from shared_runtime.backends.streams import StreamedExecutable, difference_of_rows
from shared_runtime.errors import BackendUnavailableError, UnsupportedModelError
from shared_runtime.graph.check import read_whole
from shared_runtime.kernels.fused.lowering import lower, refuse_unknown_operators
from shared_runtime.model import Model
from shared_runtime.signature import Tensors
from shared_runtime.variants import FLOAT, Variant

KERNEL = "shared_runtime.kernels.fused._cpu"
MOST_WORK = 20_000_000
"""Most multiplications of a run that the kernel is prepared for: beyond them the engines' blocking for the caches wins."""
MOST_PROGRAMS = 32
"""Programs that are kept, one for each combination of input shapes; the oldest goes first."""
MOST_ROWS = 64
"""Rows that do not depend on one another go through the kernel in parts of 1, 2, 4 ... 64: a few programs serve any number."""
TOLERANCE = 1e-5
"""Largest difference, relative, of two rows together from each alone: sums in another order."""


class FusedExecutable:
    """A network with a program for each combination of input shapes; any number of threads may run it at once."""

    device, precision = "cpu", FLOAT

    def __init__(self, proto: onnx.ModelProto, name: str, inputs: Sequence[str], has_rows: bool, threads: int = 1) -> None:
        """`has_rows`: every tensor counts rows on its first axis. `threads`: requests that `run_at_once` runs side by side."""
        from shared_runtime.kernels.fused import _cpu

        self._proto, self._name, self._inputs, self._kernel = proto, name, tuple(inputs), _cpu
        self._by_rows: bool | None = None if has_rows else False  # not known yet, or whether rows may be parted
        self._programs: dict[tuple[Any, ...], tuple[Any, dict[str, tuple[int, ...]]]] = {}
        self._lock = threading.Lock()
        self._cores = Cores(threads)
        self._pool = self._cores.pool(threads - 1, "fused") if threads > 1 else None

    def run(self, inputs: Tensors) -> Tensors:
        arrays = [inputs[name] for name in self._inputs]
        found = self._programs.get(tuple(array.shape for array in arrays))
        if found is not None:
            return self._whole(found, arrays)
        if (empty := zero_rows(self, inputs)) is not None:
            return empty
        return self._parted(arrays) if self._may_part(inputs) else self._whole(self._program(arrays), arrays)

    def run_at_once(self, parts: Sequence[Tensors]) -> list[Tensors]:
        """The outputs of several requests; this thread runs the first."""
        if self._pool is None:
            return [self.run(part) for part in parts]
        return self._cores.run(lambda: self._side_by_side(parts))

    def _side_by_side(self, parts: Sequence[Tensors]) -> list[Tensors]:
        assert self._pool is not None
        others = [self._pool.submit(self.run, part) for part in parts[1:]]
        return [self.run(parts[0]), *(other.result() for other in others)]

    def specialise(self, inputs: Tensors) -> None:
        """Make the program for these shapes. Raises UnsupportedModelError where the kernel can't run it."""
        if all(all(value.shape) for value in inputs.values()):
            self._program([inputs[name] for name in self._inputs], MOST_WORK)
            self._may_part(inputs)

    def prepare_any(self) -> None:
        """Make the programs of all parts now, so that no request waits for them; others are made when their shapes come."""
        if self._by_rows and (shapes := next(iter(self._programs), None)) is not None:
            for rows in (1 << power for power in range(MOST_ROWS.bit_length())):
                self._program([np.empty((rows, *shape[1:]), np.float32) for shape in shapes])

    def nodes(self, inputs: Tensors) -> dict[str, int]:
        """All operators run in the kernel."""
        return {self.device: len(self._proto.graph.node)}

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._programs.clear()

    def _whole(self, found: tuple[Any, dict[str, tuple[int, ...]]], arrays: Sequence[NDArray[Any]]) -> Tensors:
        program, shapes = found
        outputs = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
        self._kernel.run(program, *arrays, *outputs.values())
        return outputs

    def _parted(self, arrays: Sequence[NDArray[Any]]) -> Tensors:
        rows, start = len(arrays[0]), 0
        outputs: dict[str, NDArray[np.float32]] = {}
        while start < rows:
            end = start + min(MOST_ROWS, 1 << (rows - start).bit_length() - 1)
            part = [array[start:end] for array in arrays]
            program, shapes = self._program(part)
            if not outputs:
                outputs = {name: np.empty((rows, *shape[1:]), np.float32) for name, shape in shapes.items()}
            self._kernel.run(program, *part, *(output[start:end] for output in outputs.values()))
            start = end
        return outputs

    def _may_part(self, inputs: Tensors) -> bool:
        """Whether rows don't depend on one another; tried once."""
        if self._by_rows is None:
            self._by_rows = difference_of_rows(self._alone, inputs) <= TOLERANCE
        return self._by_rows

    def _alone(self, inputs: Tensors) -> Tensors:
        arrays = [inputs[name] for name in self._inputs]
        return self._whole(self._program(arrays), arrays)

    def _program(self, arrays: Sequence[NDArray[Any]], most_work: int | None = None) -> tuple[Any, dict[str, tuple[int, ...]]]:
        key = tuple(array.shape for array in arrays)
        if (found := self._programs.get(key)) is not None:
            return found
        with self._lock:
            if key not in self._programs:
                try:
                    made = lower(self._proto, dict(zip(self._inputs, key, strict=True)), most_work)
                except (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError) as error:
                    raise UnsupportedModelError(f"{self._name!r} can't be laid out for the fused kernel: {error!r}") from error
                program = self._kernel.prepare(made.instructions, made.constants, made.scratch, made.sizes, made.work)
                while len(self._programs) >= MOST_PROGRAMS:
                    self._programs.pop(next(iter(self._programs)))
                self._programs[key] = program, dict(made.outputs)
            return self._programs[key]


class FusedBackend:
    """The backend `fused`."""

    name = "fused"
    requires = "the compiled kernel (a C compiler when Triscope was installed), and a small network of dense or recurrent layers in float32"
    devices = ("cpu",)
    planned = ("cpu",)
    one_thread = True

    def availability(self, device: str) -> Availability:
        if importlib.util.find_spec(KERNEL) is None:
            return Availability(lacks="the compiled kernel (install a C compiler, then Triscope again)")
        return Availability(version="1")

    def modes(self, device: str) -> tuple[str, ...]:
        return ("", "streams")

    def compile(self, model: Model, device: str, threads: int, variant: Variant | None = None, mode: str = "") -> Executable:
        refuse_foreign(self.name, device, variant)
        refuse_unknown_mode(self.name, device, mode, self.modes(device))
        if lacks := self.availability(device).lacks:
            raise BackendUnavailableError(f"the fused kernel lacks {lacks}")
        if strange := [spec for spec in (*model.signature.inputs, *model.signature.outputs) if spec.dtype != "float32"]:
            raise UnsupportedModelError(f"{model.name!r} has {strange[0].describe()}; the fused kernel computes in float32 alone")
        refuse_unknown_operators(onnx.load(str(model.graph), load_external_data=False))
        streams = threads if mode == "streams" else 1
        names = [spec.name for spec in model.signature.inputs]
        inner = FusedExecutable(read_whole(model.graph), model.name, names, model.signature.has_rows, streams)
        return inner if streams == 1 else StreamedExecutable(inner, streams, model.signature, model.name)
