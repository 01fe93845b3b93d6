"""The features as a batch over a whole table: equal to the stream's on every row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

import numpy as np
import polars as pl
from numpy.typing import NDArray

from apps.finance.features.schema import (
    CUSTOMER_SPAN,
    DAY,
    FEATURES,
    FLOOR_MINOR,
    HIGH,
    LABEL_DELAY,
    NEVER_DAYS,
    TERMINAL,
    WINDOWS_DAYS,
)

Ints = NDArray[np.int64]
Columns = dict[str, NDArray[np.float64]]


class _Grouped:
    """The rows of a table in order of (entity, time, id), with the windows that end at each row."""

    def __init__(self, table: pl.DataFrame, key: str) -> None:
        order = table.select(pl.col(key), pl.col("time"), pl.col("row"))
        self.table = order.sort(key, "row", maintain_order=True).with_row_index("position")
        self.key = key
        self.rows = self.table["row"].to_numpy()
        self.time: Ints = self.table["time"].to_numpy()
        self.position: Ints = np.arange(len(self.time))
        self.first: Ints = self.table.select(pl.col("position").min().over(key))["position"].to_numpy().astype(np.int64)

    def start(self, delta: int) -> Ints:
        """For each row the first position of its entity with a time after `time - delta`."""
        left = self.table.select(self.key, pl.col("time") - delta, pl.col("position").alias("at")).sort("time", maintain_order=True)
        right = self.table.select(self.key, "time", pl.col("position").alias("last")).sort("time", maintain_order=True)
        joined = left.join_asof(right, on="time", by=self.key, strategy="backward", check_sortedness=False).sort("at")
        last = joined["last"].cast(pl.Int64).fill_null(-1).to_numpy()
        return np.where(last < 0, self.first, last + 1)

    def scatter(self, columns: Columns) -> Columns:
        """The columns in the table's own row order."""
        result: Columns = {}
        for name, values in columns.items():
            result[name] = np.empty(len(values), np.float64)
            result[name][self.rows] = values
        return result


def batch_features(transactions: pl.DataFrame) -> pl.DataFrame:
    """`transactions` in order of (TX_DATETIME, TRANSACTION_ID), with the schema's features appended as float64.

    Columns read: TRANSACTION_ID, TX_DATETIME, CUSTOMER_ID, TERMINAL_ID, TX_AMOUNT [major units, 2 decimals] and
    TX_FRAUD (0 or 1; a missing label counts as 0, as it does in the stream).
    """
    ordered = transactions.sort("TX_DATETIME", "TRANSACTION_ID", maintain_order=True)
    fraud = pl.col("TX_FRAUD").fill_null(0).cast(pl.Int64) if "TX_FRAUD" in ordered.columns else pl.lit(0, pl.Int64)
    table = ordered.select(
        "CUSTOMER_ID",
        "TERMINAL_ID",
        pl.col("TX_DATETIME").dt.epoch("us").alias("time"),
        (pl.col("TX_AMOUNT") * 100).round().cast(pl.Int64).alias("amount"),
        fraud.alias("fraud"),
    ).with_row_index("row")
    calendar = ordered.select(
        (pl.col("TX_DATETIME").dt.weekday() >= 6).cast(pl.Float64).alias("TX_DURING_WEEKEND"),
        (pl.col("TX_DATETIME").dt.hour() <= 6).cast(pl.Float64).alias("TX_DURING_NIGHT"),
    )
    columns: Columns = {name: calendar[name].to_numpy() for name in calendar.columns}
    columns["TX_AMOUNT"] = table["amount"].to_numpy() / 100
    if len(ordered):
        columns |= _customer(table)
        columns |= _terminal(table, columns["AMOUNT_TO_MEDIAN"] > HIGH)
    else:
        columns |= {name: np.empty(0) for name in FEATURES}
    return ordered.with_columns(pl.Series(name, columns[name]) for name in FEATURES)


