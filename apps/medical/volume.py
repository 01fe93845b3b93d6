"""A volume: voxels on a regular grid, with the grid's place in the patient."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from apps.medical.errors import InputError

Affine = NDArray[np.float64]
MAX_VOXELS = 2**30
MILLIMETRES = {1: 1000.0, 3: 0.001}
"""The units that a NIfTI header may state beside millimetres: metres and micrometres."""


@dataclass(frozen=True)
class Volume:
    """`voxels` (X, Y, Z) float32 and `affine` (4 x 4): voxel index -> mm, RAS.

    `modality`: DICOM's code ("MR", "CT"), empty where unknown. `datasets`: the DICOM headers behind the
    volume, in slice order; empty for NIfTI. `description`, `patient`: for the worklist, never for logs.
    """

    voxels: NDArray[np.float32]
    affine: Affine
    modality: str = ""
    description: str = ""
    patient: str = ""
    datasets: tuple[Any, ...] = field(default=(), repr=False)
    frames: tuple[int, ...] = field(default=(), repr=False)
    """For an enhanced multi-frame object: the frame behind each slice."""
    doubts: tuple[str, ...] = ()
    """What the file leaves open about the grid, for whoever reads the result."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along each axis."""
        x, y, z = (float(v) for v in np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0)))
        return (x, y, z)

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @property
    def extent_mm(self) -> tuple[float, float, float]:
        """Size of the whole grid along each axis."""
        x, y, z = (n * s for n, s in zip(self.voxels.shape, self.spacing_mm, strict=True))
        return (x, y, z)


def checked(volume: Volume, name: str) -> Volume:
    """`volume` if a model may see it. Raises InputError for voxels that are NaN, infinite or all equal."""
    bad = int(volume.voxels.size - np.isfinite(volume.voxels).sum())
    if bad:
        raise InputError(f"{name} has {bad} voxels that are NaN or infinite; expected numbers only: export the image again")
    if float(np.ptp(volume.voxels)) == 0.0:
        raise InputError(f"{name} has the same value {float(volume.voxels.flat[0]):g} everywhere; expected an image")
    return volume


def read_nifti(path: Path, name: str | None = None) -> Volume:
    """Read a NIfTI file, in the units that it states. Raises InputError where it is not one regular 3-D image."""
    name = name or path.name
    return checked(_volume(path, name), name)


def read_labels(path: Path, image: Volume, known: Collection[int]) -> NDArray[np.uint8]:
    """The label map (X, Y, Z) of `image`, a NIfTI file on its grid. Raises InputError for another grid, and for labels that are neither 0
    nor `known`."""
    found = _volume(path, f"label map {path.name}")
    if found.voxels.shape != image.voxels.shape:
        raise InputError(
            f"label map {path.name} has shape {list(found.voxels.shape)}, its image {list(image.voxels.shape)}; expected one grid"
        )
    if not np.allclose(found.affine, image.affine, atol=1e-2):
        raise InputError(f"label map {path.name} and its image have different affines; expected one grid")
    labels = np.rint(found.voxels)
    if unknown := sorted(set(np.unique(labels).tolist()) - {0, *known}):
        seen, expected = (", ".join(f"{value:g}" for value in values) for values in (unknown[:5], (0, *known)))
        raise InputError(f"label map {path.name} holds labels {seen}; expected {expected}")
    return labels.astype(np.uint8)


def _volume(path: Path, name: str) -> Volume:
    try:
        image = nib.load(path)
        shape = tuple(int(n) for n in image.shape)
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != 3 or min(shape) < 3:
            raise InputError(f"{name} has shape {list(image.shape)}; expected one 3-D volume of at least 3 voxels a side")
        if int(np.prod(shape, dtype=np.float64)) > MAX_VOXELS:
            raise InputError(f"{name} states {np.prod(shape, dtype=np.float64):.3g} voxels, more than the {MAX_VOXELS} that are read")
        kind = image.get_data_dtype()
        if kind.kind not in "iuf":
            raise InputError(f"{name} has voxels of {kind}, such as colours or complex numbers; expected one number a voxel")
        unit = int(image.header["xyzt_units"]) & 7 if "xyzt_units" in image.header else 0
        voxels = np.asanyarray(image.dataobj, dtype=np.float32).reshape(shape)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} is not a readable NIfTI file: {type(error).__name__}: {error}; expected .nii or .nii.gz") from error
    affine = np.asarray(image.affine, dtype=np.float64) * np.array([[MILLIMETRES.get(unit, 1.0)]] * 3 + [[1.0]])
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(f"{name} has no usable orientation: its affine is not invertible; write sform or qform and try again")
    return Volume(voxels, affine, doubts=_doubts(image))


def _doubts(image: Any) -> tuple[str, ...]:
    """Where the file does not say, or says twice and differently, which way its axes point."""
    if not isinstance(image, nib.Nifti1Image):
        return ()
    sform, qform = int(image.header["sform_code"]) > 0, int(image.header["qform_code"]) > 0
    if not sform and not qform:
        return ("the file states no orientation (sform and qform are unset): left and right are a guess",)
    if not (sform and qform):
        return ()
    try:
        by_sform, by_qform = ("".join(map(str, nib.aff2axcodes(affine))) for affine in (image.get_sform(), image.get_qform()))
    except (ValueError, np.linalg.LinAlgError):  # a quaternion that is none
        return ("the file's qform can't be read: sform was followed",)
    if by_sform != by_qform:
        return (f"the file states two orientations (sform {by_sform}, qform {by_qform}): sform was followed",)
    return ()


def write_nifti(labels: NDArray[np.uint8], affine: Affine, path: Path) -> None:
    """Write a label map (X, Y, Z) on a grid in mm, RAS."""
    image = nib.Nifti1Image(labels, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
