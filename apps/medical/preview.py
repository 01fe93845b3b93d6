"""The preview: three planes through each structure's middle, with coloured outlines and side letters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from apps.medical.dicom.segmentation_object import Structure
from apps.medical.volume import Volume

HEIGHT = 300
PLANES = (("axial", 2, (0, 1)), ("coronal", 1, (0, 2)), ("sagittal", 0, (1, 2)))


def canonical(voxels: NDArray[np.generic], affine: NDArray[np.float64]) -> nib.Nifti1Image:
    """The array with its axes nearest to right, anterior, superior; no resampling."""
    return nib.as_closest_canonical(nib.Nifti1Image(voxels, affine))


def display_range(voxels: NDArray[Any]) -> tuple[float, float]:
    """Intensities shown as black and white: percentiles 0.1 and 99.7."""
    low, high = np.percentile(voxels, (0.1, 99.7))
    return float(low), float(max(high, low + 1e-6))


def write_preview(volume: Volume, labels: NDArray[np.uint8], structures: Sequence[Structure], path: Path) -> None:
    """Write a PNG: a row a side (or one), radiological convention (the patient's right is on the left)."""
    image = canonical(volume.voxels, volume.affine)
    mask = np.asanyarray(canonical(labels, volume.affine).dataobj)
    voxels = np.asanyarray(image.dataobj)
    low, high = display_range(voxels)
    grey = (np.clip((voxels - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    spacing = np.sqrt((image.affine[:3, :3] ** 2).sum(0))
    rows = []
    for side in dict.fromkeys(s.side for s in structures):
        values = [s.value for s in structures if s.side == side]
        index = np.argwhere(np.isin(mask, values))
        centre = index.mean(0).round().astype(int) if len(index) else np.array(mask.shape) // 2
        rows.append([_plane(grey, mask, structures, spacing, centre, *plane, side) for plane in PLANES])
    width = max(sum(tile.width for tile in row) for row in rows)
    sheet = Image.new("RGB", (width, HEIGHT * len(rows)))
    for number, row in enumerate(rows):
        left = 0
        for tile in row:
            sheet.paste(tile, (left, number * HEIGHT))
            left += tile.width
    sheet.save(path)


def _plane(
    grey: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    structures: Sequence[Structure],
    spacing: NDArray[np.float64],
    centre: NDArray[np.int_],
    name: str,
    axis: int,
    axes: tuple[int, int],
    side: str,
) -> Image.Image:
    across, up = axes
    pixels = np.take(grey, centre[axis], axis=axis).T[::-1]
    labels = np.take(mask, centre[axis], axis=axis).T[::-1]
    if across == 0:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    size = (max(1, round(HEIGHT * pixels.shape[1] * spacing[across] / (pixels.shape[0] * spacing[up]))), HEIGHT)
    colour = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BILINEAR).convert("RGB")).copy()
    large = np.asarray(Image.fromarray(np.ascontiguousarray(labels)).resize(size, Image.Resampling.NEAREST))
    for structure in structures:
        part = large == structure.value
        colour[part & ~ndimage.binary_erosion(part)] = structure.colour
    tile = Image.fromarray(colour)
    draw = ImageDraw.Draw(tile)
    draw.text((6, HEIGHT - 16), f"{name} {side}".strip(), fill=(200, 200, 200))
    if across == 0:
        draw.text((6, HEIGHT // 2), "R", fill=(255, 255, 255))
        draw.text((size[0] - 14, HEIGHT // 2), "L", fill=(255, 255, 255))
    return tile