def _customer(table: pl.DataFrame) -> Columns:
    grouped = _Grouped(table, "CUSTOMER_ID")
    amount: Ints = table["amount"].to_numpy()[grouped.rows]
    total = np.concatenate([[0], np.cumsum(amount)])
    end = grouped.position
    columns: Columns = {}
    for days in WINDOWS_DAYS:
        start = grouped.start(days * DAY)
        number = end - start + 1
        columns[f"CUSTOMER_ID_NB_TX_{days}DAY_WINDOW"] = number.astype(np.float64)
        columns[f"CUSTOMER_ID_AVG_AMOUNT_{days}DAY_WINDOW"] = (total[end + 1] - total[start]) / number / 100
    median, upper = _quartiles(amount, grouped.start(CUSTOMER_SPAN), end)
    floor = np.maximum(median, FLOOR_MINOR)
    columns |= {"AMOUNT_TO_MEDIAN": amount / floor, "AMOUNT_TO_UPPER_QUARTILE": amount / np.maximum(upper, FLOOR_MINOR)}
    for days in (1, 7, 14):
        columns[f"CUSTOMER_MAX_TO_MEDIAN_{days}DAY"] = _largest(amount, grouped.start(days * DAY), end) / floor
    return grouped.scatter(columns)


def _quartiles(amount: Ints, start: Ints, end: Ints) -> tuple[Ints, Ints]:
    """Lower median and upper quartile of `amount` in each of the windows [start, end), which move on; the row's own where one is empty."""
    amounts = amount.tolist()
    median, upper, window = amount.copy(), amount.copy(), list[int]()
    first = last = 0
    for row, (low, high) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        if low >= last:
            window, first, last = [], low, low
        for at in range(first, low):
            del window[bisect_left(window, amounts[at])]
        for at in range(last, high):
            insort(window, amounts[at])
        first, last = low, high
        if window:
            median[row], upper[row] = window[(high - low - 1) // 2], window[(high - low - 1) * 3 // 4]
    return median, upper


def _largest(amount: Ints, start: Ints, end: Ints) -> Ints:
    """The largest of `amount` in each of the windows [start, end), which move on; 0 where one is empty."""
    amounts = amount.tolist()
    found, falling = np.zeros_like(amount), deque[int]()
    last = 0
    for row, (low, high) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        for at in range(max(last, low), high):
            while falling and amounts[falling[-1]] <= amounts[at]:
                falling.pop()
            falling.append(at)
        last = high
        while falling and falling[0] < low:
            falling.popleft()
        if falling:
            found[row] = amounts[falling[0]]
    return found


def _terminal(table: pl.DataFrame, high: NDArray[np.bool_]) -> Columns:
    grouped = _Grouped(table, "TERMINAL_ID")
    fraud = table["fraud"].to_numpy()[grouped.rows] == 1
    ordinary = fraud & ~high[grouped.rows]
    time, at = grouped.time, grouped.position
    frauds, ordinaries = (np.concatenate([[0], np.cumsum(flags)]) for flags in (fraud, ordinary))
    end = np.maximum(grouped.start(LABEL_DELAY), grouped.first)
    columns: Columns = {}
    start = end
    for days in WINDOWS_DAYS:
        start = grouped.start(LABEL_DELAY + days * DAY)
        number = end - start
        columns[f"TERMINAL_ID_NB_TX_{days}DAY_WINDOW"] = number.astype(np.float64)
        genuine_share = (number - (frauds[end] - frauds[start])) / np.maximum(number, 1)
        columns[f"TERMINAL_ID_RISK_{days}DAY_WINDOW"] = np.where(number > 0, 1 - genuine_share, 0.0)

    def days_since(place: Ints, known: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.where(known, (time - time[np.clip(place, 0, len(time) - 1)]) / DAY, NEVER_DAYS)

    def latest(flags: NDArray[np.bool_]) -> Ints:
        """For each position the last one up to it that is flagged, or -1."""
        return np.maximum.accumulate(np.where(flags, at, -1))

    last, some = np.maximum(end - 1, 0), end > start
    any_fraud, genuine = latest(fraud)[last], latest(~fraud)[last]
    run = np.where(some, end - 1 - np.maximum(genuine, start - 1), 0)
    values = (
        (ordinaries[end] - ordinaries[start]).astype(np.float64),
        ((frauds[end] - frauds[start]) - (ordinaries[end] - ordinaries[start])).astype(np.float64),
        days_since(any_fraud, some & (any_fraud >= start)),
        days_since(genuine, some & (genuine >= start)),
        run.astype(np.float64),
        days_since(end - run, run > 0),
    )
    return grouped.scatter(columns | dict(zip(TERMINAL, values, strict=True)))
