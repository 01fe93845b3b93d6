"""What a worker says of itself while it works: `/metrics` for Prometheus, and a line in the database for the start page."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import msgspec
import prometheus_client
import sqlalchemy as sa

from apps.common.database import metadata, open_database
from apps.common.errors import UsageError
from apps.common.settings import Settings
from pipelines import Log, PipelineError, open_log
from pipelines.messages import now_rfc3339
from pipelines.metrics import OUTCOMES, lag_records
from shared_runtime.telemetry.metrics import ModelStatistics, model_statistics

logger = logging.getLogger(__name__)
EVERY_SECONDS = 2.0
SILENT_SECONDS = 10.0
"""A worker that was not heard of for so long is taken for dead."""
FORGET_DAYS = 1

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", sa.String(200), primary_key=True),
    sa.Column("worker", sa.String(64), nullable=False),
    sa.Column("topic", sa.String(200), nullable=False),
    sa.Column("started", sa.String(40), nullable=False),
    sa.Column("seen", sa.String(40), nullable=False),
    sa.Column("detail", sa.LargeBinary, nullable=False),
)


class Report(msgspec.Struct, frozen=True):
    """What a worker last said. `lag`: records that wait, None where the log did not answer."""

    handled: int = 0
    retried: int = 0
    dead: int = 0
    per_second: float = 0.0
    lag: int | None = None
    models: tuple[ModelStatistics, ...] = ()


class Worker(msgspec.Struct, frozen=True):
    """A worker by its group and topic, where it runs, and its last report. `silent`: seconds since then."""

    id: str
    worker: str
    topic: str
    started: str
    silent: float
    report: Report

    @property
    def alive(self) -> bool:
        """Whether it was heard of lately."""
        return self.silent < SILENT_SECONDS


def known_workers(engine: sa.Engine) -> list[Worker]:
    """The workers of the last day, by name; those that ended in good order are not among them."""
    with engine.connect() as connection:
        rows = list(connection.execute(sa.select(workers).order_by(workers.c.worker, workers.c.started)))
    now = datetime.now(UTC)
    return [
        Worker(
            row.id,
            row.worker,
            row.topic,
            row.started,
            max(0.0, (now - datetime.fromisoformat(row.seen)).total_seconds()),
            msgspec.json.decode(row.detail, type=Report),
        )
        for row in rows
    ]


def serve_metrics(address: str, port: int) -> None:
    """Serve this process's metrics at http://ADDRESS:PORT/metrics until it ends. Raises UsageError where the port is taken."""
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    try:
        prometheus_client.start_http_server(port, address)
    except OSError as error:
        raise UsageError(f"/metrics can't be served on {address}:{port}: {error}; choose another TRISCOPE_METRICS_PORT") from error
    logger.info("metrics", extra={"address": f"http://{address}:{port}/metrics"})


@contextmanager
def reporting(settings: Settings, groups: Mapping[str, str]) -> Iterator[None]:
    """Report for the workers of this process, `groups` by name with their topics, for the length of the block."""
    if settings.metrics_port:
        serve_metrics(settings.metrics_address, settings.metrics_port)
    reporter = _Reporter(settings, groups)
    thread = threading.Thread(target=reporter.run, name="worker-reports", daemon=True)
    thread.start()
    try:
        yield
    finally:
        reporter.stop.set()
        thread.join(2 * EVERY_SECONDS)


def _counted(topic: str, group: str, outcome: str) -> int:
    found = prometheus_client.REGISTRY.get_sample_value("triscope_records_total", {"topic": topic, "group": group, "outcome": outcome})
    return int(found or 0)


class _Reporter:
    """Writes a line a worker every two seconds, from the metrics of this process. It never disturbs the work."""

    def __init__(self, settings: Settings, groups: Mapping[str, str]) -> None:
        self._settings, self._groups = settings, groups
        self._place = f"{socket.gethostname()[:100]}:{os.getpid()}"
        self._started = now_rfc3339()
        self._before: dict[str, tuple[float, int]] = {}
        self._log: Log | None = None
        self.stop = threading.Event()

    def run(self) -> None:
        """Report until `stop`, then take the lines away."""
        try:
            engine = open_database(self._settings.database_url)
        except sa.exc.SQLAlchemyError:
            return  # the worker itself says what is wrong with the database
        try:
            self._change(engine, workers.delete().where(workers.c.seen < (datetime.now(UTC) - timedelta(days=FORGET_DAYS)).isoformat()))
            failing = False
            while True:
                lags = {group: self._lag(group, topic) for group, topic in self._groups.items()}
                try:
                    self._report(engine, lags)
                    failing = False
                except sa.exc.SQLAlchemyError as error:
                    if not failing:
                        logger.warning("the worker is not reported for now: %s", error)
                    failing = True
                if self.stop.wait(EVERY_SECONDS):
                    break
            self._change(engine, workers.delete().where(workers.c.id.in_([self._id(group) for group in self._groups])))
        finally:
            if self._log is not None:
                self._log.close()
            engine.dispose()

    def _change(self, engine: sa.Engine, change: sa.Delete) -> None:
        try:
            with engine.begin() as connection:
                connection.execute(change)
        except sa.exc.SQLAlchemyError as error:
            logger.warning("reports of workers could not be cleared: %s", error)

    def _id(self, group: str) -> str:
        return f"{self._place}:{group}"

    def _lag(self, group: str, topic: str) -> int | None:
        try:
            if self._log is None:
                self._log = open_log(self._settings.log_url)
            waiting = sum(self._log.lag(group, topic).values())
        except PipelineError:
            return None
        lag_records.labels(topic, group).set(waiting)
        return int(waiting)

    def _report(self, engine: sa.Engine, lags: Mapping[str, int | None]) -> None:
        models = tuple(model_statistics())
        with engine.begin() as connection:
            for group, topic in self._groups.items():
                counts = {outcome: _counted(topic, group, outcome) for outcome in OUTCOMES}
                now, handled = time.monotonic(), counts["handled"]
                then, before = self._before.get(group, (now, handled))
                self._before[group] = (now, handled)
                rate = (handled - before) / (now - then) if now > then else 0.0
                report = Report(**counts, per_second=round(rate, 3), lag=lags[group], models=models)
                row = {
                    "id": self._id(group),
                    "worker": group,
                    "topic": topic,
                    "started": self._started,
                    "seen": datetime.now(UTC).isoformat(),
                    "detail": msgspec.json.encode(report),
                }
                change = workers.update().where(workers.c.id == row["id"]).values(row)
                if not connection.execute(change).rowcount:
                    connection.execute(workers.insert().values(row))
