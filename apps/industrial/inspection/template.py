"""Golden templates: a printed pattern beside the one it should be - aligned, compared, its differences as boxes."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from apps.industrial.errors import InputError

Grey = NDArray[np.uint8]
EDGE = 2
"""Differences that lie within so many pixels of the other pattern's edge are jitter of the print."""
SMALLEST = 8
"""Pixels that a difference has at least after the edge was taken off."""
LARGEST_SHIFT = 24
MARGIN = 5
"""A box reaches so far beyond the difference itself, as people draw them."""


class Difference(msgspec.Struct, frozen=True):
    """A place that differs: "missing" where the template has material, "extra" where only the tested part has."""

    x: int
    y: int
    width: int
    height: int
    area: int
    kind: str


@dataclass(frozen=True)
class Comparison:
    """`boxes`, largest first, on the tested image; `shift` (x, y): how far it lay from the template [pixels]."""

    boxes: tuple[Difference, ...]
    shift: tuple[float, float]


def compare(template: Grey, tested: Grey) -> Comparison:
    """Compare two grey images of one size. Raises InputError where the sizes differ or nothing fits."""
    if template.shape != tested.shape:
        raise InputError(f"the template has shape {list(template.shape)}, the tested image {list(tested.shape)}; expected one size")
    dx, dy = _shift(template, tested)
    matrix = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
    moved = cv2.warpAffine(template, matrix, template.shape[::-1], borderMode=cv2.BORDER_REPLICATE) if dx or dy else template
    wanted, there = moved >= 128, tested >= 128
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * EDGE + 1, 2 * EDGE + 1))
    boxes = [
        *_differences(wanted & ~_grown(there, kernel), wanted & ~there, "missing"),
        *_differences(there & ~_grown(wanted, kernel), there & ~wanted, "extra"),
    ]
    return Comparison(tuple(sorted(boxes, key=lambda box: -box.area)), (float(dx), float(dy)))


def _shift(template: Grey, tested: Grey) -> tuple[float, float]:
    """The whole-pixel shift (x, y) of at most LARGEST_SHIFT that fits best; none where that is nearly as good."""
    reach = min(LARGEST_SHIFT, min(template.shape) // 8)
    middle = template[reach : template.shape[0] - reach, reach : template.shape[1] - reach]
    cost = cv2.matchTemplate(tested, middle, cv2.TM_SQDIFF)
    row, column = np.unravel_index(int(cost.argmin()), cost.shape)
    if cost[reach, reach] <= 1.02 * cost[row, column] + 1.0:
        return 0.0, 0.0
    return float(column - reach), float(row - reach)


def _grown(mask: NDArray[np.bool_], kernel: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return cv2.dilate(mask.astype(np.uint8), kernel) > 0


def _differences(sure: NDArray[np.bool_], whole: NDArray[np.bool_], kind: str) -> list[Difference]:
    """Parts of `whole` that hold something `sure`: the difference with its edge, without the jitter elsewhere."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(whole.astype(np.uint8), connectivity=8)
    inside = np.bincount(labels[sure], minlength=count)
    found = []
    height, width = whole.shape
    for index in range(1, count):
        if inside[index] == 0 or stats[index][4] < SMALLEST:
            continue
        ys, xs = np.nonzero(sure & (labels == index)) if inside[index] < stats[index][4] // 4 else np.nonzero(labels == index)
        left, top = max(0, int(xs.min()) - MARGIN), max(0, int(ys.min()) - MARGIN)
        right, bottom = min(width, int(xs.max()) + 1 + MARGIN), min(height, int(ys.max()) + 1 + MARGIN)
        found.append(Difference(left, top, right - left, bottom - top, int(stats[index][4]), kind))
    return found
