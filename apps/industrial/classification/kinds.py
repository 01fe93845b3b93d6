"""Names the kind of a defect: logistic regression on the image's embedding, from a handful of samples a kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

Array = NDArray[np.float32]
STRENGTH = 0.01
"""Inverse of the regularisation: the features are many and the samples few."""


def standardised_regression(x: Array, labels: Sequence[str]) -> tuple[Array, Array, LogisticRegression]:
    """Mean and scale of features (N, D), and the regression of what they standardise to; rare labels weigh as much as frequent ones."""
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-3
    return mean, scale, LogisticRegression(C=STRENGTH, max_iter=500, class_weight="balanced").fit((x - mean) / scale, list(labels))


@dataclass(frozen=True)
class KindClassifier:
    """Standardised embedding -> probability of each kind. `weights` (K, D), `bias` (K,)."""

    names: tuple[str, ...]
    mean: Array
    scale: Array
    weights: Array
    bias: Array

    @classmethod
    def fit(cls, embedding: Array, labels: Sequence[str]) -> KindClassifier:
        """From (N, D) embeddings and their kinds, two kinds at least."""
        mean, scale, model = standardised_regression(embedding, labels)
        weights, bias = model.coef_, model.intercept_
        if len(model.classes_) == 2:
            weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
        names = tuple(str(name) for name in model.classes_)
        return cls(names, *(np.asarray(v, np.float32) for v in (mean, scale, weights, bias)))

    def probabilities(self, embedding: Array) -> Array:
        """(N, D) -> (N, K)."""
        logits = ((embedding - self.mean) / self.scale) @ self.weights.T + self.bias
        each = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(each / each.sum(axis=1, keepdims=True), np.float32)

    def arrays(self) -> dict[str, Array]:
        """For storage."""
        return {f"kinds_{name}": getattr(self, name) for name in ("mean", "scale", "weights", "bias")}

    @classmethod
    def from_arrays(cls, stored: Mapping[str, Array], names: tuple[str, ...]) -> KindClassifier:
        """From what `arrays` gave."""
        return cls(names, *(stored[f"kinds_{name}"] for name in ("mean", "scale", "weights", "bias")))
