"""Surfaces for training: textures at any scale and angle, blended, lit and framed as parts are, with and without defects."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from apps.industrial.synthesis.defects import DEFECTS, add_defect
from apps.industrial.synthesis.textures import TEXTURES, Rng, smooth_noise

Grey8 = NDArray[np.uint8]


def _procedural(rng: Rng, size: int) -> NDArray[np.float32]:
    return TEXTURES[str(rng.choice(list(TEXTURES)))](rng, size)


def _piece(rng: Rng, size: int, reals: Sequence[Grey8]) -> NDArray[np.float32]:
    """A texture, or a piece of a real image, turned and scaled."""
    if reals and rng.random() < 0.3:
        source = reals[int(rng.integers(len(reals)))].astype(np.float32)
        scale = size / (min(source.shape) * rng.uniform(0.25, 1.0))
    else:
        source = _procedural(rng, size)
        scale = float(np.exp(rng.uniform(np.log(0.6), np.log(2.5))))
    angle = float(rng.choice([0, 90, 180, 270])) + rng.normal(0, 4)
    centre = (rng.uniform(0.3, 0.7) * source.shape[1], rng.uniform(0.3, 0.7) * source.shape[0])
    matrix = cv2.getRotationMatrix2D(centre, angle, scale)
    matrix[:, 2] = matrix[:, 2] + size / 2 - np.array(centre)
    return np.asarray(cv2.warpAffine(source, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101), np.float32)


def _streaks(rng: Rng, size: int) -> NDArray[np.float32]:
    """Lines of grinding along one direction, of changing strength."""
    lines = cv2.GaussianBlur(rng.standard_normal((1, size)).astype(np.float32) ** 3, (0, 0), rng.uniform(0.6, 2.0))
    field = np.repeat(lines / (lines.std() + 1e-6), size, axis=0) * (1 + 0.5 * smooth_noise(rng, size, 4))
    return np.asarray(field if rng.random() < 0.5 else field.T, np.float32)


def surface(rng: Rng, size: int, reals: Sequence[Grey8] = ()) -> Grey8:
    """A good surface (size, size) uint8; `reals`: grey images of other things to take pieces of."""
    image = _piece(rng, size, reals)
    if rng.random() < 0.3:
        share = rng.uniform(0.2, 0.8)
        image = share * image + (1 - share) * _piece(rng, size, reals)
    image = (image - image.mean()) * rng.uniform(0.2, 1.0) + rng.uniform(60, 180)
    if rng.random() < 0.5:
        image = image + _streaks(rng, size) * rng.uniform(2, 14)
    if rng.random() < 0.5:
        image = image + smooth_noise(rng, size, rng.uniform(2, 5)) * rng.uniform(2, 14)
    if rng.random() < 0.3:  # the part ends inside the frame
        for axis in (0, 1):
            for end in (0, 1):
                width = int(rng.integers(0, size // 14))
                if rng.random() < 0.5 and width:
                    edge = [slice(None), slice(None)]
                    edge[axis] = slice(0, width) if end == 0 else slice(size - width, size)
                    image[tuple(edge)] = image[tuple(edge)] * 0.2 + rng.uniform(0, 60)
        image = cv2.GaussianBlur(image, (0, 0), 0.7)
    return np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)


def example(rng: Rng, size: int, reals: Sequence[Grey8] = ()) -> tuple[Grey8, NDArray[np.bool_]]:
    """A surface with a defect, two, or (half of the time) none, and the mask."""
    image, mask = surface(rng, size, reals), np.zeros((size, size), bool)
    if rng.random() < 0.5:
        for _ in range(1 if rng.random() < 0.7 else 2):
            image, drawn = add_defect(image, str(rng.choice(list(DEFECTS))), rng)
            mask |= drawn
    return image, mask
