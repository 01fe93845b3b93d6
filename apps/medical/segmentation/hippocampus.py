"""Both hippocampi of a head, or the one of a crop: where they are, their voxels, their volumes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

import shared_runtime as rt
from apps.medical.dicom.segmentation_object import Structure
from apps.medical.errors import InputError, NotHeadError
from apps.medical.preprocessing.normalise import normalise_mr
from apps.medical.segmentation.locate import Registration, register, tissue_contrast
from apps.medical.segmentation.views import merged, views
from apps.medical.segmentation.window import CROP, MODEL, WINDOW, place_in_window
from apps.medical.volume import Volume

Array = NDArray[np.float64]

CENTRES_MM = {"left": (-27.0, -21.0, -14.0), "right": (27.0, -21.0, -14.0)}
"""Middle of each hippocampus in the template [mm, RAS]."""
CROP_LIMIT_MM = 90.0
"""An image no larger than this along any axis is a crop around one hippocampus."""
LARGEST_MM = 1000.0
REFUSE_SIMILARITY, DOUBT_SIMILARITY = 0.56, 0.66
REFUSE_COVERAGE, DOUBT_COVERAGE = 0.45, 0.75
REFUSE_CONTRAST, DOUBT_CONTRAST = 1.1, 1.18
PLAUSIBLE_ML = (1.2, 6.0)
ASYMMETRY_PERCENT = 30.0
CONFIDENCE = 0.93
"""Mean probability of what was segmented: 0.96 and more in all cases of the training source, less elsewhere."""
CROP_MINIMUM_ML = 0.5
AT_ONCE = 2
"""Views in one run of the network: more take as long each and more memory."""
THICK_MM = 2.5

ANTERIOR, POSTERIOR = (242, 142, 43), (78, 166, 214)
LIGHT_ANTERIOR, LIGHT_POSTERIOR = (255, 196, 120), (150, 210, 240)
CROP_STRUCTURES = (
    Structure(1, "anterior hippocampus", "", "anterior", ANTERIOR),
    Structure(2, "posterior hippocampus", "", "posterior", POSTERIOR),
)
HEAD_STRUCTURES = (
    Structure(1, "left anterior hippocampus", "left", "anterior", ANTERIOR),
    Structure(2, "left posterior hippocampus", "left", "posterior", POSTERIOR),
    Structure(3, "right anterior hippocampus", "right", "anterior", LIGHT_ANTERIOR),
    Structure(4, "right posterior hippocampus", "right", "posterior", LIGHT_POSTERIOR),
)


@dataclass(frozen=True)
class Segmentation:
    """`labels` (X, Y, Z) uint8 on the volume's grid; `structures` name its values.

    `volumes_ml` by structure and, for a head, by side. `flags`: what a reader should doubt, in words.
    `seconds`: time by step. `quality`: the numbers behind the flags.
    """

    labels: NDArray[np.uint8]
    structures: tuple[Structure, ...]
    volumes_ml: Mapping[str, float]
    flags: tuple[str, ...]
    seconds: Mapping[str, float]
    quality: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Window:
    """Class probabilities (3, *WINDOW) on a 1 mm grid with `frame`: window index -> mm RAS."""

    probability: NDArray[np.float32]
    frame: Array

    def foreground(self) -> NDArray[np.bool_]:
        """The largest connected part that is more likely hippocampus than not."""
        mask = np.asarray(self.probability[0] < 0.5)
        parts, count = ndimage.label(mask)
        if count < 2:
            return mask
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        return np.asarray(parts == sizes.argmax())


def segment_hippocampi(volume: Volume, session: rt.Session) -> Segmentation:
    """Segment a T1 head (both sides) or a crop around one hippocampus.

    Raises InputError for another modality than MR, NotHeadError where the image does not look like a T1
    head, or holds too little of one.
    """
    if volume.modality not in ("", "MR"):
        raise InputError(f"the image has modality {volume.modality}; {MODEL} expects T1-weighted MR: send the MR series")
    if max(volume.extent_mm) > LARGEST_MM:
        raise NotHeadError(
            f"the image measures {_rounded(volume.extent_mm)} mm, with voxels of {_rounded(volume.spacing_mm)}; "
            f"expected a head of at most {LARGEST_MM:g}: correct its voxel size or its unit"
        )
    if min(volume.voxels.shape) < 4:
        raise NotHeadError(f"the image has {' x '.join(map(str, volume.voxels.shape))} voxels; expected 4 or more a side")
    if max(volume.extent_mm) <= CROP_LIMIT_MM:
        return _segment_crop(volume, session)
    return _segment_head(volume, session)


def _segment_crop(volume: Volume, session: rt.Session) -> Segmentation:
    if min(volume.extent_mm) < 15:
        raise NotHeadError(f"the image measures {_rounded(volume.extent_mm)} mm; expected a whole head, or a crop of at least 15 mm a side")
    start = time.monotonic()
    centre, axes = _crop_pose(volume)
    window = _infer(volume, session, _frame(axes, centre), crop=None)
    outside = max(volume.extent_mm[i] - WINDOW[i] for i in range(3)) > 4
    if outside:
        window = _search(volume, session, axes, centre)
    inferred = time.monotonic()
    labels = _to_grid(volume, [(window, window.foreground(), 0)])
    volumes = _volumes(volume, labels, CROP_STRUCTURES)
    volumes["hippocampus"] = sum(volumes.values())
    flags, quality = _structure_flags("hippocampus", volumes["hippocampus"], window)
    if volumes["hippocampus"] < CROP_MINIMUM_ML:
        raise NotHeadError(
            f"no hippocampus was found in the crop ({volumes['hippocampus']:.2f} mL at most, expected {CROP_MINIMUM_ML} or more); "
            "expected a T1 head, or a crop around one hippocampus"
        )
    flags += _grid_flags(volume)
    done = time.monotonic()
    return Segmentation(
        labels, CROP_STRUCTURES, volumes, tuple(flags), {"locate": 0.0, "segment": inferred - start, "resample": done - inferred}, quality
    )


def _segment_head(volume: Volume, session: rt.Session) -> Segmentation:
    start = time.monotonic()
    registration = register(volume.voxels, volume.affine)
    flags = _head_flags(volume, registration)
    located = time.monotonic()
    windows = []
    quality = {"similarity": registration.similarity, "coverage": registration.coverage}
    for side, place in CENTRES_MM.items():
        window = _settled(volume, session, registration.rotation(), registration.point(place))
        windows.append((side, window, window.foreground()))
    inferred = time.monotonic()
    labels = _to_grid(volume, [(window, mask, 0 if side == "left" else 2) for side, window, mask in windows])
    volumes = _volumes(volume, labels, HEAD_STRUCTURES)
    for side, window, _ in windows:
        whole = sum(volumes[s.name] for s in HEAD_STRUCTURES if s.side == side)
        volumes[f"{side} hippocampus"] = whole
        side_flags, side_quality = _structure_flags(f"{side} hippocampus", whole, window)
        flags += side_flags
        quality |= side_quality
    left, right = volumes["left hippocampus"], volumes["right hippocampus"]
    if left + right == 0:
        raise NotHeadError("no hippocampus was found at the place where a head has it; expected a T1 head")
    asymmetry = 200 * abs(left - right) / (left + right)
    quality["asymmetry_percent"] = asymmetry
    if asymmetry > ASYMMETRY_PERCENT:
        flags.append(f"the sides differ by {asymmetry:.0f} % in volume (left {left:.2f} mL, right {right:.2f} mL)")
    flags += _edge_flags(labels, HEAD_STRUCTURES)
    done = time.monotonic()
    return Segmentation(
        labels,
        HEAD_STRUCTURES,
        volumes,
        tuple(flags + _grid_flags(volume)),
        {"locate": located - start, "segment": inferred - located, "resample": done - inferred},
        quality,
    )


def _head_flags(volume: Volume, registration: Registration) -> list[str]:
    """Doubts about the image as a whole. Raises NotHeadError where it should not be segmented."""
    size = _rounded(volume.extent_mm)
    if registration.similarity < REFUSE_SIMILARITY:
        raise NotHeadError(
            f"the image ({size} mm) does not look like a T1 head: its likeness to an average brain is {registration.similarity:.2f}, "
            f"expected at least {REFUSE_SIMILARITY}"
        )
    if registration.coverage < REFUSE_COVERAGE:
        raise NotHeadError(
            f"the image ({size} mm) holds {100 * registration.coverage:.0f} % of the brain, expected at least {100 * REFUSE_COVERAGE:.0f} %"
        )
    contrast = tissue_contrast(volume.voxels, volume.affine, registration)
    if contrast < REFUSE_CONTRAST:
        raise NotHeadError(
            f"white matter is {contrast:.2f} times as bright as grey matter, expected more than {REFUSE_CONTRAST} as in T1-weighted MR; "
            "this looks like T2, FLAIR or another contrast"
        )
    flags = []
    if contrast < DOUBT_CONTRAST:
        flags.append(f"weak T1 contrast (white over grey matter {contrast:.2f}): check that the series is T1-weighted")
    if registration.similarity < DOUBT_SIMILARITY:
        flags.append(f"weak likeness to an average brain ({registration.similarity:.2f}): check the place of the structures")
    if registration.coverage < DOUBT_COVERAGE:
        flags.append(f"only {100 * registration.coverage:.0f} % of the brain lies in the image")
    return flags


def _structure_flags(name: str, volume_ml: float, window: _Window) -> tuple[list[str], dict[str, float]]:
    mask = window.foreground()
    confidence = float(1 - window.probability[0][mask].mean()) if mask.any() else 0.0
    flags = []
    if not PLAUSIBLE_ML[0] <= volume_ml <= PLAUSIBLE_ML[1]:
        flags.append(f"{name}: {volume_ml:.2f} mL is outside of {PLAUSIBLE_ML[0]}-{PLAUSIBLE_ML[1]} mL")
    if confidence < CONFIDENCE:
        flags.append(f"{name}: the model is unsure (mean probability {confidence:.2f})")
    return flags, {f"{name} confidence": confidence}


def _edge_flags(labels: NDArray[np.uint8], structures: Sequence[Structure]) -> list[str]:
    """Structures that the image's border cuts: their volumes are too small."""
    border = {int(v) for axis in range(3) for edge in (0, -1) for v in np.unique(labels.take(edge, axis=axis))}
    return [f"{s.name}: it is cut by the edge of the image" for s in structures if s.value in border]


