"""The calibrated combination of the two models."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from apps.finance.errors import ModelMismatchError
from shared_runtime.errors import NOT_JSON

FILE = "combination.json"
Logits = NDArray[np.float64]


class Combination(msgspec.Struct, frozen=True):
    """A logistic model over the two log-odds: its output is the probability of fraud.

    Fitted on transactions whose customers neither model had seen. `members`: SHA-256 of the graphs by name.
    """

    boosting: float
    sequence: float
    intercept: float
    feature_version: str = ""
    members: dict[str, str] = {}

    def log_odds(self, boosting: Logits, sequence: Logits) -> Logits:
        """The combined log-odds of two arrays of log-odds."""
        return self.intercept + self.boosting * boosting + self.sequence * sequence

    def probability(self, boosting: Logits, sequence: Logits) -> Logits:
        """The probability of fraud."""
        return sigmoid(self.log_odds(boosting, sequence))

    def write(self, folder: Path) -> None:
        """Write `combination.json` into a model folder."""
        (folder / FILE).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @classmethod
    def read(cls, folder: Path) -> Combination:
        """Read `combination.json` of a model folder. Raises ModelMismatchError."""
        try:
            return msgspec.json.decode((folder / FILE).read_bytes(), type=cls)
        except (OSError, *NOT_JSON) as error:
            raise ModelMismatchError(
                f"the combination {folder / FILE} can't be read: {error}; train or install the models again"
            ) from error


def sigmoid(log_odds: Logits) -> Logits:
    """1 / (1 + exp(-x)), without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * np.asarray(log_odds, np.float64))))


def logit(probability: Logits) -> Logits:
    """Log-odds, with probabilities kept off 0 and 1 by what float32 can tell."""
    p = np.clip(np.asarray(probability, np.float64), 1e-9, 1 - 1e-7)
    return np.asarray(np.log(p) - np.log1p(-p))
