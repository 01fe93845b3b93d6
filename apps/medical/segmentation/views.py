"""Views of one window whose predictions are averaged: its mirror images, each moved by other whole voxels.

Mirroring as in nnU-Net (Isensee et al., Nature Methods 18, 2021). A network that halves its grid three times sees a
structure differently by where it falls on the grid of 8 voxels, so every mirror image is moved to another place on it.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

MIRRORS: tuple[tuple[int, ...], ...] = tuple(tuple(axis for axis in range(3) if flip[axis]) for flip in product((False, True), repeat=3))
"""Axes of the window that each view mirrors; none in the first."""
SHIFTS = ((0, 0, 0), (-1, 2, -3), (2, -3, 1), (-3, 1, -2), (3, 3, -4), (1, -4, 2), (-4, -1, 3), (-2, -2, -1))
"""Voxels by which each view is moved before it is mirrored."""


def views(window: Floats) -> Floats:
    """(8, 1, X, Y, Z): every view of a normalised window (X, Y, Z), zero where it moved in from outside."""
    seen = [np.flip(_moved(window, shift), axes) for axes, shift in zip(MIRRORS, SHIFTS, strict=True)]
    return np.ascontiguousarray(np.stack(seen)[:, None])


def merged(probability: Floats) -> Floats:
    """(C, X, Y, Z): the mean of `probability` (8, C, X, Y, Z), that of each view of `views`, back in the window's place.

    A voxel that a view lost at the window's edge is the mean of the other views.
    """
    shape = probability.shape[2:]
    total, votes = np.zeros(probability.shape[1:], np.float32), np.zeros(shape, np.float32)
    for seen, axes, shift in zip(probability, MIRRORS, SHIFTS, strict=True):
        back = tuple(-voxels for voxels in shift)
        votes += _moved(np.ones(shape, np.float32), back)
        total += np.stack([_moved(np.flip(part, axes), back) for part in seen])
    return total / votes


def _moved(array: Floats, shift: tuple[int, ...]) -> Floats:
    """`array` moved by whole voxels, zeros moving in."""
    result = np.zeros_like(array)
    into = tuple(slice(max(0, by), size + min(0, by)) for by, size in zip(shift, array.shape, strict=True))
    out_of = tuple(slice(max(0, -by), size + min(0, -by)) for by, size in zip(shift, array.shape, strict=True))
    result[into] = array[out_of]
    return result
