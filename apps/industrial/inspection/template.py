"""Golden templates: a printed pattern beside the one it should be - aligned, compared, its differences as boxes."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from apps.industrial.errors import InputError
from apps.industrial.images import unusable

Grey = NDArray[np.uint8]
Mask = NDArray[np.bool_]
COARSE, LIGHT, FAR = 4, (33, 33), 0.01
"""Light is taken to be even over LIGHT times COARSE pixels; the weight of the whole image's levels there."""
EDGE = 2
"""Differences that lie within so many pixels of the other pattern's edge are jitter of the print."""
SMALLEST = 20
"""Pixels that a difference has at least after the edge was taken off."""
LARGEST_SHIFT = 24
REFINED_SIDE = 320
LOCAL, NEIGHBOURHOOD = 3, 97
"""After the alignment as a whole each place may move by LOCAL pixels, decided over NEIGHBOURHOOD of them: more than a defect."""
MARGIN = 8
"""A box reaches so far beyond the difference itself, as people draw them."""


class Difference(msgspec.Struct, frozen=True):
    """A place that differs: "missing" where the template has material (is bright), "extra" where only the tested part has."""

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
    """Compare two grey images of one size; the tested one may be moved, turned by some degrees, stretched a little and in other light.
    What lies beyond the template's edge is not judged. Raises InputError where the sizes differ, or one of them shows nothing."""
    for name, image in (("template", template), ("tested image", tested)):
        if why := unusable(image):
            raise InputError(f"the {name} can't be compared: {why}")
    if template.shape != tested.shape:
        raise InputError(f"the template has shape {list(template.shape)}, the tested image {list(tested.shape)}; expected one size")
    pattern, seen = _material(template), _material(tested)
    matrix = _alignment(pattern, seen)
    moved = _warped(pattern, matrix)
    there = _told_apart(tested, moved)
    there = _told_apart(tested, moved, there)
    wanted = _settled(moved, there)
    # Where the part lies beyond the template's edge nothing is known of it.
    known = cv2.warpAffine(np.full_like(template, 255), matrix, template.shape[::-1], borderMode=cv2.BORDER_CONSTANT) == 255
    kernel = np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * EDGE + 1, 2 * EDGE + 1)), np.uint8)
    boxes = [
        *_differences(wanted & ~_grown(there, kernel) & known, wanted & ~there & known, "missing"),
        *_differences(there & ~_grown(wanted, kernel) & known, there & ~wanted & known, "extra"),
    ]
    middle = np.array([template.shape[1] / 2, template.shape[0] / 2, 1])
    dx, dy = matrix @ middle - middle[:2]
    return Comparison(tuple(sorted(boxes, key=lambda box: -box.area)), (float(dx), float(dy)))


def _material(image: Grey) -> Mask:
    """Where the image is bright: by Otsu's threshold, then by the levels of either side nearby, as light is seldom even."""
    level, _ = cv2.threshold(image, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    bright = image > level
    for _ in range(3):
        before, bright = bright, _told_apart(image, bright)
        if np.array_equal(before, bright):
            break
    return bright


def _told_apart(image: Grey, *like: Mask) -> Mask:
    """What is nearer to the bright than to the dark level nearby: means over what is bright, and dark, in all of `like`."""
    values = image.astype(np.float32)
    size = (max(1, image.shape[1] // COARSE), max(1, image.shape[0] // COARSE))
    threshold = np.zeros(size[::-1], np.float32)
    for side in (np.logical_and.reduce(like), ~np.logical_or.reduce(like)):
        weight = side.astype(np.float32)
        near, total = (cv2.blur(cv2.resize(part, size, interpolation=cv2.INTER_AREA), LIGHT) for part in (weight, weight * values))
        mean = float(values[side].mean()) if side.any() else float(values.mean())
        threshold += (total + FAR * mean) / (near + FAR) / 2
    return np.asarray(values > cv2.resize(threshold, image.shape[::-1], interpolation=cv2.INTER_LINEAR))


def _warped(pattern: Mask, matrix: NDArray[np.float64]) -> Mask:
    grey = pattern.astype(np.uint8) * 255
    return np.asarray(cv2.warpAffine(grey, matrix, grey.shape[::-1], borderMode=cv2.BORDER_REPLICATE) >= 128)


def _alignment(pattern: Mask, seen: Mask) -> NDArray[np.float64]:
    """(2, 3) affine map from the template to the tested image: the best whole-pixel shift, refined where that fits better.

    Evangelidis and Psarakis, "Parametric Image Alignment Using Enhanced Correlation Coefficient Maximization", PAMI 2008.
    """
    template, tested = pattern.astype(np.uint8) * 255, seen.astype(np.uint8) * 255
    dx, dy = _shift(template, tested)
    start = np.array([[1, 0, dx], [0, 1, dy]], np.float64)
    scale = min(1.0, REFINED_SIDE / max(template.shape))
    small = [cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for image in (tested, template)]
    back = np.linalg.inv(np.vstack([start, [0, 0, 1]]))[:2]
    guess = (back * [1, 1, scale]).astype(np.float32)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 60, 1e-5)
    try:
        _, found = cv2.findTransformECC(small[0], small[1], guess, cv2.MOTION_AFFINE, stop, np.full_like(small[1], 255), 5)
    except cv2.error:  # nothing to hold on to, or no convergence
        return start
    refined = np.linalg.inv(np.vstack([found.astype(np.float64) * [1, 1, 1 / scale], [0, 0, 1]]))[:2]
    return min(start, refined, key=lambda matrix: float(np.mean(_warped(pattern, matrix) != seen)))


def _settled(wanted: Mask, there: Mask) -> Mask:
    """`wanted` with each place moved by at most LOCAL pixels to where its neighbourhood fits best: prints stretch unevenly."""
    best, settled = np.full(wanted.shape, np.inf, np.float32), wanted
    padded = np.pad(wanted, LOCAL, mode="edge")
    steps = range(-LOCAL, LOCAL + 1)
    for dy, dx in sorted(((y, x) for y in steps for x in steps), key=lambda step: step[0] ** 2 + step[1] ** 2):
        moved = padded[LOCAL + dy : LOCAL + dy + wanted.shape[0], LOCAL + dx : LOCAL + dx + wanted.shape[1]]
        cost = cv2.blur((moved != there).astype(np.float32), (NEIGHBOURHOOD, NEIGHBOURHOOD))
        closer = cost < best * 0.98
        best, settled = np.where(closer, cost, best), np.where(closer, moved, settled)
    return settled


def _shift(template: Grey, tested: Grey) -> tuple[float, float]:
    """The whole-pixel shift (x, y) of at most LARGEST_SHIFT that fits best; none where that is nearly as good."""
    reach = min(LARGEST_SHIFT, min(template.shape) // 8)
    middle = template[reach : template.shape[0] - reach, reach : template.shape[1] - reach]
    cost = cv2.matchTemplate(tested, middle, cv2.TM_SQDIFF)
    row, column = np.unravel_index(int(cost.argmin()), cost.shape)
    if cost[reach, reach] <= 1.02 * cost[row, column] + 1.0:
        return 0.0, 0.0
    return float(column - reach), float(row - reach)


def _grown(mask: Mask, kernel: NDArray[np.uint8]) -> Mask:
    return cv2.dilate(mask.astype(np.uint8), kernel) > 0


def _differences(sure: Mask, whole: Mask, kind: str) -> list[Difference]:
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
