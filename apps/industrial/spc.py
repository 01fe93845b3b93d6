"""Statistical process control: charts of the reject rate and of the score, with limits and the Western Electric rules.

Montgomery, "Introduction to Statistical Quality Control"; Western Electric, "Statistical Quality Control Handbook" (1956).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Chart:
    """Points with a centre line and 3-sigma limits; `alarms`: position of the point and the rule it breaks, in words."""

    values: tuple[float, ...]
    centre: float
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    alarms: tuple[tuple[int, str], ...]


RULES = (
    (1, 1, 3.0, "one point beyond 3 sigma"),
    (2, 3, 2.0, "two of three points beyond 2 sigma"),
    (4, 5, 1.0, "four of five points beyond 1 sigma"),
    (8, 8, 0.0, "eight points on one side of the centre"),
)


def western_electric(standard: Sequence[float]) -> list[tuple[int, str]]:
    """Rules that the points (in deviations from the centre) break, each at the point that completes it."""
    z, found = np.asarray(standard, float), []
    for end in range(len(z)):
        for needed, among, limit, words in RULES:
            window = z[max(0, end - among + 1) : end + 1]
            for side, name in ((1, "above"), (-1, "below")):
                beyond = side * window > limit
                if len(window) >= needed and beyond[-1] and beyond.sum() >= needed:
                    found.append((end, f"{words} ({name})"))
    return found


def p_chart(rejected: Sequence[bool], size: int = 25) -> Chart:
    """Share of rejected parts in groups of `size`, in order; a last group that is not full is left out."""
    groups = np.asarray(rejected, float)[: len(rejected) // size * size].reshape(-1, size)
    shares = groups.mean(axis=1)
    centre = float(shares.mean()) if len(shares) else 0.0
    sigma = float(np.sqrt(centre * (1 - centre) / size))
    standard = (shares - centre) / sigma if sigma else np.zeros(len(shares))
    n = len(shares)
    limits = (max(0.0, centre - 3 * sigma), min(1.0, centre + 3 * sigma))
    return Chart(tuple(map(float, shares)), centre, (limits[0],) * n, (limits[1],) * n, tuple(western_electric(standard.tolist())))


def score_chart(scores: Sequence[float], size: int = 25) -> Chart:
    """Mean score of groups of `size`; sigma from the spread within the groups."""
    groups = np.asarray(scores, float)[: len(scores) // size * size].reshape(-1, size)
    means = groups.mean(axis=1)
    centre = float(means.mean()) if len(means) else 0.0
    sigma = float(np.sqrt(groups.var(axis=1, ddof=1).mean() / size)) if len(groups) else 0.0
    standard = (means - centre) / sigma if sigma else np.zeros(len(means))
    n = len(means)
    return Chart(
        tuple(map(float, means)), centre, (centre - 3 * sigma,) * n, (centre + 3 * sigma,) * n, tuple(western_electric(standard.tolist()))
    )
