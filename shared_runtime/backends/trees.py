"""Our own kernel for ensembles of decision trees: a row in a microsecond, where an engine's call alone takes several."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from typing import Any

import numpy as np
import onnx

from shared_runtime.backends.base import Availability, refuse_foreign, refuse_unknown_mode
from shared_runtime.backends.cores import Cores
from shared_runtime.errors import BackendUnavailableError, UnsupportedModelError
from shared_runtime.graph.passes.trees import TreeRegressor
from shared_runtime.kernels.trees.ensemble import Ensemble, read_ensemble
from shared_runtime.model import Model
from shared_runtime.signature import Tensors
from shared_runtime.variants import FLOAT, Variant

KERNEL = "shared_runtime.kernels.trees._cpu"
SHARE_ROWS = 256
"""Fewest rows of a part that is handed to another thread."""


class TreesExecutable:
    """An ensemble laid out for the kernel; any number of threads may run it at once."""

    device, precision = "cpu", FLOAT

    def __init__(self, ensemble: Ensemble, source: str, threads: int, operators: int = 1) -> None:
        """`source`: the input. `operators`: how many of the graph the kernel stands for."""
        from shared_runtime.kernels.trees import _cpu

        self._source, self._output, self._columns = source, ensemble.output, ensemble.columns
        self._label, self._classes, self._threads, self._operators = ensemble.label, ensemble.classes, threads, operators
        self._walk = _cpu.run
        self._ensemble = _cpu.prepare(
            ensemble.nodes,
            ensemble.blocks,
            ensemble.roots,
            ensemble.weights,
            ensemble.base,
            ensemble.features,
            ensemble.post,
            ensemble.scale,
        )
        self._cores = Cores(threads)
        self._pool = self._cores.pool(threads - 1, "trees") if threads > 1 else None

    def run(self, inputs: Tensors) -> Tensors:
        x = inputs[self._source]
        out = np.empty((len(x), self._columns), np.float32)
        if self._pool is None or len(x) < 2 * SHARE_ROWS:
            self._walk(self._ensemble, x, out)
        else:
            self._cores.run(lambda: self._shared(x, out))
        if self._classes is None:
            return {self._output: out}
        return {self._output: out, self._label: self._classes[out.argmax(axis=1)]}

    def _shared(self, x: Any, out: Any) -> None:
        """Each thread takes its part of the rows; this one the first."""
        assert self._pool is not None
        cuts = np.linspace(0, len(x), min(self._threads, len(x) // SHARE_ROWS) + 1).astype(int)
        parts = pairwise(cuts[1:])
        others = [self._pool.submit(self._walk, self._ensemble, x[start:end], out[start:end]) for start, end in parts]
        self._walk(self._ensemble, x[: cuts[1]], out[: cuts[1]])
        for other in others:
            other.result()

    def nodes(self, inputs: Tensors) -> dict[str, int]:
        """All operators run in the kernel."""
        return {self.device: self._operators}

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


class TreesBackend:
    """The backend `trees`."""

    name = "trees"
    requires = "the compiled kernel (a C compiler when Triscope was installed), and a graph that is one ensemble of decision trees"
    devices = ("cpu",)
    planned = ("cpu",)

    def availability(self, device: str) -> Availability:
        if importlib.util.find_spec(KERNEL) is None:
            return Availability(lacks="the compiled kernel (install a C compiler, then Triscope again)")
        return Availability(version="1")

    def modes(self, device: str) -> tuple[str, ...]:
        return ("",)

    def compile(self, model: Model, device: str, threads: int, variant: Variant | None = None, mode: str = "") -> TreesExecutable:
        refuse_foreign(self.name, device, variant)
        refuse_unknown_mode(self.name, device, mode, self.modes(device))
        if lacks := self.availability(device).lacks:
            raise BackendUnavailableError(f"the trees' kernel lacks {lacks}")
        graph = onnx.load(str(model.graph), load_external_data=False)
        if not any(node.op_type.startswith("TreeEnsemble") for node in graph.graph.node):
            raise UnsupportedModelError(f"{model.name!r} has no trees")
        spec = model.signature.inputs[0]
        width = spec.shape[1] if len(spec.shape) == 2 else None
        if not isinstance(width, int) or spec.dtype != "float32":
            raise UnsupportedModelError(f"{model.name!r} takes {spec.describe()}; the trees' kernel takes float32 rows of one width")
        operators = len(graph.graph.node)
        TreeRegressor().apply(graph)
        try:
            return TreesExecutable(read_ensemble(graph, width), spec.name, threads, operators)
        except (KeyError, IndexError, ValueError, OverflowError) as error:
            raise UnsupportedModelError(f"the trees of {model.name!r} can't be read: {error!r}") from error