def _grid_flags(volume: Volume) -> list[str]:
    coarse = max(volume.spacing_mm) > THICK_MM
    return [*volume.doubts, *([f"voxels of {_rounded(volume.spacing_mm)} mm are coarse for volumes of this size"] if coarse else [])]


def _rounded(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in values)


def _crop_pose(volume: Volume) -> tuple[Array, Array]:
    """Where the window's middle goes in a crop, and the directions of its axes, in the order and sense nearest to RAS.

    The window has an even number of voxels: along an axis with an odd number its middle lies half a voxel on,
    so that a crop of 1 mm voxels is seen as it is and nothing is interpolated.
    """
    linear = volume.affine[:3, :3] / np.array(volume.spacing_mm)
    order = [int(i) for i in _nearest_axes(linear)]
    axes = np.stack([linear[:, i] * np.sign(linear[row, i]) for row, i in enumerate(order)], axis=1)
    shape = np.array(volume.voxels.shape)
    middle = (shape - 1 + shape % 2) / 2
    return volume.affine[:3, :3] @ middle + volume.affine[:3, 3], axes


def _nearest_axes(linear: Array) -> list[int]:
    """For R, A and S the image axis that runs most along it, each axis used once."""
    left, taken = np.abs(linear).copy(), [0, 0, 0]
    for _ in range(3):
        row, column = (int(i) for i in np.unravel_index(left.argmax(), (3, 3)))
        taken[row] = column
        left[row, :] = left[:, column] = -1
    return taken


