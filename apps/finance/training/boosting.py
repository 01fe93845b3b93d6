"""`fraud-boosting`: gradient-boosted trees (XGBoost).

Three settings decide on data with one fraud in a hundred: `base_score` 0.5 (the prior makes the first
hessians so small that no leaf may split), exact splits where the table allows (256 bins blur the thresholds),
and labels that are seven days old (the features see to that).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xgboost as xgb
from numpy.typing import NDArray

EXACT_ROWS = 150_000
"""Above this many rows splits come from a histogram of 4,096 bins."""


@dataclass(frozen=True)
class BoostingRecipe:
    """What a training run does; recorded in the model's card."""

    trees: int = 150
    learning_rate: float = 0.06
    depth: int = 4
    subsample: float = 0.7
    colsample: float = 0.5
    seed: int = 0


PROTOCOL_RECIPE = BoostingRecipe(trees=50, learning_rate=0.3, depth=3, subsample=1.0, colsample=1.0)
"""The book's choice of hyper-parameters for average precision."""


def train_boosting(features: NDArray[np.float32], labels: NDArray[np.int64], recipe: BoostingRecipe, threads: int) -> xgb.Booster:
    """A booster trained on `features` (N, F) and `labels` (N,) 0 or 1."""
    exact = len(features) <= EXACT_ROWS
    model = xgb.XGBClassifier(
        n_estimators=recipe.trees,
        learning_rate=recipe.learning_rate,
        max_depth=recipe.depth,
        subsample=recipe.subsample,
        colsample_bytree=recipe.colsample,
        base_score=0.5,
        tree_method="exact" if exact else "hist",
        random_state=recipe.seed,
        n_jobs=threads,
        **({} if exact else {"max_bin": 4096}),
    )
    return model.fit(features, labels).get_booster()


def predict_margin(booster: xgb.Booster, features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-odds (N,)."""
    return np.asarray(booster.inplace_predict(features, predict_type="margin"), np.float64)
