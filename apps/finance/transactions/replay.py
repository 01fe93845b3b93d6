"""Sends a table of transactions, and their labels seven days later, to the log in the order of event time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import msgspec
import polars as pl

from apps.finance.features.schema import LABEL_DELAY, SECOND
from apps.finance.messages import LABELS, TRANSACTIONS, LabelMessage, TransactionMessage
from apps.finance.transactions.event_time import rfc3339
from apps.finance.transactions.table import LABEL
from pipelines import Log, Outgoing
from pipelines.patience import patiently

BATCH = 500
SOURCE = "triscope/replay"


class Sent(msgspec.Struct):
    """What a replay has sent."""

    transactions: int = 0
    labels: int = 0


def replay_table(
    table: pl.DataFrame,
    log: Log,
    *,
    speed: float = 0.0,
    with_labels: bool = True,
    shift: bool = False,
    stop: threading.Event | None = None,
) -> Sent:
    """Send `table` (as `read_transactions` returns it) at `speed` times real time, 0 for as fast as the log takes it.

    Each label goes out seven days of event time after its transaction, before transactions of that time.
    With `shift` all event times move so that the last transaction lies at the present. With `stop` a log that does not answer is waited
    for until it is set.
    """
    moved = round(time.time() * SECOND) - int(table["TX_DATETIME"].dt.epoch("us").to_numpy().max()) if shift and len(table) else 0
    labelled = with_labels and LABEL in table.columns
    sent, begun, first = Sent(), time.monotonic(), None
    batch: list[tuple[bool, Outgoing]] = []
    for event_us, is_label, record in _merged(table, labelled, moved):
        if stop is not None and stop.is_set():
            break
        first = event_us if first is None else first
        if speed:
            wait = begun + (event_us - first) / SECOND / speed - time.monotonic()
            if wait > 0.002:
                _send(log, batch, sent, stop)
                batch = []
                if (stop or threading.Event()).wait(wait):
                    break
        batch.append((is_label, record))
        if len(batch) >= BATCH:
            _send(log, batch, sent, stop)
            batch = []
    _send(log, batch, sent, stop)
    return sent


def _send(log: Log, batch: list[tuple[bool, Outgoing]], sent: Sent, stop: threading.Event | None) -> None:
    labels, transactions = [r for is_label, r in batch if is_label], [r for is_label, r in batch if not is_label]
    patiently(lambda: log.produce_many(LABELS.name, labels), stop)
    patiently(lambda: log.produce_many(TRANSACTIONS.name, transactions), stop)
    sent.labels += len(labels)
    sent.transactions += len(transactions)


def _merged(table: pl.DataFrame, labelled: bool, moved: int) -> Iterator[tuple[int, bool, Outgoing]]:
    """Transactions, with the labels of those seven days older in between."""
    waiting = _rows(table, moved) if labelled else iter(())
    due = next(waiting, None)
    for row in _rows(table, moved):
        while due is not None and due[1] + LABEL_DELAY <= row[1]:
            if due[5] is not None:
                yield due[1] + LABEL_DELAY, True, _label(due)
            due = next(waiting, None)
        yield row[1], False, _transaction(row)


def _rows(table: pl.DataFrame, moved: int) -> Iterator[tuple[str, int, str, str, int, int | None]]:
    columns = table.select(
        pl.col("TRANSACTION_ID").cast(pl.String),
        pl.col("TX_DATETIME").dt.epoch("us") + moved,
        pl.col("CUSTOMER_ID").cast(pl.String),
        pl.col("TERMINAL_ID").cast(pl.String),
        (pl.col("TX_AMOUNT") * 100).round().cast(pl.Int64),
        pl.col(LABEL).cast(pl.Int64) if LABEL in table.columns else pl.lit(None, pl.Int64).alias(LABEL),
    )
    yield from columns.iter_rows()


def _transaction(row: tuple[str, int, str, str, int, int | None]) -> Outgoing:
    return TRANSACTIONS.outgoing(TransactionMessage(row[0], rfc3339(row[1]), row[2], row[3], row[4]), SOURCE)


def _label(row: tuple[str, int, str, str, int, int | None]) -> Outgoing:
    return LABELS.outgoing(LabelMessage(row[0], rfc3339(row[1] + LABEL_DELAY), bool(row[5]), "replay"), SOURCE)
