"""Eight kinds of defect drawn into an image, each with its exact mask."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from apps.industrial.synthesis.textures import smooth_noise

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]
Rng = np.random.Generator
SMALL, LARGE = 0.012, 0.12
"""Radius of blob-like defects as a share of the image's shorter side."""


def _blob(rng: Rng, shape: tuple[int, int], low: float = SMALL, high: float = LARGE, rough: float = 0.35) -> Image:
    """A soft-edged blob of irregular outline: 1 inside, 0 outside."""
    height, width = shape
    side = min(height, width)
    radius = side * float(np.exp(rng.uniform(np.log(low), np.log(high))))
    stretch, angle = np.exp(rng.normal(0, 0.35)), rng.uniform(0, np.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x - rng.uniform(0.04, 0.96) * width, y - rng.uniform(0.04, 0.96) * height
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    theta = np.arctan2(v, u)
    wobble = sum(rng.normal(0, rough / k) * np.sin(k * theta + rng.uniform(0, 6.28)) for k in (2, 3, 5))
    distance = np.hypot(u / stretch, v * stretch) - radius * (1 + wobble * 0.5)
    return np.asarray(1 / (1 + np.exp(np.clip(distance / max(0.5, radius * 0.12), -30, 30))), np.float32)


def _line(rng: Rng, shape: tuple[int, int], bend: float, length: float, thickness: float) -> Image:
    """A polyline that wanders: 1 on it, 0 off it."""
    height, width = shape
    side = min(shape)
    canvas = np.zeros(shape, np.float32)
    place, angle = np.array([rng.uniform(0.05, 0.95) * width, rng.uniform(0.05, 0.95) * height]), rng.uniform(0, 2 * np.pi)
    step = side * 0.03
    points = [place]
    for _ in range(max(3, int(length / 0.03))):
        angle += rng.normal(0, bend)
        place = place + step * np.array([np.cos(angle), np.sin(angle)])
        points.append(place)
    path = (np.array(points) * 8).astype(np.int32)
    cv2.polylines(canvas, [path], False, 1.0, max(1, round(thickness)), cv2.LINE_AA, 3)
    return np.asarray(cv2.GaussianBlur(canvas, (0, 0), 0.5 + 0.15 * thickness), np.float32)


def _contrast(rng: Rng, image: Image, low: float, high: float) -> float:
    """A step of grey that stands out against the image's own spread."""
    return float(rng.uniform(low, high) * (15 + 0.5 * image.std()))


def _hole(rng: Rng, image: Image) -> tuple[Image, Image]:
    shape = _blob(rng, image.shape[:2], 0.008, 0.05)
    return image - shape * min(_contrast(rng, image, 1.5, 5), float(image.mean())), shape


def _crack(rng: Rng, image: Image) -> tuple[Image, Image]:
    shape = _line(rng, image.shape[:2], 0.55, rng.uniform(0.15, 0.8), rng.uniform(1, 2.2) * min(image.shape[:2]) / 256)
    return image - shape * _contrast(rng, image, 1.0, 4), np.minimum(1, shape * 2)


def _scratch(rng: Rng, image: Image) -> tuple[Image, Image]:
    shape = _line(rng, image.shape[:2], 0.06, rng.uniform(0.2, 0.9), rng.uniform(1, 2.5) * min(image.shape[:2]) / 256)
    return image + shape * _contrast(rng, image, 1.0, 4) * rng.choice([1, 1, -1]), np.minimum(1, shape * 2)


def _chip(rng: Rng, image: Image) -> tuple[Image, Image]:
    height, width = image.shape[:2]
    centre = np.array([rng.uniform(0, width), rng.uniform(0, height)])
    if rng.random() < 0.6:  # at an edge of the part
        axis = int(rng.integers(2))
        centre[axis] = rng.choice([0.0, float((width, height)[axis])])
    radius = min(height, width) * rng.uniform(0.04, 0.2)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    corners = centre + radius * rng.uniform(0.5, 1.1, (9, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
    canvas = np.zeros((height, width), np.float32)
    cv2.fillPoly(canvas, [(corners * 8).astype(np.int32)], 1.0, cv2.LINE_AA, 3)
    inside = image.mean() + _contrast(rng, image, 1, 4) * rng.choice([-1, 1])
    facets = _broad(rng, image.shape[:2], 9) * _contrast(rng, image, 0.3, 1.2)
    broken = np.clip(inside + facets, 0, 255)
    return image * (1 - canvas) + broken * canvas, canvas


def _broad(rng: Rng, shape: tuple[int, int], cells: float) -> Image:
    return np.asarray(cv2.resize(smooth_noise(rng, 128, cells), (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC), np.float32)


def _stain(rng: Rng, image: Image) -> tuple[Image, Image]:
    shape = _blob(rng, image.shape[:2], 0.03, 0.2)
    tone = _contrast(rng, image, 0.6, 2) * rng.choice([-1, 1])
    return image + shape * tone * (0.8 + 0.2 * _broad(rng, image.shape[:2], 12)), shape


def _abrasion(rng: Rng, image: Image) -> tuple[Image, Image]:
    shape = _blob(rng, image.shape[:2], 0.06, 0.28)
    if rng.random() < 0.4:
        worn = cv2.GaussianBlur(image, (0, 0), rng.uniform(2, 5))
    else:
        grain = cv2.GaussianBlur(rng.standard_normal(image.shape).astype(np.float32), (0, 0), rng.uniform(0.6, 2.0))
        worn = image + grain / grain.std() * _contrast(rng, image, 0.6, 1.8)
    worn = worn + _contrast(rng, image, 0, 0.8) * rng.choice([-1, 1])
    return image * (1 - shape) + worn * shape, shape


def _shading(rng: Rng, image: Image) -> tuple[Image, Image]:
    """An uneven surface: a broad patch or band that is darker or brighter, with no edge."""
    height, width = image.shape[:2]
    if rng.random() < 0.5:
        shape = cv2.GaussianBlur(_blob(rng, (height, width), 0.15, 0.4), (0, 0), min(height, width) * rng.uniform(0.02, 0.08))
    else:
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        angle = rng.choice([0, np.pi / 2]) + rng.normal(0, 0.15)
        across = (x / width - rng.uniform(0.1, 0.9)) * np.cos(angle) + (y / height - rng.uniform(0.1, 0.9)) * np.sin(angle)
        shape = np.exp(-((across / rng.uniform(0.05, 0.25)) ** 2)).astype(np.float32)
    tone = _contrast(rng, image, 0.5, 2) * rng.choice([-1, 1])
    return image + shape * tone, np.asarray(shape, np.float32)


def _inclusion(rng: Rng, image: Image) -> tuple[Image, Image]:
    """A piece of the surface from elsewhere, turned, with another tone."""
    shape = _blob(rng, image.shape[:2], 0.03, 0.16)
    other = np.roll(np.rot90(image, 2), tuple(rng.integers(20, 200, 2)), (0, 1))
    other = np.flip(other, int(rng.integers(2))) * rng.uniform(0.6, 1.4)
    return image * (1 - shape) + np.clip(other, 0, 255) * shape, shape


DEFECTS: dict[str, Callable[[Rng, Image], tuple[Image, Image]]] = {
    "hole": _hole,
    "crack": _crack,
    "scratch": _scratch,
    "chip": _chip,
    "stain": _stain,
    "abrasion": _abrasion,
    "shading": _shading,
    "inclusion": _inclusion,
}


def add_defect(image: NDArray[np.uint8], kind: str, rng: Rng) -> tuple[NDArray[np.uint8], Mask]:
    """A copy of a grey `image` (H, W) uint8 with one defect of a kind in `DEFECTS`, and its mask (H, W).

    The mask holds the pixels that the defect changes by at least half of its strength.
    """
    changed, shape = DEFECTS[kind](rng, image.astype(np.float32))
    return np.clip(changed, 0, 255).astype(np.uint8), np.asarray(shape >= 0.5)
