"""Decision trees on a CPU; compiled from `_cpu.c`."""

from typing import Any, NewType

from numpy.typing import NDArray

Prepared = NewType("Prepared", object)

def prepare(
    nodes: NDArray[Any],
    blocks: NDArray[Any],
    roots: NDArray[Any],
    weights: NDArray[Any],
    base: NDArray[Any],
    features: int,
    post: int,
    scale: float,
    /,
) -> Prepared: ...
def run(ensemble: Prepared, x: NDArray[Any], out: NDArray[Any], /) -> None: ...
