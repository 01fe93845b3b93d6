"""Rounding of weights to integers, without data."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def balanced_rounding(steps: Array, most: int) -> Array:
    """Integers (channels, n) in -most..most nearest to `steps`, but for the few that make a channel's errors cancel out.

    What a channel adds to every output is the sum of its errors times the mean of its inputs; after activations that are
    never negative it outweighs the rest. The elements that were nearest to the other integer are rounded the other way
    (Guo et al., SQuant, ICLR 2022, arXiv:2202.07471, over whole channels).
    """
    rounded = np.round(steps)
    errors = rounded - steps
    total = errors.sum(axis=1)
    side = np.sign(total)[:, None]
    flips = np.minimum(np.round(np.abs(total)).astype(int), steps.shape[1])
    rank = np.argsort(np.argsort(-side * errors, axis=1), axis=1)
    return np.clip(np.where(rank < flips[:, None], rounded - side, rounded), -most, most)