def _frame(axes: Array, centre: Array) -> Array:
    """Window index -> mm, with the window's middle at `centre`."""
    frame = np.eye(4)
    frame[:3, :3] = axes
    frame[:3, 3] = centre - axes @ ((np.array(WINDOW) - 1) / 2)
    return frame


def _sampled(volume: Volume, frame: Array) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The image on a window's grid (linear), and where the image has voxels."""
    matrix = np.linalg.inv(volume.affine) @ frame
    size = np.array(volume.spacing_mm)
    blur = np.where(size < 0.75, 0.5 * np.sqrt(np.maximum(1 / size**2 - 1, 0)), 0.0)
    corners = np.array([[i, j, k, 1] for i in (0, WINDOW[0]) for j in (0, WINDOW[1]) for k in (0, WINDOW[2])]) @ matrix.T
    low = np.clip(np.floor(corners[:, :3].min(0)) - 6, 0, None).astype(int)
    high = np.clip(np.ceil(corners[:, :3].max(0)) + 7, 0, np.array(volume.voxels.shape)).astype(int)
    high = np.maximum(high, low + 1)
    part = volume.voxels[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    if part.size == 0:
        return np.zeros(WINDOW, np.float32), np.zeros(WINDOW, bool)
    part = ndimage.gaussian_filter(part, blur) if blur.any() else part
    offset = matrix[:3, 3] - low
    values = ndimage.affine_transform(part, matrix[:3, :3], offset, WINDOW, order=1, mode="nearest")
    index = np.indices(WINDOW).reshape(3, -1)
    place = matrix[:3, :3] @ index + matrix[:3, 3:]
    shape = np.array(volume.voxels.shape)[:, None]
    inside = ((place >= -0.501) & (place <= shape - 0.499)).all(axis=0).reshape(WINDOW)
    return values.astype(np.float32), np.asarray(inside)


def _infer(volume: Volume, session: rt.Session, frame: Array, crop: tuple[int, int, int] | None, *, glance: bool = False) -> _Window:
    """Run the network on one window: the mean over its views, or on the window alone for a `glance`.

    `crop`: how much of the window's middle is shown, the rest is left empty as around a training crop.
    """
    values, inside = _sampled(volume, frame)
    if crop is not None:
        inside &= np.asarray(place_in_window(np.ones(crop, bool), bool))
    window = np.zeros(WINDOW, np.float32)
    if inside.any():
        window[inside] = normalise_mr(values[inside])
    seen = window[None, None] if glance else views(window)
    logits = np.concatenate([session.run({"image": seen[i : i + AT_ONCE]})["logits"] for i in range(0, len(seen), AT_ONCE)])
    exponential = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability = exponential / exponential.sum(axis=1, keepdims=True)
    mean = probability[0] if glance else merged(probability)
    mean[:, ~inside] = np.array([1.0, 0.0, 0.0], np.float32)[:, None]
    return _Window(mean.astype(np.float32), frame)


def _settled(volume: Volume, session: rt.Session, axes: Array, centre: Array) -> _Window:
    """The window around a hippocampus, moved onto what was found until it is in the middle."""
    for _ in range(2):
        window = _infer(volume, session, _frame(axes, centre), CROP, glance=True)
        mask = window.foreground()
        if mask.sum() < 300:
            break
        middle = np.argwhere(mask).mean(axis=0)
        found = window.frame[:3, :3] @ middle + window.frame[:3, 3]
        moved = np.linalg.norm(found - centre)
        if moved < 1.0 or moved > 25:
            break
        centre = found
    return _infer(volume, session, _frame(axes, centre), CROP)


def _search(volume: Volume, session: rt.Session, axes: Array, centre: Array) -> _Window:
    """For a crop larger than the window: the place, on a coarse grid, where most hippocampus is seen."""
    order = _nearest_axes(volume.affine[:3, :3] / np.array(volume.spacing_mm))
    extents = np.array(volume.extent_mm)[order]
    reach = [max(0.0, (extent - size) / 2 + 4) for extent, size in zip(extents, CROP, strict=True)]
    steps = [np.linspace(-r, r, max(1, int(np.ceil(2 * r / 12)) + 1)) if r > 4 else np.zeros(1) for r in reach]
    best, most = centre, -1.0
    for shift in np.stack(np.meshgrid(*steps, indexing="ij"), -1).reshape(-1, 3):
        place = centre + axes @ shift
        window = _infer(volume, session, _frame(axes, place), CROP, glance=True)
        mask = window.foreground()
        amount = float((1 - window.probability[0][mask]).sum())
        if amount > most:
            best, most = place, amount
    return _settled(volume, session, axes, best)


def _to_grid(volume: Volume, parts: Sequence[tuple[_Window, NDArray[np.bool_], int]]) -> NDArray[np.uint8]:
    """Label map on the image's grid; `parts` holds windows, their kept voxels and the first label less one."""
    labels = np.zeros(volume.voxels.shape, np.uint8)
    best = np.full(volume.voxels.shape, 0.5, np.float32)
    for window, mask, offset in parts:
        if not mask.any():
            continue
        matrix = np.linalg.inv(window.frame) @ volume.affine
        near = ndimage.binary_dilation(mask, iterations=2)
        probability = np.where(near[None], window.probability, np.array([1, 0, 0], np.float32)[:, None, None, None])
        inverse = np.linalg.inv(matrix)
        corners = np.argwhere(near) @ inverse[:3, :3].T + inverse[:3, 3]
        low = np.clip(np.floor(corners.min(0)) - 1, 0, None).astype(int)
        high = np.clip(np.ceil(corners.max(0)) + 2, 0, np.array(labels.shape)).astype(int)
        if (high <= low).any():
            continue
        shape = tuple(int(n) for n in high - low)
        start = matrix[:3, :3] @ low + matrix[:3, 3]
        foreground, posterior = (
            ndimage.affine_transform(p, matrix[:3, :3], start, shape, order=1, mode="constant")
            for p in (1 - probability[0], probability[2])
        )
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        take = foreground > best[box]
        labels[box] = np.where(take, np.where(posterior > foreground / 2, offset + 2, offset + 1), labels[box])
        best[box] = np.where(take, foreground, best[box])
    return labels


def _volumes(volume: Volume, labels: NDArray[np.uint8], structures: Sequence[Structure]) -> dict[str, float]:
    counts = np.bincount(labels.ravel(), minlength=8)
    return {s.name: float(counts[s.value]) * volume.voxel_ml for s in structures}
