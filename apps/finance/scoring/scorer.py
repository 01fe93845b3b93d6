"""Scores transactions with both models through the runtime, and says why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import shared_runtime as rt
from apps.finance.errors import ModelMismatchError
from apps.finance.features.schema import FEATURES, VERSION
from apps.finance.messages import Reason
from apps.finance.scoring.combination import Combination, logit, sigmoid
from apps.finance.scoring.reasons import Explainer, reason_text

BOOSTING, SEQUENCE = "fraud-boosting", "fraud-sequence"
REASONS = 4
"""So many of the features that raise a score most are given as reasons."""


@dataclass(frozen=True)
class Scores:
    """Probabilities of fraud (N,), the two models' own, and the sequence model's attention (N, LENGTH)."""

    probability: NDArray[np.float64]
    boosting: NDArray[np.float64]
    sequence: NDArray[np.float64]
    attention: NDArray[np.float32]


class FraudScorer:
    """Both models in sessions of the runtime, their combination, and the boosting's exact TreeSHAP."""

    def __init__(self, boosting: rt.Session, sequence: rt.Session, combination: Combination, explainer: Explainer) -> None:
        for session in (boosting, sequence):
            version = session.model.card.get("features", {}).get("version")
            if version != VERSION:
                raise ModelMismatchError(
                    f"model {session.model.name!r} was trained on features version {version!r}, this installation computes {VERSION!r}; "
                    "train it again with 'triscope finance train'"
                )
            if combination.members.get(session.model.name) != session.model.sha256:
                raise ModelMismatchError(
                    f"the combination was fitted to another {session.model.name!r} than the one installed; install both models together"
                )
        self.boosting, self.sequence, self.combination, self._explainer = boosting, sequence, combination, explainer

    @property
    def name(self) -> str:
        """Names and versions of the models, for decisions."""
        return "+".join(f"{s.model.name} {s.model.version}" for s in (self.boosting, self.sequence))

    def score(self, features: NDArray[np.float32], sequences: NDArray[np.float32], mask: NDArray[np.float32]) -> Scores:
        """Scores of `features` (N, F) whose customers' sequences are `sequences` (N, LENGTH, F) under `mask` (N, LENGTH)."""
        trees = self.boosting.run({"features": features})["probability"].reshape(-1).astype(np.float64)
        answer = self.sequence.run({"sequence": sequences, "mask": mask})
        logits = answer["logit"].reshape(-1).astype(np.float64)
        return Scores(self.combination.probability(logit(trees), logits), trees, sigmoid(logits), answer["attention"])

    def reasons(self, features: NDArray[np.float32], values: NDArray[np.float64]) -> list[list[Reason]]:
        """For each of `features` (N, F) what raised its score most, in the analyst's words.

        `values`: the same features in double precision, as they are shown.
        """
        contributions = self._explainer.contributions(features) * self.combination.boosting
        answers = []
        for row, value in zip(contributions, values, strict=True):
            strongest = [int(i) for i in np.argsort(-row)[:REASONS] if row[i] > 0]
            shown = dict(zip(FEATURES, value.tolist(), strict=True))
            answers.append(
                [
                    Reason(FEATURES[i], round(float(value[i]), 6), round(float(row[i]), 4), reason_text(FEATURES[i], shown))
                    for i in strongest
                ]
            )
        return answers

    def close(self) -> None:
        """Free the engines."""
        self.boosting.close()
        self.sequence.close()
