"""Trains both models and their combination on one set of transactions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import xgboost as xgb
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from apps.finance.errors import InputError
from apps.finance.scoring.combination import Combination
from apps.finance.training.boosting import BoostingRecipe, predict_margin, train_boosting
from apps.finance.training.sequence import SequenceEnsemble, SequenceRecipe, predict_logits, train_member

PARTS = 3
CALIBRATION_SEED = 20180401


@dataclass(frozen=True)
class Recipe:
    """Of both models."""

    boosting: BoostingRecipe = field(default_factory=BoostingRecipe)
    sequence: SequenceRecipe = field(default_factory=SequenceRecipe)


@dataclass(frozen=True)
class Trained:
    """Both models and their combination."""

    boosting: xgb.Booster
    sequence: SequenceEnsemble
    combination: Combination

    def log_odds(self, features: NDArray[np.float32], rows: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Log-odds of the transactions whose sequences are `rows` (N, LENGTH) of the table `features`."""
        boosting = predict_margin(self.boosting, features[rows[:, -1]])
        sequence = predict_logits(self.sequence, features, rows)
        return {"boosting": boosting, "sequence": sequence, "combination": self.combination.log_odds(boosting, sequence)}


def train_models(
    features: NDArray[np.float32],
    rows: NDArray[np.int64],
    labels: NDArray[np.int64],
    customers: NDArray[np.generic],
    known: NDArray[np.bool_],
    recipe: Recipe,
    threads: int,
) -> Trained:
    """Train on the transactions whose sequences are `rows` (N, LENGTH) of the table `features`.

    The customers are cut in three. Each part is scored by models that never saw it; the combination is fitted
    to these scores, on transactions of customers without a known fraud (`known` False): those are what a
    running system still decides on. The sequence model is the mean of its three members, the boosting is
    trained again on all. Raises InputError where there are too few frauds.
    """
    names, codes = np.unique(customers, return_inverse=True)
    part = np.random.default_rng(CALIBRATION_SEED).permutation(len(names))[codes] % PARTS
    if any(labels[part != k].sum() < 5 or labels[(part == k) & ~known].sum() < 1 for k in range(PARTS)):
        raise InputError(f"{int(labels.sum())} frauds among {len(labels)} transactions for training; expected a few dozen at least")
    current = np.ascontiguousarray(features[rows[:, -1]])
    boosting, sequence = np.empty(len(rows)), np.empty(len(rows))
    members = []
    for k in range(PARTS):
        seen, unseen = part != k, part == k
        boosting[unseen] = predict_margin(train_boosting(current[seen], labels[seen], recipe.boosting, threads), current[unseen])
        member = train_member(features, rows[seen], labels[seen], recipe.sequence, recipe.sequence.seed + k, threads)
        sequence[unseen] = predict_logits(member, features, rows[unseen])
        members.append(member)
    fresh = ~known
    combination = fit_combination(boosting[fresh], sequence[fresh], labels[fresh])
    return Trained(train_boosting(current, labels, recipe.boosting, threads), SequenceEnsemble(members), combination)


def fit_combination(boosting: NDArray[np.float64], sequence: NDArray[np.float64], labels: NDArray[np.int64]) -> Combination:
    """Logistic regression of the labels on the two log-odds; a model with a negative weight is left out."""
    columns = {"boosting": boosting, "sequence": sequence}
    while True:
        model = LogisticRegression(C=100.0).fit(np.column_stack(list(columns.values())), labels)
        weights = dict(zip(columns, model.coef_[0], strict=True))
        worst = min(weights, key=lambda name: weights[name])
        if weights[worst] >= 0 or len(columns) == 1:
            break
        del columns[worst]
    return Combination(float(weights.get("boosting", 0)), float(weights.get("sequence", 0)), float(model.intercept_[0]))


def known_compromised(
    customers: NDArray[np.generic], days: NDArray[np.int64], fraud: NDArray[np.bool_], delay: int = 7, memory: int = 14
) -> NDArray[np.bool_]:
    """Whether, at each transaction, its customer had a fraud `delay` to `memory` days ago, whose label is known by then."""
    compromised = {(c, d) for c, d in zip(customers[fraud].tolist(), days[fraud].tolist(), strict=True)}
    blocked = {(c, d + ahead) for c, d in compromised for ahead in range(delay, memory + 1)}
    return np.fromiter(((c, d) in blocked for c, d in zip(customers.tolist(), days.tolist(), strict=True)), bool, len(days))
