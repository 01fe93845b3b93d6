"""The customer's last transactions as the sequence model sees them."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from apps.finance.features.schema import CUSTOMER_SPAN, FEATURES

LENGTH = 8
"""Transactions in a sequence: the present one, last, and up to seven before it within 30 days."""
BLOCK = 1024
NEVER = np.iinfo(np.int64).min // 2


def sequence_rows(table: pl.DataFrame) -> NDArray[np.int64]:
    """(N, LENGTH) row numbers of each transaction's sequence, oldest first, -1 where there is none.

    `table`: in order of (TX_DATETIME, TRANSACTION_ID), as `batch_features` returns it.
    """
    order = table.select("CUSTOMER_ID", pl.col("TX_DATETIME").dt.epoch("us").alias("time")).with_row_index("row")
    grouped = order.sort("CUSTOMER_ID", "row").with_row_index("position")
    first = grouped.select(pl.col("position").min().over("CUSTOMER_ID"))["position"].to_numpy().astype(np.int64)
    rows, time = grouped["row"].to_numpy().astype(np.int64), grouped["time"].to_numpy()
    at = np.arange(len(rows))[:, None] - np.arange(LENGTH - 1, -1, -1)
    valid = (at >= first[:, None]) & (time[:, None] - time[np.maximum(at, 0)] < CUSTOMER_SPAN)
    result = np.empty((len(rows), LENGTH), np.int64)
    result[rows] = np.where(valid, rows[np.maximum(at, 0)], -1)
    return result


def gather(features: NDArray[np.float32], rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The sequences of `rows` (N, LENGTH): values (N, LENGTH, len(FEATURES)) and mask (N, LENGTH), zero where there is none."""
    valid = rows >= 0
    values = features[np.maximum(rows, 0)] * valid[:, :, None]
    return values.astype(np.float32), valid.astype(np.float32)


class SequenceState:
    """The last transactions' features of every customer, in blocks that many customers share."""

    def __init__(self) -> None:
        self._slots: dict[object, int] = {}
        self._free: list[int] = []
        self._blocks: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []

    def sequence(self, customer: object, time: int, features: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Values (LENGTH, len(FEATURES)) and mask (LENGTH,) with the present transaction last; it is remembered."""
        slot = self._slots.get(customer)
        if slot is None:
            slot = self._slots[customer] = self._take()
        block_times, block_values = self._blocks[slot // BLOCK]
        times, past = block_times[slot % BLOCK], block_values[slot % BLOCK]
        mask = np.ones(LENGTH, np.float32)
        mask[:-1] = times > time - CUSTOMER_SPAN
        values = np.concatenate((past, features[None])) * mask[:, None]
        times[:-1], past[:-1] = times[1:], past[1:]
        times[-1], past[-1] = time, features
        return values, mask

    def forget(self, before: int) -> None:
        """Drop customers whose last transaction is older than `before` [us] less their span."""
        for customer, slot in list(self._slots.items()):
            times, values = (block[slot % BLOCK] for block in self._blocks[slot // BLOCK])
            if times[-1] < before - CUSTOMER_SPAN:
                times[:], values[:] = NEVER, 0
                self._free.append(self._slots.pop(customer))

    def _take(self) -> int:
        if not self._free:
            first = len(self._blocks) * BLOCK
            past = LENGTH - 1
            self._blocks.append((np.full((BLOCK, past), NEVER), np.zeros((BLOCK, past, len(FEATURES)), np.float32)))
            self._free.extend(range(first + BLOCK - 1, first - 1, -1))
        return self._free.pop()
