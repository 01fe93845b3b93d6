"""Good parts with a region that is not their own: another part's surface, or their own made rougher, smoother or brighter.

After Li et al., "CutPaste" (CVPR 2021), and Schlueter et al., "Natural Synthetic Anomalies" (ECCV 2022). Uneven light over the
whole part is drawn as well and is no defect.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from apps.industrial.features import BRIGHTNESS, CONTRAST, FLAT, SIZE
from apps.industrial.synthesis.textures import Rng

Array = NDArray[np.float32]
Pixels = NDArray[np.uint8]
LIT = 0.85
"""Share of the images whose light is made uneven."""


def patched(rng: Rng, part: Pixels, other: Pixels) -> tuple[Pixels, Array]:
    """Image (SIZE, SIZE) or (SIZE, SIZE, 3) uint8 of `part` with a foreign region, and the region's outline (SIZE, SIZE) 0 or 1."""
    own, foreign = _level(part, other.ndim), _level(other, part.ndim)
    if rng.random() < LIT:
        own += _like(_noise(rng, *rng.uniform(15, 80, 2)) * np.float32(rng.uniform(0, 0.9)), own)
    outline = _outline(rng)
    soft = _blurred(outline, rng.uniform(0.5, 4))
    mixed = own + (_filling(rng, own, foreign) - own) * _like(soft, own)
    return np.clip(BRIGHTNESS + mixed * CONTRAST, 0, 255).astype(np.uint8), outline


def _filling(rng: Rng, own: Array, foreign: Array) -> Array:
    kind = rng.random()
    if kind < 0.5:
        smooth = _blurred(foreign, 12)
        below = _blurred(own, 12) if rng.random() < 0.5 else smooth
        filling = (foreign - smooth + below) * rng.uniform(0.6, 1.6) + rng.normal(0, 0.3)
        return np.roll(filling, rng.integers(SIZE, size=2), (0, 1)) if rng.random() < 0.5 else filling
    if kind < 0.75:
        smooth = _blurred(own, rng.uniform(2, 12))
        strength = rng.uniform(0, 0.5) if rng.random() < 0.5 else rng.uniform(1.7, 3)
        return np.asarray(smooth + (own - smooth) * strength + rng.normal(0, 0.25), np.float32)
    length = int(rng.integers(7, 41))
    kernel = (1, length) if rng.random() < 0.5 else (length, 1)
    return np.asarray(cv2.blur(own, kernel) * rng.uniform(0.8, 1.5) + rng.normal(0, 0.5), np.float32)


def _outline(rng: Rng) -> Array:
    """A side of the image behind a wavy edge, blots, or one rounded shape."""
    kind, (y, x) = rng.integers(3), np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) - SIZE / 2
    if kind == 0:
        angle = rng.choice([0, np.pi / 2, np.pi, 3 * np.pi / 2]) + rng.normal(0, 0.25)
        wave = _noise(rng, *[rng.uniform(10, 40)] * 2) * rng.uniform(1, 10)
        inside = np.cos(angle) * x + np.sin(angle) * y + wave > rng.uniform(0.08, 0.45) * SIZE
    elif kind == 1:
        field = _noise(rng, *[rng.uniform(20, 60)] * 2)
        inside = field > np.quantile(field, rng.uniform(0.6, 0.95))
    else:
        angle, (across, down) = rng.normal(0, 0.2), rng.uniform(-0.42, 0.42, 2) * SIZE
        wide, high = rng.uniform(0.08, 0.4, 2) * SIZE
        u, v = np.cos(angle) * (x - across) + np.sin(angle) * (y - down), np.cos(angle) * (y - down) - np.sin(angle) * (x - across)
        power = rng.choice([2, 8])
        inside = (np.abs(u) / wide) ** power + (np.abs(v) / high) ** power < 1
    return inside.astype(np.float32)


def _noise(rng: Rng, across: float, down: float) -> Array:
    """Smooth noise (SIZE, SIZE) with mean about 0 and deviation 1; drawn at a quarter of the size, which its smoothness allows."""
    grain = rng.standard_normal((SIZE // 4, SIZE // 4)).astype(np.float32)
    field = cv2.GaussianBlur(grain, (0, 0), sigmaX=float(across) / 4, sigmaY=float(down) / 4)
    return np.asarray(cv2.resize(field / (field.std() + 1e-6), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC), np.float32)


def _level(image: Pixels, dimensions: int) -> Array:
    """The image at SIZE with its grey levels at mean 0 and deviation 1, in colour where `dimensions` is 3."""
    small = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.ndim < dimensions:
        small = np.repeat(small[:, :, None], 3, axis=2)
    grey = small if small.ndim == 2 else small.mean(axis=2)
    return np.asarray((small - grey.mean()) / (grey.std() + FLAT), np.float32)


def _blurred(image: Array, sigma: float) -> Array:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32)


def _like(field: Array, image: Array) -> Array:
    return field if image.ndim == 2 else field[:, :, None]
