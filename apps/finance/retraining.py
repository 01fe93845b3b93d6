"""Trains both models on a whole history: the protocol's table first, then the models that are shipped or installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from apps.finance.errors import InputError
from apps.finance.evaluation.protocol import DELAY_DAYS, STEP_DAYS, TEST_DAYS, TRAIN_DAYS
from apps.finance.training.export import write_models
from apps.finance.training.prepared import Prepared
from apps.finance.training.train import Recipe, train_models
from apps.finance.transactions.table import read_transactions
from shared_runtime.host import host

Evaluate = Callable[[Path, date, int, int], tuple[dict[str, Any], Any]]


def last_start(table: pl.DataFrame, folds: int) -> date:
    """The training week's first day of the first of the last `folds` folds that `table` has room for."""
    last = table["TX_DATETIME"].dt.date().max()
    assert isinstance(last, date)
    return last - timedelta(days=TRAIN_DAYS + DELAY_DAYS + TEST_DAYS - 1 + STEP_DAYS * (folds - 1))


def train_and_write(
    transactions: Path, out: Path, *, days: int, folds: int, about: dict[str, str], evaluate: Evaluate, cores: int
) -> dict[str, Any]:
    """Evaluate on the last folds, train on the last `days` of `transactions`, write both model folders to `out`.

    Raises InputError where the history is too short.
    """
    table = read_transactions(transactions, labelled=True)
    first, last = (table["TX_DATETIME"].dt.date().min(), table["TX_DATETIME"].dt.date().max()) if len(table) else (None, None)
    if not isinstance(first, date) or not isinstance(last, date) or last_start(table, folds) < first:
        need = TRAIN_DAYS + DELAY_DAYS + TEST_DAYS + STEP_DAYS * (folds - 1)
        raise InputError(f"{transactions.name} holds {first!s} to {last!s}; {folds} folds need {need} days of history: take fewer --folds")
    start = last_start(table, folds)
    room = (start - first).days + TRAIN_DAYS
    result, _ = evaluate(transactions, start, folds, min(days, room))
    data = Prepared(table)
    newest = int(data.days.max())
    chosen = np.flatnonzero(data.days > newest - days)
    recipe = Recipe()
    trained = train_models(data.features, data.rows[chosen], data.labels[chosen], data.customers[chosen], data.known[chosen], recipe, cores)
    period = f"{date.fromordinal(719163 + int(data.days[chosen[0]]))} to {last}"
    card = {
        **about,
        "period": period,
        "transactions": f"{len(chosen)}, {int(data.labels[chosen].sum())} of them frauds",
        "command": f"triscope finance train --transactions FILE --out DIR --days {days} --folds {folds}",
        "where": host().cpu,
        "protocol": f"handbook: folds from {start}, {folds} of them, {min(days, room)} days of training, 7 of delay, 7 of test",
    }
    write_models(trained, out, recipe, result, card)
    return {**result, "model": {"recipe": asdict(recipe), "period": period}}
