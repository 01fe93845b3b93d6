"""Ten procedural textures of parts: a grey image each, as different from part to part as good parts are."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Grey = NDArray[np.float32]
Rng = np.random.Generator


def smooth_noise(rng: Rng, size: int, cells: float, aspect: float = 1.0) -> Grey:
    """Noise of zero mean and unit variance (size, size) with about `cells` bumps across; `aspect` stretches it along x."""
    rows, columns = max(2, round(cells)), max(2, round(cells / aspect))
    field = cv2.resize(rng.standard_normal((rows + 3, columns + 3)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    return np.asarray((field - field.mean()) / (field.std() + 1e-6), np.float32)


def _grid(size: int) -> tuple[Grey, Grey]:
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    return x, y


def _brushed(rng: Rng, size: int) -> Grey:
    rows = rng.standard_normal((size, 1)).astype(np.float32)
    return 135 + 9 * rows + 8 * smooth_noise(rng, size, size, 24) + 5 * smooth_noise(rng, size, size / 3, 40)


def _granite(rng: Rng, size: int) -> Grey:
    grains = cv2.GaussianBlur(rng.standard_normal((size, size)).astype(np.float32), (0, 0), 1.4)
    return np.asarray(125 + 85 * np.tanh(4 * grains) * 0.5 + 10 * smooth_noise(rng, size, 12), np.float32)


def _cast(rng: Rng, size: int) -> Grey:
    return 110 + 12 * smooth_noise(rng, size, size / 3) + 8 * smooth_noise(rng, size, size / 10) + 5 * smooth_noise(rng, size, 6)


def _woven(rng: Rng, size: int) -> Grey:
    x, y = _grid(size)
    period, bend = rng.uniform(8, 9), 1.2 * smooth_noise(rng, size, 5)
    warp = np.sin(2 * np.pi * (x + bend) / period)
    weft = np.sin(2 * np.pi * (y - bend) / period)
    over = np.sin(np.pi * (x + bend) / period) * np.sin(np.pi * (y - bend) / period) > 0
    return np.where(over, 130 + 35 * warp, 115 + 35 * weft).astype(np.float32) + 5 * smooth_noise(rng, size, size / 2)


def _twill(rng: Rng, size: int) -> Grey:
    x, y = _grid(size)
    wave = np.sin(2 * np.pi * (x + y + 1.5 * smooth_noise(rng, size, 4)) / rng.uniform(10, 11))
    return 90 + 30 * wave + 12 * np.sin(2 * np.pi * x / 4.1) + 5 * smooth_noise(rng, size, size / 2)


def _wood(rng: Rng, size: int) -> Grey:
    x, y = _grid(size)
    rings = y / rng.uniform(9, 12) + 1.3 * smooth_noise(rng, size, 7, 5) + 0.002 * x
    return 140 + 22 * np.sin(2 * np.pi * rings) + 9 * smooth_noise(rng, size, size / 2, 14)


def _leather(rng: Rng, size: int) -> Grey:
    number = int(size * size / rng.uniform(90, 110))
    seeds = np.ones((size, size), np.uint8)
    seeds[rng.integers(0, size, number), rng.integers(0, size, number)] = 0
    distance = cv2.distanceTransform(seeds, cv2.DIST_L2, 5)
    return 105 + 55 * np.exp(-distance / 3.0) + 8 * smooth_noise(rng, size, size / 4)


def _paper(rng: Rng, size: int) -> Grey:
    canvas = np.full((size, size), 190, np.float32)
    for _ in range(size * 2):
        start, angle, length = rng.uniform(0, size, 2), rng.uniform(0, np.pi), rng.uniform(8, 22)
        end = start + length * np.array([np.cos(angle), np.sin(angle)])
        cv2.line(canvas, tuple(map(int, start)), tuple(map(int, end)), float(rng.uniform(165, 210)), 1, cv2.LINE_AA)
    return cv2.GaussianBlur(canvas, (0, 0), 0.8) + 4 * smooth_noise(rng, size, size / 2)


def _tiled(rng: Rng, size: int) -> Grey:
    x, y = _grid(size)
    pitch = size / 8
    shift = rng.uniform(-1.5, 1.5, 2)
    joint = np.minimum(np.abs((x + shift[0]) % pitch - pitch / 2), np.abs((y + shift[1]) % pitch - pitch / 2))
    return 150 - 60 * np.exp(-((joint / 1.6) ** 2)) + 6 * smooth_noise(rng, size, 30) + 5 * smooth_noise(rng, size, size / 2)


def _perforated(rng: Rng, size: int) -> Grey:
    x, y = _grid(size)
    pitch = size / 14
    row = np.floor(y / pitch)
    u = (x + (row % 2) * pitch / 2 + rng.uniform(-1, 1)) % pitch - pitch / 2
    v = y % pitch - pitch / 2
    hole = 1 / (1 + np.exp((np.hypot(u, v) - pitch * 0.28) * 1.5))
    return 160 - 110 * hole + 6 * smooth_noise(rng, size, 20) + 4 * smooth_noise(rng, size, size / 2)


TEXTURES: dict[str, Callable[[Rng, int], Grey]] = {
    "brushed": _brushed,
    "granite": _granite,
    "cast": _cast,
    "woven": _woven,
    "twill": _twill,
    "wood": _wood,
    "leather": _leather,
    "paper": _paper,
    "tiled": _tiled,
    "perforated": _perforated,
}


def good_part(texture: str, rng: Rng, size: int = 256) -> NDArray[np.uint8]:
    """One good part (size, size) uint8 of a texture in `TEXTURES`, with the line's usual changes of light and noise."""
    image = TEXTURES[texture](rng, size)
    x, y = _grid(size)
    slope = rng.normal(0, 0.02, 2)
    light = 1 + slope[0] * (x / size - 0.5) + slope[1] * (y / size - 0.5)
    image = image * light * np.exp(rng.normal(0, 0.04)) + rng.normal(0, 2.0, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)
