"""Finds the brain in a whole head: affine registration of an average T1 brain onto the image.

The fixed image is the MNI152 average brain (Fonov et al., NeuroImage 54 (2011)) that nilearn carries. It
has no skull, so the similarity is read inside its brain alone: normalised correlation over a fixed set of
template points, which neither fat nor neck nor background of the head can enter. A coarse search over
poses makes the start independent of how the head lies in the scanner.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

from apps.medical.errors import MedicalError

Array = NDArray[np.float64]

TEMPLATE_FILE = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
WHITE_FILE = "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz"
GREY_FILE = "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz"
SEARCH_MM, COARSE_MM, FINE_MM = 16.0, 10.0, 4.0
"""Spacing of the template points in the search over poses and in the two refinements."""
SIZES = (1.0, 0.85)
"""Sizes of a head, over that of the average brain (which is larger than most), that the search begins with."""


@dataclass(frozen=True)
class Registration:
    """Where the template brain lies in an image.

    `matrix`: 4 x 4, template mm (RAS) -> image mm (RAS). `similarity`: normalised correlation over the
    brain, -1 to 1. `coverage`: share of the brain that the image holds, 0 to 1.
    """

    matrix: Array
    similarity: float
    coverage: float

    def rotation(self) -> Array:
        """The nearest rotation (3 x 3) to the linear part, by polar decomposition."""
        left, _, right = np.linalg.svd(self.matrix[:3, :3])
        return np.asarray(left @ right)

    def point(self, template_mm: tuple[float, float, float]) -> Array:
        """A template position [mm, RAS] in the image [mm, RAS]."""
        return np.asarray(self.matrix[:3, :3] @ np.asarray(template_mm) + self.matrix[:3, 3])


@cache
def _nilearn_image(name: str) -> tuple[Array, Array]:
    """One of the templates in the installed nilearn (which is not imported): voxels and affine, RAS."""
    spec = importlib.util.find_spec("nilearn")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [path for root in roots for path in Path(root).rglob(name)]
    if not found:
        raise MedicalError(
            f"the MNI152 template {name} was not found in the nilearn package; "
            "whole heads need it: reinstall with 'pip install --force-reinstall nilearn'"
        )
    image = nib.as_closest_canonical(nib.load(found[0]))
    voxels = np.nan_to_num(np.asanyarray(image.dataobj, dtype=np.float64))
    return voxels, np.asarray(image.affine)


@cache
def _template() -> tuple[Array, Array]:
    """The average T1 brain smoothed to 3 mm, on a grid of 2 mm (X, Y, Z), and its affine."""
    voxels, affine = _nilearn_image(TEMPLATE_FILE)
    return ndimage.gaussian_filter(voxels, 1.5)[::2, ::2, ::2], affine @ np.diag([2.0, 2.0, 2.0, 1.0])


@cache
def _comparable_template() -> NDArray[np.float32]:
    voxels, affine = _template()
    return _comparable(voxels.astype(np.float32), np.sqrt((affine[:3, :3] ** 2).sum(0)))


@cache
def _points(spacing_mm: float, margin_mm: float) -> tuple[Array, Array]:
    """Template positions (N, 3) [mm] inside the brain grown by `margin_mm`, and their intensities (N,)."""
    voxels, affine = _template()
    brain = ndimage.binary_fill_holes(voxels > 0.15 * voxels.max())
    grown = ndimage.binary_dilation(brain, iterations=round(margin_mm / 2))
    step = round(spacing_mm / 2)
    picked = np.zeros_like(grown)
    picked[step // 2 :: step, step // 2 :: step, step // 2 :: step] = True
    index = np.argwhere(grown & picked)
    return index @ affine[:3, :3].T + affine[:3, 3], _comparable_template()[tuple(index.T)].astype(np.float64)


def _equalised(values: NDArray[np.float32], floor: float) -> NDArray[np.float32]:
    """Ranks (0 to 1) of the values above `floor`, 0 below: the same for any monotonic change of contrast.

    Fat, the brightest tissue of a T1 head, then lies close to white matter and can't outweigh the brain.
    """
    inside = values > floor
    if not inside.any():
        return np.zeros(values.shape, np.float32)
    quantiles = np.quantile(values[inside], np.linspace(0, 1, 257))
    ranks = np.interp(values, quantiles, np.linspace(0.0, 1.0, 257))
    return np.where(inside, ranks, 0).astype(np.float32)


def _evened(values: NDArray[np.float32], floor: float, sigma_voxels: Array) -> NDArray[np.float32]:
    """`values` over their local mean above `floor`: takes out the slow shading of a surface coil."""
    inside = (values > floor).astype(np.float32)
    mean = ndimage.gaussian_filter(values * inside, sigma_voxels, truncate=2.5)
    share = ndimage.gaussian_filter(inside, sigma_voxels, truncate=2.5)
    return np.where(inside > 0, values * share / np.maximum(mean, 1e-6 * float(np.abs(values).max()) + 1e-30), 0)


def _comparable(values: NDArray[np.float32], voxel_mm: Array, *, equalise: bool = True) -> NDArray[np.float32]:
    """Shading evened over 25 mm, then equalised: what image and template are compared in."""
    low = float(values.min())
    floor = 0.1 * (float(np.quantile(values, 0.98)) - low)
    even = _evened(values - low, floor, 25.0 / voxel_mm)
    return _equalised(even, 0.0) if equalise else even


class _Image:
    """The head on a coarse regular grid, equalised, sampled by millimetres."""

    def __init__(self, voxels: NDArray[np.float32], affine: Array, spacing_mm: float = 2.0, *, evened_only: bool = False) -> None:
        size = np.sqrt((affine[:3, :3] ** 2).sum(0))
        step = np.maximum(1, np.floor(spacing_mm / size + 1e-6)).astype(int)
        smooth = ndimage.gaussian_filter(voxels.astype(np.float32), 0.75 * spacing_mm / size)
        coarse = smooth[:: step[0], :: step[1], :: step[2]]
        self.voxels = _comparable(coarse, size * step, equalise=not evened_only)
        self.inverse = np.linalg.inv(affine @ np.diag([*step, 1.0]))
        self.affine = affine @ np.diag([*step, 1.0])

    def at(self, points_mm: Array) -> Array:
        """Intensities at (N, 3) positions; NaN outside of the image."""
        index = self.inverse[:3, :3] @ points_mm.T + self.inverse[:3, 3:]
        return np.asarray(ndimage.map_coordinates(self.voxels, index, order=1, mode="constant", cval=np.nan))


def _matrix(parameters: Array, centre: Array) -> Array:
    """4 x 4 from 3 shifts [cm], 3 angles [0.1 rad], 3 log scales [0.1], 3 shears [0.1], about `centre`."""
    shift, angle, scale, shear = parameters[:3] * 10, parameters[3:6] * 0.1, parameters[6:9] * 0.1, parameters[9:] * 0.1
    cx, cy, cz = np.cos(angle)
    sx, sy, sz = np.sin(angle)
    turn_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    turn_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    turn_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    upper = np.array([[1, shear[0], shear[1]], [0, 1, shear[2]], [0, 0, 1]])
    result = np.eye(4)
    result[:3, :3] = turn_z @ turn_y @ turn_x @ upper @ np.diag(np.exp(scale))
    result[:3, 3] = centre + shift
    return result


def _similarity(image: _Image, matrix: Array, points: Array, values: Array) -> tuple[float, float]:
    """Normalised correlation over the points that lie in the image, and their share."""
    sampled = image.at(points @ matrix[:3, :3].T + matrix[:3, 3])
    inside = ~np.isnan(sampled)
    coverage = float(inside.mean())
    if inside.sum() < 20:
        return -1.0, coverage
    a, b = sampled[inside], values[inside]
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return (float((a * b).sum()) / norm if norm > 0 else -1.0), coverage


TYPICAL = np.array([-0.7, -0.7, -0.7, 0.0, 0.0, 0.0])
"""Scales and shears of an ordinary head, in the units of `_matrix`: 7 % smaller than the average brain's."""


