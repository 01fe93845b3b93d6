"""Programs of small networks on a CPU; compiled from `_cpu.c`."""

from typing import Any, NewType

from numpy.typing import NDArray

Prepared = NewType("Prepared", object)

def prepare(instructions: NDArray[Any], constants: NDArray[Any], scratch: int, sizes: tuple[int, ...], work: int, /) -> Prepared: ...
def run(program: Prepared, /, *arrays: NDArray[Any]) -> None: ...
def version(name: str | None = None, /) -> str: ...
