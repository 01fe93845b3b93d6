"""Metrics of rankings and probabilities on card transactions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

Values = NDArray[np.float64]
SCENARIOS = {1: "amount", 2: "terminal", 3: "customer"}


def auc_roc(fraud: Values, score: Values) -> float:
    """Area under the ROC curve; NaN where there is one class only."""
    return float(roc_auc_score(fraud, score)) if 0 < fraud.sum() < len(fraud) else float("nan")


def average_precision(fraud: Values, score: Values) -> float:
    """Average precision (the step-wise area under precision-recall); NaN without a fraud."""
    return float(average_precision_score(fraud, score)) if fraud.sum() else float("nan")


def card_precision(table: pl.DataFrame, score: str = "score", k: int = 100) -> tuple[list[float], list[float]]:
    """Card precision@k and its ceiling, a value a day.

    A day's k cards with the highest maximal score are looked at; the share that is compromised is the
    precision, and cards found compromised are left out from then on. The ceiling is what a perfect score
    gets. `table`: TX_DATETIME, CUSTOMER_ID, TX_FRAUD and `score`. Handbook, chapter 4 (card precision top-k).
    """
    return _card_precision(table, score, k), _card_precision(table, "TX_FRAUD", k)


def _card_precision(table: pl.DataFrame, score: str, k: int) -> list[float]:
    found: list[object] = []
    result = []
    cards = (
        table.group_by(pl.col("TX_DATETIME").dt.date().alias("day"), "CUSTOMER_ID")
        .agg(pl.col("TX_FRAUD").max().alias("fraud"), pl.col(score).max().alias("score"))
        .sort("score", "CUSTOMER_ID", descending=[True, False])
    )
    for day in cards["day"].unique().sort():
        looked_at = cards.filter((pl.col("day") == day) & ~pl.col("CUSTOMER_ID").is_in(found)).head(k)
        result.append(float(looked_at["fraud"].sum()) / k)
        found += looked_at.filter(pl.col("fraud") > 0)["CUSTOMER_ID"].to_list()
    return result


def brier(fraud: Values, probability: Values) -> float:
    """Mean squared difference of probability and outcome (Brier 1950)."""
    return float(np.mean((probability - fraud) ** 2))


def reliability(fraud: Values, probability: Values, bins: int = 10) -> list[dict[str, float]]:
    """Mean probability and share of frauds where scores are cut at 0.001, 0.003, ... and evenly above 0.1."""
    edges = np.array([0, 0.001, 0.003, 0.01, 0.03, 0.1, *np.linspace(0.1, 1, bins)[1:]])
    place = np.clip(np.searchsorted(edges, probability, side="right") - 1, 0, len(edges) - 2)
    rows = []
    for index in range(len(edges) - 1):
        inside = place == index
        if inside.any():
            rows.append(
                {
                    "from": float(edges[index]),
                    "to": float(edges[index + 1]),
                    "transactions": int(inside.sum()),
                    "mean_score": float(probability[inside].mean()),
                    "fraud_share": float(fraud[inside].mean()),
                }
            )
    return rows


def day_bootstrap(
    days: NDArray[np.int64], statistic: Callable[[NDArray[np.int64]], float], repeats: int = 200, seed: int = 0
) -> list[float]:
    """95 % interval of `statistic(rows)` when whole days are drawn with replacement: transactions of a day hang together."""
    generator = np.random.default_rng(seed)
    known = np.unique(days)
    by_day = {day: np.flatnonzero(days == day) for day in known}
    values = []
    for _ in range(repeats):
        rows = np.concatenate([by_day[day] for day in generator.choice(known, len(known))])
        values.append(statistic(rows))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [float(low), float(high)]