def _cost(parameters: Array, image: _Image, centre: Array, points: Array, values: Array) -> float:
    full = np.concatenate([np.zeros(6), TYPICAL])
    full[: len(parameters)] = parameters
    similarity, coverage = _similarity(image, _matrix(full, centre), points, values)
    stretch = 0.005 * float(((full[6:] - TYPICAL) ** 2).sum())
    return -similarity * min(1.0, coverage / 0.7) + stretch


def _starts(image: _Image, points: Array, values: Array) -> list[tuple[float, Array]]:
    """Poses (shift, pitch, roll, yaw) and sizes over the whole image, best first, as parameters about the origin."""
    shape = np.array(image.voxels.shape)
    corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (shape - 1)
    mm = corners @ image.affine[:3, :3].T + image.affine[:3, 3]
    low, high = mm.min(0), mm.max(0)
    grids = [np.arange(a + 0.05 * (b - a), b - 0.05 * (b - a) + 1, 14.0) for a, b in zip(low, high, strict=True)]
    found = []
    for pitch in (-0.4, 0.0, 0.4):
        for roll, yaw in ((0.0, 0.0), (0.3, 0.0), (-0.3, 0.0), (0.0, 0.3), (0.0, -0.3)):
            for shift in np.stack(np.meshgrid(*grids, indexing="ij"), -1).reshape(-1, 3):
                for size in SIZES:
                    parameters = np.array([*(shift / 10), pitch * 10, roll * 10, yaw * 10, *[10 * np.log(size)] * 3])
                    found.append((_cost(parameters, image, np.zeros(3), points, values), parameters))
    return sorted(found, key=lambda item: item[0])


