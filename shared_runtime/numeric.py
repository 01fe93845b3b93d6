"""How far two arrays are apart: the one measure by which passes, imports and plans compare numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_runtime.signature import Tensors

WORDS = "OUS"
"""Kinds of arrays of text, such as the labels of a classifier."""
STEPS, MOST, LEAST = 4.0, 0.05, 1e-6
"""How many times as far as by rounding alone an output may be from a reference; how far at most, relative, where some number is
further off than the last."""

SLACK, NEAR = 1.5, 0.02
"""How many times as far from float reduced precision may be on many rows as on one; relative differences below the last are let pass."""


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


def disagreeing(outputs: Tensors, reference: Tensors, tolerance: float, movement: Callable[[], Mapping[str, float]]) -> str | None:
    """The first output that is further from the reference than `tolerance` and than rounding explains, or None.

    Where a network magnifies rounding (the small probabilities that a detector gives to noise), sums in another order can't agree to
    the last digits. `movement` is asked only then: how far each output moves by rounding alone, as `graph.rounding.movement` tells.
    """
    far = [name for name, value in reference.items() if name not in outputs or not relative_difference(outputs[name], value) <= tolerance]
    own = movement() if far and all(name in outputs for name in far) else {}
    for name in far:
        if name not in own:
            return name
        distance = relative_difference(outputs[name], reference[name])
        near = np.isfinite(distance) and (distance <= MOST or _furthest(outputs[name], reference[name]) <= LEAST)
        if not (near and distance <= STEPS * own[name]):
            return name
    return None


def strays(outputs: Tensors, reference: Tensors, own: float) -> float | None:
    """How far outputs in floating point are from the reference's, where that is too far for a form in reduced precision that is
    `own` from it on one row at a time; None where it is not.

    Labels are left to the user's metric: one that another rounding turns is no fault.
    """
    far = difference_of_floats(outputs, reference)
    return None if np.isfinite(far) and far <= max(NEAR, SLACK * own) else far


def difference_of_floats(outputs: Tensors, reference: Tensors) -> float:
    """The largest relative difference of an output in floating point from the reference's."""
    return difference(outputs, {name: value for name, value in reference.items() if value.dtype.kind == "f"})


def _furthest(a: NDArray[Any], b: NDArray[Any]) -> float:
    finite = np.isfinite(b)
    return float(np.abs(a[finite].astype(np.float64) - b[finite]).max(initial=0.0))
