"""Prometheus metrics of the models that this process runs, and the same as plain values."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

import msgspec
import numpy as np
from numpy.typing import NDArray
from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client.metrics_core import HistogramMetricFamily, Metric

from shared_runtime.planning.plan import Plan

SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
FLUSH = 4096
MODEL = ("model", "version", "backend", "device", "precision")


class RunHistograms:
    """Seconds and rows of every run. A run costs one append; what was appended is counted in bulk when somebody looks, or
    when FLUSH runs have gathered: a boosted model answers in microseconds, and its metrics must not double that."""

    def __init__(self) -> None:
        self._pending: dict[tuple[str, ...], deque[tuple[int, float]]] = {}
        self._counted: dict[tuple[str, ...], tuple[Counts, Counts]] = {}
        self._lock = threading.Lock()
        REGISTRY.register(self)

    def observer(self, labels: tuple[str, ...]) -> Callable[[int, float], None]:
        """What is called after each run with its rows and seconds."""
        with self._lock:
            pending = self._pending.setdefault(labels, deque())
        append = pending.append

        def ran(rows: int, seconds: float) -> None:
            append((rows, seconds))
            if len(pending) >= FLUSH:
                self._count(labels)

        return ran

    def _count(self, labels: tuple[str, ...]) -> tuple[Counts, Counts]:
        with self._lock:
            pending = self._pending.get(labels, deque())
            taken = [pending.popleft() for _ in range(len(pending))]
            seconds, rows = self._counted.setdefault(labels, (Counts(SECONDS_BUCKETS), Counts(ROWS_BUCKETS)))
            if taken:
                values = np.array(taken, np.float64)
                rows.add(values[:, 0])
                seconds.add(values[:, 1])
            return seconds, rows

    def collect(self) -> Iterable[Metric]:
        """Both histograms, for Prometheus."""
        seconds = HistogramMetricFamily("triscope_model_run_seconds", "Time of one run of a model, all its rows together.", labels=MODEL)
        rows = HistogramMetricFamily("triscope_model_run_rows", "Rows of one run of a model.", labels=MODEL)
        for labels in list(self._pending):
            for family, counts in zip((seconds, rows), self._count(labels), strict=True):
                family.add_metric(labels, counts.cumulative(), counts.total)
        return (seconds, rows)

    def totals(self) -> dict[tuple[str, ...], tuple[int, float, int]]:
        """Runs, seconds and rows by the labels in MODEL."""
        found = {}
        for labels in list(self._pending):
            seconds, rows = self._count(labels)
            found[labels] = (int(seconds.counts.sum()), seconds.total, int(rows.total))
        return found


class Counts:
    """How many values fell into each bucket (the last is without end), and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, np.zeros(len(bounds) + 1, np.int64), 0.0

    def add(self, values: NDArray[np.float64]) -> None:
        """Count `values`."""
        self.counts += np.bincount(np.searchsorted(self.bounds, values, "left"), minlength=len(self.counts))
        self.total += float(values.sum())

    def cumulative(self) -> list[tuple[str, float]]:
        """Buckets as Prometheus has them."""
        return list(zip([*(str(float(bound)) for bound in self.bounds), "+Inf"], map(float, np.cumsum(self.counts)), strict=True))


runs_of = RunHistograms()
plan_info = Gauge("triscope_model_plan_info", "The plan that a model runs by; always 1.", (*MODEL, "variant", "threads"))
batches_released = Counter("triscope_batches_released", "Batches of the dynamic batcher, by why they were released.", ("model", "reason"))
queue_rows = Gauge("triscope_batcher_queue_rows", "Rows that wait in the dynamic batcher.", ("model",))


class ModelStatistics(msgspec.Struct, frozen=True):
    """What a model did in this process: its plan in a line, runs, rows, seconds in all, and why batches were released."""

    model: str
    version: str
    plan: str
    runs: int
    rows: int
    seconds: float
    released: dict[str, int]

    @property
    def rows_a_run(self) -> float:
        """Mean rows of a run."""
        return self.rows / self.runs if self.runs else 0.0

    @property
    def ms_a_run(self) -> float:
        """Mean time of a run [ms]."""
        return 1e3 * self.seconds / self.runs if self.runs else 0.0


_plans: dict[tuple[str, str], Plan] = {}
_lock = threading.Lock()


def labels(plan: Plan, version: str) -> dict[str, str]:
    """The labels of a model that runs by `plan`."""
    return {"model": plan.model, "version": version, "backend": plan.backend, "device": plan.device, "precision": plan.precision}


def planned(plan: Plan, version: str) -> None:
    """A model is ready to run by `plan`."""
    plan_info.labels(**labels(plan, version), variant=plan.variant, threads=str(plan.threads)).set(1)
    with _lock:
        _plans[plan.model, version] = plan


def observer(plan: Plan, version: str) -> Callable[[int, float], None]:
    """What a session calls after each run with its rows and seconds."""
    return runs_of.observer(tuple(labels(plan, version)[name] for name in MODEL))


def _sums(families: Iterable[Metric], suffix: str, *keys: str) -> dict[tuple[str, ...], float]:
    found: dict[tuple[str, ...], float] = {}
    for family in families:
        for sample in family.samples:
            if sample.name.endswith(suffix):
                key = tuple(sample.labels[k] for k in keys)
                found[key] = found.get(key, 0.0) + sample.value
    return found


def model_statistics() -> list[ModelStatistics]:
    """Every model that this process has planned, by name."""
    runs: dict[tuple[str, str], tuple[int, float, int]] = {}
    for (model, version, *_), (count, seconds, rows) in runs_of.totals().items():
        before = runs.get((model, version), (0, 0.0, 0))
        runs[model, version] = (before[0] + count, before[1] + seconds, before[2] + rows)
    released = _sums(batches_released.collect(), "_total", "model", "reason")
    with _lock:
        plans = dict(_plans)
    return [
        ModelStatistics(
            model,
            version,
            plan.describe().partition(": ")[2],
            runs.get((model, version), (0, 0.0, 0))[0],
            runs.get((model, version), (0, 0.0, 0))[2],
            runs.get((model, version), (0, 0.0, 0))[1],
            {reason: int(n) for (name, reason), n in released.items() if name == model},
        )
        for (model, version), plan in sorted(plans.items())
    ]
