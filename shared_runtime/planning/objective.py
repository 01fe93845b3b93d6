"""What a plan is the best at: latency, throughput within a latency limit, memory, or energy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared_runtime.backends.base import Executable
from shared_runtime.errors import BackendUnavailableError
from shared_runtime.planning.footprint import peak_memory_mib
from shared_runtime.planning.measure import Timed
from shared_runtime.planning.plan import Candidate
from shared_runtime.signature import Tensors

if TYPE_CHECKING:
    from shared_runtime.model import Model

KINDS = ("latency", "throughput", "memory", "energy")
ENERGY_SECONDS = 1.0
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Score:
    """Lower is better; `why` says in words why it lost, where times alone do not."""

    value: float
    why: str = ""
    memory_mib: float | None = None
    joules: float | None = None


@dataclass(frozen=True)
class Objective:
    """`kind`: latency (fastest at each number of rows), throughput (most rows a second whose p99 stays under
    `p99_ms`), memory (smallest peak of a process that runs one row) or energy (fewest joules a thousand rows)."""

    kind: str = "latency"
    p99_ms: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown objective {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.p99_ms is not None and (self.kind != "throughput" or not self.p99_ms > 0):
            raise ValueError(f"p99_ms is {self.p99_ms} with the objective {self.kind!r}; expected milliseconds above 0, with 'throughput'")

    def scores(self, model: Model, contenders: Sequence[tuple[Any, Executable | None, dict[int, Timed]]], probe: Tensors) -> list[Score]:
        """A score a contender: (candidate, executable or None where it is far behind, times by rows).

        Raises BackendUnavailableError where energy can't be read.
        """
        if self.kind == "throughput":
            return [self._throughput(timed) for _, _, timed in contenders]
        if self.kind == "memory":
            return [_memory(model, candidate, probe) for candidate, _, _ in contenders]
        if self.kind == "energy":
            return [Score(float("inf")) if executable is None else _energy(executable, probe) for _, executable, _ in contenders]
        return [Score(timed[min(timed)].median) for _, _, timed in contenders]

    def _throughput(self, timed: dict[int, Timed]) -> Score:
        limit = float("inf") if self.p99_ms is None else self.p99_ms / 1e3
        fits = {rows: t for rows, t in timed.items() if t.quantile(0.99) <= limit}
        if not fits:
            return Score(float("inf"), f"p99 over {self.p99_ms} ms at every number of rows")
        rows, best = min(fits.items(), key=lambda item: item[1].median / item[0])
        return Score(best.median / rows, f"{rows / best.median:.1f} rows/s at best, at {rows} rows")


LATENCY = Objective()


def _memory(model: Model, candidate: Candidate, probe: Tensors) -> Score:
    try:
        peak = peak_memory_mib(model, candidate, probe)
    except BackendUnavailableError as error:
        return Score(float("inf"), str(error))
    return Score(peak, f"{peak:.0f} MiB", memory_mib=round(peak, 1))


def energy_counter() -> Path | None:
    """The processor's energy counter (RAPL, microjoules) where it can be read."""
    for path in sorted(POWERCAP.glob("*rapl:0/energy_uj")):
        try:
            path.read_text()
        except OSError:
            continue
        return path
    return None


def _energy(executable: Executable, probe: Tensors) -> Score:
    read = _nvml() if executable.device == "cuda" else _rapl()
    begin, runs, start = read(), 0, time.monotonic()
    while time.monotonic() - start < ENERGY_SECONDS:
        executable.run(probe)
        runs += 1
    joules = 1000 * (read() - begin) / runs
    return Score(joules, f"{joules:.2f} J a thousand rows", joules=round(joules, 3))


def _rapl() -> Any:
    counter = energy_counter()
    if counter is None:
        raise BackendUnavailableError(
            f"energy can't be measured: no RAPL counter under {POWERCAP} can be read; choose the objective latency, throughput or memory"
        )
    return lambda: int(counter.read_text()) / 1e6


def _nvml() -> Any:
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:
        raise BackendUnavailableError(f"energy can't be measured: NVML gives no counter ({error}); pip install nvidia-ml-py") from error
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