def _distinct(starts: list[tuple[float, Array]], number: int) -> list[Array]:
    """The best starts that differ by more than 2 cm, 0.25 rad or 8 % in size from each better one."""
    kept: list[Array] = []
    apart = np.array([2.0, 2.0, 2.0, 2.5, 2.5, 2.5, 0.8, 0.8, 0.8])
    for _, candidate in starts:
        if all((np.abs(candidate - other) / apart).max() > 1 for other in kept):
            kept.append(candidate)
        if len(kept) == number:
            break
    return kept


def _refined(start: Array, freedom: int, image: _Image, spacing_mm: float, sweeps: int) -> tuple[float, Array]:
    """Powell's method from `start` with the first `freedom` parameters: (cost, parameters)."""
    padded = np.concatenate([start, np.zeros(12)])[:freedom]
    arguments = (image, np.zeros(3), *_points(spacing_mm, 3.0))
    found = optimize.minimize(_cost, padded, arguments, "Powell", options={"xtol": 0.02, "ftol": 5e-4, "maxiter": sweeps})
    return float(found.fun), found.x


def register(voxels: NDArray[np.float32], affine: Array) -> Registration:
    """Register the template brain to a head of any position within about 30 degrees of upright.

    `voxels`: (X, Y, Z) float32, `affine`: voxel index -> mm (RAS). Always returns its best answer:
    `similarity` and `coverage` say whether to believe it.
    """
    image = _Image(voxels, affine)
    starts = _distinct(_starts(image, *_points(SEARCH_MM, 3.0)), 18)
    posed = [_refined(start, 9, image, COARSE_MM, 2) for start in starts]
    scaled = [_refined(start, 9, image, COARSE_MM, 4) for _, start in sorted(posed, key=lambda item: item[0])[:5]]
    _, start = min(scaled, key=lambda item: item[0])
    _, parameters = _refined(start, 12, image, FINE_MM, 4)
    matrix = _matrix(parameters, np.zeros(3))
    similarity, coverage = _similarity(image, matrix, *_points(FINE_MM, 3.0))
    return Registration(matrix, similarity, coverage)


def tissue_contrast(voxels: NDArray[np.float32], affine: Array, registration: Registration) -> float:
    """Brightness of white over grey matter, shading evened; above 1 in T1-weighted MR, below in T2 and FLAIR.

    Read where the registered template is surely the one or the other, above the image's darkest value.
    """
    image = _Image(voxels, affine, evened_only=True)
    means = []
    for name in (WHITE_FILE, GREY_FILE):
        share, template_affine = _nilearn_image(name)
        index = np.argwhere(share[::3, ::3, ::3] > 0.85 * share.max()) * 3
        points = index @ template_affine[:3, :3].T + template_affine[:3, 3]
        sampled = image.at(points @ registration.matrix[:3, :3].T + registration.matrix[:3, 3])
        sampled = sampled[~np.isnan(sampled)]
        means.append(float(np.median(sampled)) if sampled.size else 0.0)
    return means[0] / means[1] if means[1] > 0 else 0.0
