"""The protocol's table for both models: trains on each fold, scores its test week, measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import date
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from apps.finance.evaluation.metrics import (
    SCENARIOS,
    auc_roc,
    average_precision,
    brier,
    card_precision,
    day_bootstrap,
    reliability,
)
from apps.finance.evaluation.protocol import TRAIN_DAYS, Fold, make_folds
from apps.finance.features.schema import HANDBOOK, INDEX
from apps.finance.scoring.combination import sigmoid
from apps.finance.training.boosting import PROTOCOL_RECIPE, predict_margin, train_boosting
from apps.finance.training.prepared import Prepared
from apps.finance.training.train import Recipe, train_models
from apps.finance.transactions.table import SCENARIO

BUDGET = 100
ROWS = ("protocol", "boosting", "sequence", "combination")
"""The protocol's 15 features with the book's hyper-parameters; our features in each model alone; both together."""
Result = dict[str, Any]


def evaluate(
    transactions: pl.DataFrame,
    start: date,
    *,
    number: int,
    train_days: int = TRAIN_DAYS,
    recipe: Recipe | None = None,
    threads: int = 2,
    watch: Callable[[Iterable[Fold]], Iterable[Fold]] = lambda folds: folds,
) -> tuple[Result, pl.DataFrame]:
    """The metrics and the scores (TRANSACTION_ID, fold, score) of `number` folds from `start` on.

    Raises InputError where the table does not reach as far, or has no frauds.
    """
    data = Prepared(transactions)
    folds = make_folds(data.table, start, number, train_days)
    columns = [INDEX[name] for name in HANDBOOK]
    by_fold, scored = [], []
    for fold in watch(folds):
        train, test = data.rows[fold.train], data.rows[fold.test]
        labels = data.labels[fold.train]
        trained = train_models(
            data.features, train, labels, data.customers[fold.train], data.known[fold.train], recipe or Recipe(), threads
        )
        log_odds = trained.log_odds(data.features, test)
        book = train_boosting(np.ascontiguousarray(data.features[fold.train][:, columns]), labels, PROTOCOL_RECIPE, threads)
        log_odds["protocol"] = predict_margin(book, np.ascontiguousarray(data.features[fold.test][:, columns]))
        table = data.table[fold.test].select("TRANSACTION_ID", "TX_DATETIME", "CUSTOMER_ID", "TX_FRAUD", *_scenario(data.table))
        table = table.with_columns(pl.Series(name, sigmoid(log_odds[name])) for name in ROWS)
        by_fold.append({"fold": fold.number, "train_start": fold.start.isoformat(), **_sizes(data, fold), **_measure(table)})
        scored.append(table.with_columns(pl.lit(fold.number).alias("fold")))
    together = pl.concat(scored)
    return _summary(by_fold, together), together.select("TRANSACTION_ID", "fold", pl.col("combination").alias("score"))


def _scenario(table: pl.DataFrame) -> list[str]:
    return [SCENARIO] if SCENARIO in table.columns else []


def _sizes(data: Prepared, fold: Fold) -> Result:
    return {
        "train_transactions": len(fold.train),
        "train_frauds": int(data.labels[fold.train].sum()),
        "test_transactions": len(fold.test),
        "test_frauds": int(data.labels[fold.test].sum()),
    }


def _measure(table: pl.DataFrame) -> Result:
    """The metrics of every row of the table on one fold's test week."""
    return {"models": {name: _metrics(table, name) for name in ROWS}}


def _metrics(table: pl.DataFrame, name: str) -> Result:
    fraud, score = table["TX_FRAUD"].to_numpy().astype(np.float64), table[name].to_numpy()
    precision, ceiling = card_precision(table, name, BUDGET)
    result: Result = {
        "auc_roc": auc_roc(fraud, score),
        "average_precision": average_precision(fraud, score),
        f"card_precision_at_{BUDGET}": float(np.mean(precision)),
        f"card_precision_at_{BUDGET}_ceiling": float(np.mean(ceiling)),
        "brier": brier(fraud, score),
    }
    if SCENARIO in table.columns:
        alerted = _alerted(table, name)
        result["average_precision_by_scenario"], result["recall_by_scenario"] = {}, {}
        kinds = table[SCENARIO].to_numpy()
        for number, scenario in SCENARIOS.items():
            chosen = (kinds == number) | (fraud == 0)
            if (kinds == number).any():
                result["average_precision_by_scenario"][scenario] = average_precision(fraud[chosen], score[chosen])
                result["recall_by_scenario"][scenario] = float(alerted[kinds == number].mean())
    return result


def _alerted(table: pl.DataFrame, name: str) -> NDArray[np.bool_]:
    """The day's BUDGET highest scores, for recall."""
    rank = table.select(pl.col(name).rank("ordinal", descending=True).over(pl.col("TX_DATETIME").dt.date()))[name]
    return rank.to_numpy() <= BUDGET


def _mean(values: list[Any]) -> Any:
    """Mean over folds, also of nested results."""
    if isinstance(values[0], dict):
        return {key: _mean([v[key] for v in values if key in v]) for key in values[0]}
    return float(np.nanmean(values))


def _summary(by_fold: list[Result], together: pl.DataFrame) -> Result:
    rows = {name: _mean([fold["models"][name] for fold in by_fold]) for name in ROWS}
    parts = together.partition_by("fold", maintain_order=True)
    for name in ROWS:
        rows[name]["intervals"] = _intervals(parts, name)
    best = rows["combination"]
    fraud, score = together["TX_FRAUD"].to_numpy().astype(np.float64), together["combination"].to_numpy()
    metrics = {key: value for key, value in best.items() if key != "intervals"}
    metrics |= {f"{name}_interval": interval for name, interval in best["intervals"].items()}
    return {"metrics": metrics, "table": rows, "folds": by_fold, "reliability": reliability(fraud, score)}


def _intervals(parts: list[pl.DataFrame], name: str) -> Result:
    """95 % intervals of the mean over folds, days drawn with replacement inside each."""
    found: Result = {}
    statistics: dict[str, Callable[[NDArray[np.float64], NDArray[np.float64]], float]] = {
        "auc_roc": auc_roc,
        "average_precision": average_precision,
    }
    table = pl.concat(parts)
    fold = table["fold"].to_numpy()
    fraud, score = table["TX_FRAUD"].to_numpy().astype(np.float64), table[name].to_numpy()
    days = table["TX_DATETIME"].dt.date().cast(pl.Int32).to_numpy().astype(np.int64) + 100_000 * fold
    for metric, statistic in statistics.items():

        def mean_over_folds(rows: NDArray[np.int64], statistic: Callable[..., float] = statistic) -> float:
            return float(np.nanmean([statistic(fraud[r], score[r]) for k in np.unique(fold) if len(r := rows[fold[rows] == k])]))

        found[metric] = day_bootstrap(days, mean_over_folds)
    daily = np.concatenate([card_precision(part, name, BUDGET)[0] for part in parts])
    generator = np.random.default_rng(0)
    draws = [float(generator.choice(daily, len(daily)).mean()) for _ in range(1000)]
    found[f"card_precision_at_{BUDGET}"] = [float(v) for v in np.percentile(draws, [2.5, 97.5])]
    return found
