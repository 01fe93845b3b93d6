"""Intensity normalisation for MR, whose units mean nothing from one file to the next."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LOW_PERCENTILE, HIGH_PERCENTILE = 0.5, 99.5


def normalise_mr(volume: NDArray[np.generic]) -> NDArray[np.float32]:
    """Clip to robust percentiles, then shift and scale to zero mean and unit variance.

    MR intensities are arbitrary: files of one data set differ by four orders of magnitude. The
    percentiles keep a few bright voxels (vessels, artefacts) from setting the scale.

    `volume`: (X, Y, Z), any real dtype, finite. Returns (X, Y, Z) float32, dimensionless; all zeros
    for a constant volume.
    """
    values = np.asarray(volume, dtype=np.float64)
    low, high = np.percentile(values, (LOW_PERCENTILE, HIGH_PERCENTILE))
    clipped = np.clip(values, low, high)
    deviation = float(clipped.std())
    if deviation == 0.0:
        return np.zeros(values.shape, np.float32)
    return np.asarray((clipped - clipped.mean()) / deviation, np.float32)
