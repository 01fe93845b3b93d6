"""Two thresholds from good parts that were held back: above the first a person looks, above the second the part fails."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from scipy import stats

from apps.industrial.errors import InputError

REVIEW_RATE, FAIL_RATE = 0.05, 0.01
LEAST_RATE, MOST_RATE = 1e-4, 0.5


class Threshold(msgspec.Struct, frozen=True):
    """A limit of the score, the share of good parts that is expected above it, and the 95 % interval of that share."""

    value: float
    expected: float
    interval: tuple[float, float]


class Calibration(msgspec.Struct, frozen=True):
    """`review` and `fail` thresholds, from `parts` good parts that were held back."""

    review: Threshold
    fail: Threshold
    parts: int


class Rates(msgspec.Struct, frozen=True):
    """The shares of good parts that may be looked at, and that may fail. Raises InputError for what are no such shares."""

    review: float = REVIEW_RATE
    fail: float = FAIL_RATE

    def __post_init__(self) -> None:
        if not LEAST_RATE <= self.fail <= self.review <= MOST_RATE:
            raise InputError(
                f"{100 * self.review:g} % of good parts to REVIEW and {100 * self.fail:g} % to FAIL can't be set; expected "
                f"shares of {100 * LEAST_RATE:g} to {100 * MOST_RATE:g} %, the second no larger than the first, which holds it"
            )


USUAL = Rates()


def calibrate(scores: Sequence[float], rates: Rates = USUAL) -> Calibration:
    """Thresholds from the scores of good parts that the statistics did not see.

    A threshold that k of n parts exceed has an expected rate of (k + 1) / (n + 1) with a Beta distribution (order
    statistics). Where n is too small for the wanted rate the limit lies beyond the largest score, by the spread
    of the upper tail; the rate stated is then the one that n parts can prove.
    """
    values = np.sort(np.asarray(scores, float))
    n = len(values)
    fail = _threshold(values, rates.fail)
    review = _threshold(values, rates.review)
    if review.value >= fail.value:
        review = msgspec.structs.replace(review, value=float(np.nextafter(fail.value, -np.inf)))
    return Calibration(review, fail, n)


def _threshold(values: np.ndarray, rate: float) -> Threshold:
    n = len(values)
    above = int(np.floor(rate * (n + 1))) - 1
    if above >= 0:
        value = float(values[n - 1 - above])
    else:
        above = 0
        tail = float(np.diff(np.percentile(values, (50, 90)))[0]) / np.log(5)
        value = float(values[-1] + max(0.0, tail * np.log(1 / (rate * (n + 1)))))
    low, high = stats.beta.ppf((0.025, 0.975), above + 1, n - above)
    return Threshold(value, (above + 1) / (n + 1), (float(low), float(high)))
