"""The window that the hippocampus network sees: 1 mm voxels, RAS, fixed size."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MODEL = "hippocampus-t1"
WINDOW: tuple[int, int, int] = (48, 64, 48)
"""Voxels of 1 mm along right, anterior, superior; a multiple of the network's stride of 8."""
CROP: tuple[int, int, int] = (34, 48, 34)
"""How much of the window a typical training crop fills; the rest is zero."""


def centred_placement(shape: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices that put an array of `shape` in the middle of the window: (in the array, in the window).

    An axis longer than the window is cut around its middle, a shorter one leaves a margin.
    """
    source, target = [], []
    for size, room in zip(shape, WINDOW, strict=True):
        take = min(size, room)
        start, offset = (size - take) // 2, (room - take) // 2
        source.append(slice(start, start + take))
        target.append(slice(offset, offset + take))
    return tuple(source), tuple(target)


def place_in_window(volume: NDArray[Any], dtype: Any = np.float32) -> NDArray[Any]:
    """`volume` (X, Y, Z) centred in a zero window of shape `WINDOW`."""
    source, target = centred_placement(volume.shape)
    window: NDArray[Any] = np.zeros(WINDOW, dtype)
    window[target] = volume[source]
    return window
