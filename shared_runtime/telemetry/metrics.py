"""Prometheus metrics of the models that this process runs, and the same as plain values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import msgspec
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric

from shared_runtime.planning.planner import Plan

SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MODEL = ("model", "version", "backend", "device", "precision")

run_seconds = Histogram("triscope_model_run_seconds", "Time of one run of a model, all its rows together.", MODEL, buckets=SECONDS_BUCKETS)
run_rows = Histogram("triscope_model_run_rows", "Rows of one run of a model.", MODEL, buckets=ROWS_BUCKETS)
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
    """What a session calls after each run with its rows and seconds; the labels are looked up once."""
    known = labels(plan, version)
    seconds_of, rows_of = run_seconds.labels(**known).observe, run_rows.labels(**known).observe

    def ran(rows: int, seconds: float) -> None:
        seconds_of(seconds)
        rows_of(rows)

    return ran


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
    by = ("model", "version")
    runs, seconds = _sums(run_seconds.collect(), "_count", *by), _sums(run_seconds.collect(), "_sum", *by)
    rows = _sums(run_rows.collect(), "_sum", *by)
    released = _sums(batches_released.collect(), "_total", "model", "reason")
    with _lock:
        plans = dict(_plans)
    return [
        ModelStatistics(
            model,
            version,
            plan.describe().partition(": ")[2],
            int(runs.get((model, version), 0)),
            int(rows.get((model, version), 0)),
            seconds.get((model, version), 0.0),
            {reason: int(n) for (name, reason), n in released.items() if name == model},
        )
        for (model, version), plan in sorted(plans.items())
    ]
