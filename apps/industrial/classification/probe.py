"""What labelled defects say of the whole image: logistic regression on the features that the statistics of good parts are made of.

It looks at what the shipped network describes, where the network that learned from the defects has left it; the two err on
different parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apps.industrial.classification.kinds import standardised_regression

Array = NDArray[np.float32]
SAY, ENOUGH = 0.2, 5
"""Its share of the score from ENOUGH defects on."""
LEAST_SPREAD = 0.5
"""Of the logits of good parts: a handful that is held back can lie close together by chance."""


@dataclass(frozen=True)
class Probe:
    """Standardised features -> a defect's logit. `mean`, `scale`, `weights` (D,); `usual`: median and deviation on unseen good parts;
    `share` (1,): of the score."""

    mean: Array
    scale: Array
    weights: Array
    usual: Array
    share: Array

    @classmethod
    def fit(cls, good: Array, defective: Array, unseen: Array) -> Probe:
        """From what is described of good parts, of defective ones and of good ones that are held back: (N, D) each."""
        labels = ["a good part"] * len(good) + ["defective"] * len(defective)
        mean, scale, model = standardised_regression(np.concatenate([good, defective]), labels)
        share = SAY * min(1.0, len(defective) / ENOUGH)
        probe = cls(*(np.asarray(v, np.float32) for v in (mean, scale, model.coef_[0], (0, 1), (share,))))
        logits = probe.scores(unseen)
        usual = np.array([np.median(logits), max(logits.std(), LEAST_SPREAD)], np.float32)
        return cls(probe.mean, probe.scale, probe.weights, usual, probe.share)

    def scores(self, whole: Array) -> Array:
        """(N, D) -> (N,): 0 for a usual good part, in deviations of good parts."""
        logits = ((whole - self.mean) / self.scale) @ self.weights
        return np.asarray((logits - self.usual[0]) / self.usual[1], np.float32)

    def joined(self, scores: Array, whole: Array) -> Array:
        """(N,) `scores` with its own say in them."""
        return np.asarray((1 - self.share) * scores + self.share * self.scores(whole), np.float32)

    def arrays(self) -> dict[str, Array]:
        """For storage."""
        return {f"probe_{name}": getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_arrays(cls, stored: Mapping[str, Array]) -> Probe | None:
        """From what `arrays` gave; None where nothing was learned from defects."""
        if "probe_weights" not in stored:
            return None
        return cls(*(stored[f"probe_{name}"] for name in cls.__dataclass_fields__))
