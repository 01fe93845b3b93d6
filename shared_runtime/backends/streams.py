"""A stream a core: the rows of a request are shared out, and the cores need not wait for one another in each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from shared_runtime.backends.base import Executable, zero_rows
from shared_runtime.errors import UnsupportedModelError
from shared_runtime.numeric import difference
from shared_runtime.signature import Signature, Tensors

TOLERANCE = 1e-2
"""Largest difference, relative, of two rows together from each alone: sums in another order, in bfloat16 at the most."""


class Streams(Executable, Protocol):
    """An executable that can run several requests at once."""

    def run_at_once(self, parts: Sequence[Tensors]) -> list[Tensors]:
        """The outputs of several requests that run side by side."""
        ...

    def specialise(self, inputs: Tensors) -> None:
        """Prepare for these shapes."""
        ...

    def prepare_any(self) -> None:
        """Prepare for any shape."""
        ...

    def nodes(self, inputs: Tensors) -> dict[str, int]:
        """Operators by where they run."""
        ...


class StreamedExecutable:
    """`inner` was compiled with `streams` streams; a request is run in as many parts at once, of a row each where it has fewer."""

    device = "cpu"

    def __init__(self, inner: Streams, streams: int, signature: Signature, name: str) -> None:
        """Raises UnsupportedModelError where the tensors have no rows of their own."""
        self._inner, self._streams, self._name, self._independent = inner, streams, name, False
        self.precision = inner.precision
        if not signature.has_rows:
            inner.close()
            raise UnsupportedModelError(f"the rows of {name!r} can't be shared out: not every tensor has a free leading dimension")

    def run(self, inputs: Tensors) -> Tensors:
        if (empty := zero_rows(self, inputs)) is not None:
            return empty
        parts = self._parts(inputs)
        if len(parts) == 1:
            return self._inner.run(inputs)
        outputs = self._inner.run_at_once(parts)
        return {name: np.concatenate([part[name] for part in outputs]) for name in outputs[0]}

    def specialise(self, inputs: Tensors) -> None:
        """Prepare for these shapes. Raises UnsupportedModelError where the model lets rows depend on one another."""
        if not self._independent:
            self._try_rows(inputs)
        for part in self._parts(inputs):
            self._inner.specialise(part)

    def prepare_any(self) -> None:
        """As the engine without streams."""
        self._inner.prepare_any()

    def nodes(self, inputs: Tensors) -> dict[str, int]:
        """As the engine without streams."""
        return self._inner.nodes(inputs)

    def close(self) -> None:
        self._inner.close()

    def _parts(self, inputs: Tensors) -> list[Tensors]:
        rows = len(next(iter(inputs.values())))
        parts = max(1, min(rows, self._streams))
        bounds = [rows * part // parts for part in range(parts + 1)]
        return [{n: v[low:high] for n, v in inputs.items()} for low, high in pairwise(bounds)]

    def _try_rows(self, inputs: Tensors) -> None:
        error = difference_of_rows(self._inner.run, inputs)
        if not error <= TOLERANCE:
            raise UnsupportedModelError(
                f"the rows of {self._name!r} depend on one another: two together differ by {error:.1e} from each alone"
            )
        self._independent = True


def difference_of_rows(run: Callable[[Tensors], Tensors], inputs: Tensors) -> float:
    """How far two rows together are from each alone: zero, or some rounding, where rows don't depend on one another."""
    one = {name: value[:1] for name, value in inputs.items()}
    other = {name: value * value.dtype.type(0.9) if value.dtype.kind == "f" else value for name, value in one.items()}
    together = run({name: np.concatenate([one[name], other[name]]) for name in one})
    apart = [run(row) for row in (one, other)]
    if any(row[name].ndim == 0 or row[name].shape[1:] != value.shape[1:] for row in apart for name, value in together.items()):
        return float("inf")
    return difference(together, {name: np.concatenate([row[name] for row in apart]) for name in together})
