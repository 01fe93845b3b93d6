"""Why a score is high: exact TreeSHAP of the boosting, and features in the analyst's words."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xgboost as xgb
from numpy.typing import NDArray

from apps.finance.errors import ModelMismatchError
from apps.finance.features.schema import NEVER_DAYS

BOOSTER_FILE = "booster.ubj"
SHARED_ROWS = 32


class Explainer:
    """The boosting's trees, for exact TreeSHAP (Lundberg et al., Nature Machine Intelligence 2, 2020).

    `threads` share a batch; a few rows are quicker on one.
    """

    def __init__(self, folder: Path, sha256: str, threads: int = 1) -> None:
        file = folder / BOOSTER_FILE
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ModelMismatchError(f"the trees {file} are missing or are not those of the card; install or train the models again")
        self._boosters = {count: _load(content, count) for count in {1, threads}}
        self._threads = threads

    def contributions(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Each feature's share (N, F) of the boosting's log-odds; with the expected value they add up to them.

        Raises ModelMismatchError for another number of features: XGBoost would end the process.
        """
        expected = self._boosters[1].num_features()
        if features.shape[1] != expected:
            raise ModelMismatchError(f"the trees were trained on {expected} features, got {features.shape[1]}; train the models again")
        if not len(features):
            return np.zeros((0, features.shape[1]))
        threads = self._threads if len(features) >= SHARED_ROWS else 1
        matrix = xgb.DMatrix(np.ascontiguousarray(features), nthread=threads)
        return np.asarray(self._boosters[threads].predict(matrix, pred_contribs=True), np.float64)[:, :-1]


def _load(content: bytes, threads: int) -> xgb.Booster:
    booster = xgb.Booster({"nthread": threads})
    booster.load_model(bytearray(content))
    booster.set_param({"nthread": threads})
    return booster


def reason_text(feature: str, values: Mapping[str, float]) -> str:
    """A feature with its value as an analyst would say it."""
    value = values[feature]
    if feature.startswith("TERMINAL_ID_RISK"):
        days = _days(feature)
        count = values[feature.replace("RISK", "NB_TX")]
        if not count:
            return f"terminal had no transaction with a known label in the {days} before last week"
        return f"terminal had {value:.0%} fraud among {_count(count, 'transaction')}, {days} up to a week ago"
    if feature.startswith("TERMINAL_ID_NB_TX"):
        return f"terminal had {_count(value, 'transaction')}, {_days(feature)} up to a week ago"
    if feature.startswith("CUSTOMER_ID_NB_TX"):
        return f"card made {_count(value, 'transaction')} within {_days(feature)}"
    if feature.startswith("CUSTOMER_ID_AVG_AMOUNT"):
        return f"card spent {value:.2f} on average within {_days(feature)}"
    if feature.startswith("CUSTOMER_MAX_TO_MEDIAN"):
        return f"card's largest amount of the last {_days(feature)} was {value:.1f} times its usual one"
    return _single(feature, value, values)


def _days(feature: str) -> str:
    days = next(part.removesuffix("DAY") for part in feature.split("_") if part.endswith("DAY"))
    return _count(int(days), "day")


def _count(number: float, what: str) -> str:
    """As "1 day", "2 days"."""
    return f"{number:.0f} {what}{'' if round(number) == 1 else 's'}"


def _ago(days: float) -> str:
    return "less than a day ago" if days < 1 else f"{_count(days, 'day')} ago"


def _since(what: str, value: float) -> str:
    return f"no {what} at the terminal within the known month" if value >= NEVER_DAYS else f"a {what} at the terminal {_ago(value)}"


def _run(length: float) -> str:
    if length < 1:
        return "terminal's last known label is not fraud"
    return "terminal's last known label is fraud" if length < 2 else f"terminal's last {length:.0f} known labels are all fraud"


def _single(feature: str, value: float, values: Mapping[str, float]) -> str:
    usual = values["TX_AMOUNT"] / (values["AMOUNT_TO_MEDIAN"] or 1)
    texts = {
        "TX_AMOUNT": f"amount is {value:.2f}",
        "TX_DURING_WEEKEND": "on a weekend" if value else "on a weekday",
        "TX_DURING_NIGHT": "at night" if value else "by day",
        "AMOUNT_TO_MEDIAN": f"amount is {value:.1f} times the card's usual {usual:.2f}",
        "AMOUNT_TO_UPPER_QUARTILE": f"amount is {value:.1f} times what three quarters of the card's amounts stay below",
        "TERMINAL_NB_ORDINARY_FRAUD": f"terminal had {_count(value, 'known fraud')} of ordinary amounts within a month",
        "TERMINAL_NB_HIGH_FRAUD": f"terminal had {_count(value, 'known fraud')} of high amounts within a month",
        "TERMINAL_DAYS_SINCE_FRAUD": _since("known fraud", value),
        "TERMINAL_DAYS_SINCE_GENUINE": _since("transaction known as genuine", value),
        "TERMINAL_FRAUD_RUN": _run(value),
        "TERMINAL_DAYS_SINCE_RUN_START": "terminal has no present run of frauds"
        if value >= NEVER_DAYS
        else f"terminal's present run of frauds began {_ago(value)}",
    }
    return texts[feature]
