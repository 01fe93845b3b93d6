"""Overlap, surface distance and volume error of one structure in one case.

Definitions follow Maier-Hein, Reinke et al., "Metrics reloaded", Nature Methods 21 (2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]


def dice(prediction: Mask, reference: Mask) -> float:
    """Dice coefficient, 0 to 1; 1 where both masks are empty."""
    total = int(prediction.sum()) + int(reference.sum())
    return 1.0 if total == 0 else 2.0 * int((prediction & reference).sum()) / total


def _surface(mask: Mask) -> Mask:
    return np.asarray(mask & ~ndimage.binary_erosion(mask, border_value=0))


def hd95_mm(prediction: Mask, reference: Mask, spacing_mm: Sequence[float]) -> float:
    """95th percentile of the symmetric surface distance [mm].

    0 where both masks are empty, infinity where only one is. `spacing_mm`: voxel size along each axis.
    """
    if not prediction.any() and not reference.any():
        return 0.0
    if not prediction.any() or not reference.any():
        return float("inf")
    a, b = _surface(prediction), _surface(reference)
    to_b = ndimage.distance_transform_edt(~b, sampling=spacing_mm)[a]
    to_a = ndimage.distance_transform_edt(~a, sampling=spacing_mm)[b]
    return float(max(np.percentile(to_b, 95), np.percentile(to_a, 95)))


def volume_error_percent(prediction: Mask, reference: Mask) -> float:
    """Signed volume difference as a share of the reference volume [%]; infinity where that is empty."""
    reference_voxels = int(reference.sum())
    predicted_voxels = int(prediction.sum())
    if reference_voxels == 0:
        return 0.0 if predicted_voxels == 0 else float("inf")
    return 100.0 * (predicted_voxels - reference_voxels) / reference_voxels


def bootstrap_interval(values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (Efron and Tibshirani, 1993)."""
    data = np.asarray(values, dtype=np.float64)
    data = data[np.isfinite(data)]
    if data.size == 0:
        return (float("nan"), float("nan"))
    draws = np.random.default_rng(seed).integers(0, data.size, (resamples, data.size))
    means = data[draws].mean(axis=1)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, (tail, 100 - tail))
    return (float(low), float(high))
