"""Simulated card transactions: customers, terminals, three kinds of fraud. It proves nothing about real cards.

The kinds are those that the Fraud Detection Handbook describes - an amount far above what anyone spends, a
terminal that copies cards, a stolen card - drawn by our own code. Days are made one after another, each from
its own seed, so memory does not grow with the number of rows and a day does not depend on how many follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.spatial import KDTree

from apps.finance.errors import InputError
from apps.finance.transactions.table import written_as_csv

DAY_SECONDS = 86_400
NOON_SECONDS, SPREAD_SECONDS = 13.5 * 3600, 4.5 * 3600
RATE = 2.0
"""Transactions of a customer a day, on average."""
NEAR_TERMINALS = 40
MEAN_AMOUNT = (5.0, 100.0)
LARGE_SHARE, LARGE_AMOUNT = 6e-4, (220.0, 400.0)
TERMINALS_A_DAY, TERMINAL_DAYS = 2e-4, 28
"""Share of the terminals that are newly compromised each day, and for how long: all their transactions are fraud."""
CARDS_A_DAY, CARD_DAYS, CARD_SHARE, CARD_FACTOR = 6e-4, 14, 1 / 3, 5.0
"""Share of the cards stolen each day, for how long, which share of their transactions is fraud, and the factor on amounts."""


@dataclass(frozen=True)
class Population:
    """How many customers and terminals there are."""

    customers: int
    terminals: int

    @classmethod
    def for_rows(cls, rows: int, days: int) -> Population:
        """So many that `days` give about `rows` transactions. Raises InputError where that can't be."""
        customers = round(rows / days / RATE)
        if customers < 1:
            raise InputError(
                f"{rows} transactions in {days} days are fewer than one customer makes; expected at least {round(days * RATE)}"
            )
        return cls(customers, max(1, 2 * customers))


class Generator:
    """Makes one day after another. Equal arguments make equal days. `intensity` multiplies the frauds of all kinds."""

    def __init__(self, population: Population, start: date, seed: int, intensity: float = 1.0) -> None:
        self._population, self._start, self._seed, self._intensity = population, start, seed, intensity
        generator = np.random.default_rng([seed, 0])
        homes, shops = generator.random((population.customers, 2)), generator.random((population.terminals, 2))
        near = min(NEAR_TERMINALS, population.terminals)
        self._near = KDTree(shops).query(homes, near)[1].reshape(population.customers, near).astype(np.int32)
        self._mean = generator.uniform(*MEAN_AMOUNT, population.customers)
        self._rate = generator.gamma(4.0, RATE / 4.0, population.customers)
        self._first = 0

    def days(self, number: int) -> Iterator[pl.DataFrame]:
        """`number` days as tables in the handbook's columns, in order of time; identifiers count up."""
        self._first = 0
        for day in range(number):
            table = self._day(day)
            self._first += len(table)
            yield table

    def _compromised(self, day: int, kind: int, total: int, share: float, length: int) -> NDArray[np.int64]:
        """Who is compromised on `day`: drawn on each of the last `length` days."""
        drawn = []
        for begun in range(max(0, day - length + 1), day + 1):
            generator = np.random.default_rng([self._seed, kind, begun])
            drawn.append(generator.choice(total, generator.poisson(self._intensity * share * total)))
        return np.unique(np.concatenate(drawn))

    def _day(self, day: int) -> pl.DataFrame:
        generator = np.random.default_rng([self._seed, 1, day])
        customers = np.repeat(np.arange(self._population.customers), generator.poisson(self._rate))
        number = len(customers)
        seconds = generator.normal(NOON_SECONDS, SPREAD_SECONDS, number) % DAY_SECONDS
        terminals = self._near[customers, generator.integers(0, self._near.shape[1], number)]
        mean = self._mean[customers]
        amount = np.abs(generator.normal(mean, mean / 2))
        large = generator.random(number) < self._intensity * LARGE_SHARE
        amount = np.where(large, generator.uniform(*LARGE_AMOUNT, number), np.minimum(amount, LARGE_AMOUNT[0]))
        scenario = np.where(large, 1, 0)
        bad = self._compromised(day, 2, self._population.terminals, TERMINALS_A_DAY, TERMINAL_DAYS)
        scenario[np.isin(terminals, bad)] = 2
        stolen = self._compromised(day, 3, self._population.customers, CARDS_A_DAY, CARD_DAYS)
        used = np.isin(customers, stolen) & (generator.random(number) < CARD_SHARE)
        amount, scenario = np.where(used, amount * CARD_FACTOR, amount), np.where(used, 3, scenario)
        order = np.argsort(seconds, kind="stable")
        midnight = datetime.combine(self._start + timedelta(days=day), time())
        micros = (seconds[order] * 1e6).astype(np.int64)
        return _table(self._first, midnight, micros, customers[order], terminals[order], amount[order], scenario[order])


def _table(
    first: int,
    midnight: datetime,
    micros: NDArray[np.int64],
    customers: NDArray[np.int64],
    terminals: NDArray[np.int32],
    amount: NDArray[np.float64],
    scenario: NDArray[np.int64],
) -> pl.DataFrame:
    zero = np.datetime64(midnight, "us")
    return pl.DataFrame(
        {
            "TRANSACTION_ID": np.arange(first, first + len(micros)),
            "TX_DATETIME": zero + micros.astype("timedelta64[us]"),
            "CUSTOMER_ID": customers.astype(np.int32),
            "TERMINAL_ID": terminals,
            "TX_AMOUNT": np.round(amount, 2),
            "TX_FRAUD": (scenario > 0).astype(np.int8),
            "TX_FRAUD_SCENARIO": scenario.astype(np.int8),
        }
    )


def write_days(population: Population, start: date, days: int, seed: int, path: Path) -> int:
    """Write `days` to a CSV or parquet file, as `written_as_csv`, a day at a time; the number of transactions."""
    import pyarrow.csv
    import pyarrow.parquet

    as_csv = written_as_csv(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    number, writer = 0, None
    try:
        for table in Generator(population, start, seed).days(days):
            arrow = table.to_arrow()
            if writer is None:
                open_parquet = partial(pyarrow.parquet.ParquetWriter, compression="zstd")
                writer = (pyarrow.csv.CSVWriter if as_csv else open_parquet)(path, arrow.schema)
            writer.write_table(arrow)
            number += len(table)
    finally:
        if writer is not None:
            writer.close()
    return number
