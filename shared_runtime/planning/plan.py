"""What a plan says: the candidates with their times, the ladder of numbers of rows, and the choice."""

from __future__ import annotations

import msgspec

from shared_runtime.variants import FLOAT


class Timing(msgspec.Struct, frozen=True):
    """A candidate's times at a number of rows: median, spread (interquartile) and 99th percentile [ms]."""

    rows: int
    median_ms: float
    spread_ms: float
    p99_ms: float


class Candidate(msgspec.Struct, frozen=True):
    """One way to run the model: its times, or why it can't be used. `median_ms` is that of the fewest rows."""

    backend: str
    device: str
    version: str = ""
    median_ms: float | None = None
    spread_ms: float | None = None
    error: float | None = None
    lost: str = ""
    variant: str = FLOAT
    precision: str = FLOAT
    mode: str = ""
    threads: int = 0
    timings: tuple[Timing, ...] = ()
    memory_mib: float | None = None
    joules: float | None = None

    @property
    def label(self) -> str:
        """Such as `openvino on cpu, int8-openvino, 2 threads`."""
        parts = [
            f"{self.backend} on {self.device}",
            *([self.variant] if self.variant != FLOAT else []),
            *([self.mode] if self.mode else []),
        ]
        return ", ".join([*parts, threads(self.threads)])


class Rung(msgspec.Struct, frozen=True):
    """Requests of about `rows` rows run by candidate number `candidate`."""

    rows: int
    candidate: int


class Plan(msgspec.Struct, frozen=True):
    """What this host runs for a model, why, and what it was compared with. The first rung's choice stands at the top.

    `structure`: the hash of the graph without its weights, and of the inputs' sizes; the same with other weights takes the plan over.
    """

    model: str
    sha256: str
    host: str
    backend: str
    device: str
    precision: str
    variant: str
    threads: int
    why: str
    candidates: tuple[Candidate, ...]
    ladder: tuple[Rung, ...] = ()
    objective: str = "latency"
    nodes: dict[str, int] = {}
    structure: str = ""

    def describe(self) -> str:
        """One line: the choice and the reason."""
        return f"{self.model}: {self.backend} on {self.device}, {self.precision}, {threads(self.threads)} - {self.why}"

    def __str__(self) -> str:
        return self.describe()


def threads(count: int) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} thread{'s' if count != 1 else ''}"
