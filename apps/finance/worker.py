"""The worker: `finance.transactions` -> features, models, budget -> `finance.decisions`, `finance.alerts`, store.

Labels that were in the log when a transaction came are applied before it is decided on. A terminal's history
is made of all cards' transactions, so one worker reads all partitions: the one that owns the labels' only partition.
Others stand by and take over when it ends.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from apps.finance.messages import LABELS, TRANSACTIONS
from apps.finance.service import FinanceService, parse_time
from pipelines import BatchProcessor, Log, PermanentError, Record, UnavailableError
from pipelines.errors import NOT_JSON
from pipelines.patience import patiently
from pipelines.processor import Interrupted

logger = logging.getLogger(__name__)
GROUP, LABEL_GROUP = "finance", "finance-labels"
REPORTS = {GROUP: TRANSACTIONS.name}
"""The group and topic whose counts this worker reports."""
BATCH = 256
BUDGET_SECONDS = 2.0


class _Time(msgspec.Struct):
    event_time: str


def event_time(record: Record) -> float:
    """Event time of a transaction [us]; minus infinity for a record that has none, so that it is refused at once."""
    try:
        return parse_time(msgspec.json.decode(record.value, type=_Time).event_time)
    except (PermanentError, *NOT_JSON):
        return -math.inf


def run_worker(
    service: FinanceService, log: Log, stop: threading.Event, *, until_idle: bool = False, ready: Callable[[], None] = lambda: None
) -> BatchProcessor:
    """Decide on transactions until `stop`, or until the topic is empty; the processor, for its counts."""
    labels = BatchProcessor(log, LABELS, LABEL_GROUP, service.apply_labels, max_records=1000)
    transactions = BatchProcessor(log, TRANSACTIONS, GROUP, service.process, time_of=event_time, max_records=BATCH)

    def work() -> None:
        with labels:
            done = False
            while not stop.is_set() and not done:
                labels.work(labels.poll(0.5), stop)
                done = bool(labels.consumer.assignment()) and _lead(service, labels, transactions, stop, until_idle, ready)

    try:
        patiently(work, stop)
    except UnavailableError:
        logger.info("ended while it waited", extra={"topic": TRANSACTIONS.name})
    except Interrupted:
        logger.info("interrupted; unfinished records stay in the log", extra={"topic": TRANSACTIONS.name})
    with suppress(UnavailableError):  # what is not noted is published once more
        service.flush()
    return transactions


def _lead(
    service: FinanceService,
    labels: BatchProcessor,
    transactions: BatchProcessor,
    stop: threading.Event,
    until_idle: bool,
    ready: Callable[[], None],
) -> bool:
    """Decide as long as this worker owns the labels; False where it lost them to another."""
    service.reset()
    service.recover()
    service.engine()
    announced, checked = False, 0.0
    with transactions:
        while not stop.is_set():
            # kafka-python begins to join anew with every poll: a short one might never be in time.
            records = transactions.poll(0.05 if until_idle and announced else 0.5)
            if not announced and transactions.consumer.assignment():
                announced = True
                logger.info("ready", extra={"worker": GROUP, "topic": TRANSACTIONS.name})
                ready()
            labels.drain(stop)
            if not labels.consumer.assignment():
                logger.warning("another finance worker took over; this one stands by")
                return False
            if records:
                transactions.work(records, stop)
            else:
                service.flush()
                labels.work(labels.poll(0.0), stop)
                if until_idle and announced and transactions.idle() and labels.idle():
                    return True
            if time.monotonic() - checked > BUDGET_SECONDS:
                checked = time.monotonic()
                service.follow_budget()
    return True
