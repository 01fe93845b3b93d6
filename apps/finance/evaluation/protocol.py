"""The protocol of the handbook: which rows train and which are tested.

Le Borgne et al., "Reproducible Machine Learning for Credit Card Fraud Detection", chapters 3 and 5:
7 days of training, 7 of delay in which labels become known, 7 of test; folds start 7 days apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
import polars as pl
from numpy.typing import NDArray

from apps.finance.errors import InputError

NO_DAY = -1_000_000
"""What stands for the day of a transaction without a label, so that no week holds it."""
TRAIN_DAYS = DELAY_DAYS = TEST_DAYS = STEP_DAYS = 7


@dataclass(frozen=True)
class Fold:
    """Row numbers of a fold in the table it was made from."""

    number: int
    start: date
    train: NDArray[np.int64]
    test: NDArray[np.int64]


def make_folds(table: pl.DataFrame, start: date, number: int, train_days: int = TRAIN_DAYS) -> list[Fold]:
    """`number` folds; fold k's training week starts 7 (k - 1) days after `start`.

    With `train_days` other than 7 the training rows are those of the `train_days` that end with that week.
    Left out of the test are the customers with a fraud in the training week and, on test day k, those with
    one up to seven days before it; transactions without a label are in neither. `table`: TX_DATETIME, CUSTOMER_ID, TX_FRAUD.
    Raises InputError where the table's labels do not reach as far as the folds.
    """
    day, labelled = table["TX_DATETIME"].dt.date(), table["TX_FRAUD"].is_not_null()
    if not labelled.any():
        raise InputError("the table has no transactions with a label (TX_FRAUD); expected the weeks of the folds")
    first, last = day.filter(labelled).min(), day.filter(labelled).max()
    assert isinstance(first, date)
    assert isinstance(last, date)
    numbers = np.where(labelled.to_numpy(), day.cast(pl.Int32).to_numpy().astype(np.int64), NO_DAY)
    customers, fraud = table["CUSTOMER_ID"].to_numpy(), table["TX_FRAUD"].to_numpy() == 1
    folds = []
    for index in range(number):
        week = start + timedelta(days=STEP_DAYS * index)
        begin, end = week + timedelta(days=TRAIN_DAYS - train_days), week + timedelta(days=TRAIN_DAYS + DELAY_DAYS + TEST_DAYS - 1)
        if begin < first or end > last:
            raise InputError(
                f"fold {index + 1} needs {begin} to {end}, the table holds labels of {first} to {last}; "
                "choose another --train-start, fewer --folds or fewer --train-days"
            )
        folds.append(_fold(index + 1, week, train_days, numbers, customers, fraud))
    return folds


def _fold(
    number: int, week: date, train_days: int, days: NDArray[np.int64], customers: NDArray[np.generic], fraud: NDArray[np.bool_]
) -> Fold:
    zero = (week - date(1970, 1, 1)).days
    train = np.flatnonzero((days >= zero + TRAIN_DAYS - train_days) & (days < zero + TRAIN_DAYS))
    known = set(customers[(days >= zero) & (days < zero + TRAIN_DAYS) & fraud].tolist())
    tests = []
    for k in range(TEST_DAYS):
        known |= set(customers[(days == zero + TRAIN_DAYS + k - 1) & fraud].tolist())
        rows = np.flatnonzero(days == zero + TRAIN_DAYS + DELAY_DAYS + k)
        left_out = np.isin(customers[rows], np.array(list(known), dtype=customers.dtype)) if known else np.zeros(len(rows), bool)
        tests.append(rows[~left_out])
    result = Fold(number, week, train, np.concatenate(tests))
    for name, chosen in (("training", result.train), ("test", result.test)):
        frauds = int(fraud[chosen].sum())
        if frauds < 2 or frauds == len(chosen):
            raise InputError(
                f"fold {number}: {len(chosen)} transactions for {name} with {frauds} frauds, expected at least two and some that are none "
                "(a test leaves out cards whose fraud is known by then): give a history with more frauds in its last weeks"
            )
    return result
