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


def train_and_write(
    transactions: Path, out: Path, *, days: int, folds: int, about: dict[str, str], evaluate: Evaluate, cores: int
) -> dict[str, Any]:
    """Evaluate on the last folds, train on the last `days` of labels in `transactions`, write both model folders to `out`.

    Raises InputError where the labelled history is too short.
    """
    table = read_transactions(transactions, labelled=True)
    labelled = table.filter(pl.col("TX_FRAUD").is_not_null())["TX_DATETIME"].dt.date()
    first, last = labelled.min(), labelled.max()
    need = TRAIN_DAYS + DELAY_DAYS + TEST_DAYS + STEP_DAYS * (folds - 1)
    if not isinstance(first, date) or not isinstance(last, date):
        raise InputError(f"{transactions.name} holds no label (TX_FRAUD is 0 or 1); {folds} folds need {need} days of labelled history")
    start = last - timedelta(days=need - 1)
    if start < first:
        wanted = f"{folds} folds need {need} days: take fewer --folds or" if folds > 1 else f"one fold needs {need} days:"
        raise InputError(f"{transactions.name} holds labels of {first} to {last}; {wanted} give a longer history")
    room = (start - first).days + TRAIN_DAYS
    result, _ = evaluate(transactions, start, folds, min(days, room))
    data = Prepared(table)
    newest = int(data.days[data.labelled].max())
    chosen = np.flatnonzero(data.labelled & (data.days > newest - days))
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
