"""What the texture network takes and gives: sizes that training and inspection share, and how an image is prepared."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

MODEL = "texture-features"
SIZE = 256
"""The network sees SIZE x SIZE pixels, whatever the part's own size and shape."""
MAP, FINE_SIDE, COARSE_SIDE = SIZE // 4, SIZE // 8, SIZE // 16
FINE, COARSE, EMBEDDING = 48, 96, 576 * 3
WHOLE = 2 * COARSE
PEAK = 5
"""Cells of the learned map whose mean stands for its peak."""
BRIGHTNESS, CONTRAST, FLAT = 110.0, 40.0, 8.0
"""Mean and deviation of the grey levels that every image is brought to; FLAT keeps noise of empty images small."""


def shrunk(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image at SIZE a side, (SIZE, SIZE) or (SIZE, SIZE, 3): all that the network is shown of it. Of one that was shrunk, itself."""
    return np.asarray(cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA), np.uint8)


def prepared(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The network's input (3, SIZE, SIZE) float32 0..1 of an image (H, W) or (H, W, 3) uint8 RGB.

    Exposure is taken out: the grey levels get one mean and deviation, the same factor for all channels.
    """
    small = shrunk(image).astype(np.float32)
    grey = small if small.ndim == 2 else small.mean(axis=2)
    level = (small - grey.mean()) * (CONTRAST / (float(grey.std()) + FLAT)) + BRIGHTNESS
    level = np.clip(level, 0, 255) / 255
    return np.ascontiguousarray(np.broadcast_to(level, (3, SIZE, SIZE)) if level.ndim == 2 else level.transpose(2, 0, 1))
