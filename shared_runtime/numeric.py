"""How far two arrays are apart: the one measure by which passes, imports and plans compare numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_runtime.signature import Tensors

WORDS = "OUS"
"""Kinds of arrays of text, such as the labels of a classifier."""


def relative_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Norm of `a - b` over the norm of `b`; infinite where shapes, kinds or the places of finite numbers differ.

    Of words it is the share that differs.
    """
    if a.shape == b.shape and a.dtype.kind in WORDS and b.dtype.kind in WORDS:
        return float(np.mean(a.astype(str) != b.astype(str))) if a.size else 0.0
    if a.shape != b.shape or a.dtype.kind not in "fiub" or b.dtype.kind not in "fiub":
        return float("inf")
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(y)
    if not np.array_equal(np.isfinite(x), finite):
        return float("inf")
    x, y = x[finite], y[finite]
    norm, distance = float(np.linalg.norm(y)), float(np.linalg.norm(x - y))
    return distance / norm if norm else distance


def difference(outputs: Tensors, reference: Tensors) -> float:
    """The largest relative difference of an output from the reference's; infinite where one is missing."""
    return max(
        (relative_difference(outputs[name], value) if name in outputs else float("inf") for name, value in reference.items()), default=0.0
    )
