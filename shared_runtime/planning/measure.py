"""Paired, interleaved measurement: every contender runs in turn, so that a busy moment of the machine falls on all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

FEWEST, MOST = 5, 400
ENOUGH_ROUNDS, ENOUGH_SECONDS = 40, 1.0
SETTLE_SECONDS, WARM_SECONDS = 0.05, 5e-3


@dataclass
class Timed:
    """What is timed, and its times [s]. `out` says why it was given up before the others, `rest` is quiet after its turn [s]."""

    call: Callable[[], object]
    times: list[float] = field(default_factory=list)
    out: str = ""
    rest: float = 0.0

    @property
    def median(self) -> float:
        """Median [s]."""
        return statistics.median(self.times)

    @property
    def spread(self) -> float:
        """Interquartile range [s]."""
        return float(np.subtract(*np.percentile(self.times, (75, 25)))) if len(self.times) > 1 else 0.0

    def quantile(self, share: float) -> float:
        """A quantile of the times [s], such as 0.99."""
        return float(np.quantile(self.times, share))


def interleave(contenders: Sequence[Timed], budget: float, hopeless: float = 2.0, rest: float = 0.0) -> None:
    """Run the contenders round by round for `budget` seconds, less where ENOUGH was seen: FEWEST to MOST rounds.

    After two rounds one whose best time is `hopeless` times the best of all is given up: it says so in `out`.
    Short calls are repeated within a round, so that a time is not the clock's. `rest`: seconds of quiet before each
    contender's turn; the idle threads of ONNX Runtime spin for tens of milliseconds and take a core from the next.
    """
    start = time.monotonic()
    racing = list(contenders)
    repeats: dict[int, int] = {}
    for round_ in range(MOST):
        for timed in racing:
            count = repeats.get(id(timed), 1)
            if rest:
                time.sleep(rest)
            if timed.times and timed.times[0] < SETTLE_SECONDS and len(racing) > 1:
                # The threads of the engine before this one may still spin, and a core that has slept is slow at first.
                _warm(timed, WARM_SECONDS if rest else 0.0)
            begin = time.perf_counter()
            for _ in range(count):
                timed.call()
            timed.times.append((time.perf_counter() - begin) / count)
            if timed.rest and len(racing) > 1:
                time.sleep(timed.rest)
            if round_ == 0:
                repeats[id(timed)] = max(1, min(200, int(1e-3 / max(timed.times[0], 1e-7))))
        if round_ == 1:
            best = min(min(timed.times) for timed in racing)
            for timed in racing:
                if min(timed.times) > hopeless * best:
                    timed.out = f"{min(timed.times) / best:.2f} times as slow in the first rounds"
            racing = [timed for timed in racing if not timed.out]
        spent = time.monotonic() - start
        if (spent > budget and round_ >= 2) or (spent > ENOUGH_SECONDS and round_ >= ENOUGH_ROUNDS):
            return
        if len(racing) == 1 and round_ >= FEWEST - 1:
            return


def _warm(timed: Timed, seconds: float) -> None:
    begin = time.perf_counter()
    timed.call()
    while time.perf_counter() - begin < seconds:
        timed.call()


def paired_ratio(slow: Sequence[float], fast: Sequence[float], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """The median of `slow / fast`, round by round, and its 95 % bootstrap interval."""
    pairs = np.asarray(slow[: len(fast)]) / np.asarray(fast[: len(slow)])
    generator = np.random.default_rng(seed)
    medians = np.median(generator.choice(pairs, (500, len(pairs))), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(np.median(pairs)), (float(low), float(high))
