"""Series: grouping instances, ordering slices by position, and the one regular volume they form.

Geometry after DICOM PS3.3 C.7.6.2 (Image Plane) and C.7.6.16 (Multi-frame Functional Groups).
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset

from apps.medical.dicom.decode import decoded
from apps.medical.errors import InputError, SeriesError
from apps.medical.volume import Volume, checked

IMAGE_MODALITIES = ("MR", "CT", "PT", "NM", "US", "CR", "DX", "MG", "XA", "OT")
MAX_SERIES_BYTES = 4 * 2**30
MIN_SLICES = 3
SPACING_TOLERANCE = 0.02
"""Slice steps may differ from their median by this share (at least 0.05 mm)."""
TILT_DEGREES = 0.6
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Series:
    """Instances that share a SeriesInstanceUID, one for each SOPInstanceUID."""

    uid: str
    modality: str
    instances: tuple[FileDataset, ...]

    @property
    def identity(self) -> str:
        """32 hexadecimal digits that depend on the series and its instances, not on how they came."""
        uids = sorted(str(d.SOPInstanceUID) for d in self.instances)
        return hashlib.sha256("\n".join([self.uid, *uids]).encode()).hexdigest()[:32]

    @property
    def name(self) -> str:
        """For messages: modality and UID, nothing of the patient."""
        return f"series {self.uid} ({self.modality or 'no modality'}, {len(self.instances)} instances)"


@dataclass(frozen=True)
class _Frame:
    instance: int
    frame: int
    position: NDArray[np.float64]
    orientation: NDArray[np.float64]
    spacing: tuple[float, float]
    slope: float
    intercept: float


def group_series(datasets: Sequence[FileDataset]) -> list[Series]:
    """The image series among `datasets`, the largest first; other objects (SEG, SR, RTSTRUCT) are left out."""
    groups: dict[str, dict[str, FileDataset]] = defaultdict(dict)
    for dataset in datasets:
        if "Rows" in dataset and "Columns" in dataset and str(dataset.get("Modality", "")) not in ("SEG", "RTDOSE", "PR"):
            groups[str(dataset.SeriesInstanceUID)].setdefault(str(dataset.SOPInstanceUID), dataset)
    series = [Series(uid, str(next(iter(g.values())).get("Modality", "")), tuple(g.values())) for uid, g in groups.items()]
    return sorted(series, key=lambda s: (-_claimed_bytes(s), s.uid))


def _claimed_bytes(series: Series) -> int:
    """Of all instances; one whose header states no numbers claims nothing here, and is refused where it is read."""
    total = 0
    for dataset in series.instances:
        try:
            total += _bytes_of(dataset)
        except SeriesError:
            continue
    return total


def _integer(dataset: Dataset, keyword: str, default: int) -> int:
    value = dataset.get(keyword, default)
    try:
        return default if value in (None, "") else int(value)
    except (TypeError, ValueError) as error:
        raise SeriesError(f"instance {dataset.SOPInstanceUID} has {keyword} {str(value)[:60]!r}; expected one whole number") from error


def _bytes_of(dataset: Dataset) -> int:
    """Bytes that the header says the decoded pixels take."""
    count = _integer(dataset, "Rows", 0) * _integer(dataset, "Columns", 0) * max(1, _integer(dataset, "NumberOfFrames", 1))
    return count * max(1, _integer(dataset, "SamplesPerPixel", 1)) * max(1, _integer(dataset, "BitsAllocated", 16) // 8)


def read_volume(series: Series) -> Volume:
    """The regular volume of a series: (columns, rows, slices) in the modality's units; MONOCHROME1 the other way round, as viewers show it.

    Raises SeriesError, saying why, where the slices are not one regular volume: too few of them, a hole,
    a tilted gantry, several orientations, several images at one place, missing geometry, colour.
    """
    claimed = _claimed_bytes(series)
    if claimed > MAX_SERIES_BYTES:
        raise SeriesError(f"{series.name} claims {claimed:.3g} bytes of pixels, more than the {MAX_SERIES_BYTES:.3g} that are read")
    if any(_integer(d, "SamplesPerPixel", 1) != 1 for d in series.instances):
        raise SeriesError(f"{series.name} is in colour; expected one value a pixel")
    frames = _ordered(series, [f for i, d in enumerate(series.instances) for f in _frames(series, i, d)])
    shapes = {(_integer(d, "Rows", 0), _integer(d, "Columns", 0)) for d in series.instances}
    if len(shapes) != 1:
        raise SeriesError(f"{series.name} has slices of different sizes {sorted(shapes)}; expected one size: send one acquisition")
    affine = _affine(series, frames)
    voxels = _voxels(series, frames)
    first = series.instances[frames[0].instance]
    inverted = first.get("PhotometricInterpretation") == "MONOCHROME1" and series.modality != "CT"  # CT numbers are a scale of their own
    if inverted:
        voxels = voxels.max() + voxels.min() - voxels
    volume = Volume(
        voxels=voxels,
        affine=affine,
        modality=series.modality,
        description=str(first.get("SeriesDescription", "") or first.get("ProtocolName", "") or ""),
        patient=str(first.get("PatientName", "") or first.get("PatientID", "") or ""),
        datasets=tuple(series.instances[i] for i in dict.fromkeys(f.instance for f in frames)),
        frames=tuple(f.frame for f in frames) if len(series.instances) == 1 else (),
        doubts=("its low values are white (MONOCHROME1): it was inverted",) if inverted else (),
    )
    return checked(volume, series.name)


def _numbers(series: Series, dataset: Dataset | None, keyword: str, count: int) -> list[float]:
    value = None if dataset is None else dataset.get(keyword)
    try:
        numbers = [float(v) for v in value] if value is not None else []
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        seen = "missing" if value is None else repr(str(value)[:60])
        raise SeriesError(f"{series.name} has {keyword} {seen}; expected {count} numbers: the image has no usable place in the patient")
    return numbers


def _number(series: Series, dataset: Dataset | None, keyword: str, default: float) -> float:
    """One number; `default` where there is none, or 0."""
    try:
        value = float((None if dataset is None else dataset.get(keyword)) or default)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        seen = dataset.get_item(keyword) if dataset is not None else None
        raise SeriesError(f"{series.name} has {keyword} {getattr(seen, 'value', None)!r}; expected a number, with a point")
    return value


def _group(dataset: Dataset, frame: int, keyword: str) -> Dataset | None:
    """A functional group macro of one frame: its own, or the shared one."""
    own = dataset.get("PerFrameFunctionalGroupsSequence")
    for holder in ([own[frame]] if own and frame < len(own) else []) + list(dataset.get("SharedFunctionalGroupsSequence") or []):
        sequence = holder.get(keyword)
        if sequence:
            found: Dataset = sequence[0]
            return found
    return None


def _frames(series: Series, index: int, dataset: Dataset) -> list[_Frame]:
    if "PerFrameFunctionalGroupsSequence" not in dataset:
        if _integer(dataset, "NumberOfFrames", 1) > 1:
            raise SeriesError(f"{series.name} is multi-frame without functional groups; its frames have no place in the patient")
        rows = [(0, dataset, dataset, dataset, dataset)]
    else:
        rows = [
            (
                frame,
                _group(dataset, frame, "PlanePositionSequence"),
                _group(dataset, frame, "PlaneOrientationSequence"),
                _group(dataset, frame, "PixelMeasuresSequence"),
                _group(dataset, frame, "PixelValueTransformationSequence"),
            )
            for frame in range(_integer(dataset, "NumberOfFrames", 1))
        ]
    made = []
    for frame, place, plane, measures, transform in rows:
        spacing = _numbers(series, measures, "PixelSpacing", 2)
        slope, intercept = _number(series, transform, "RescaleSlope", 1.0), _number(series, transform, "RescaleIntercept", 0.0)
        position = np.array(_numbers(series, place, "ImagePositionPatient", 3))
        orientation = np.array(_numbers(series, plane, "ImageOrientationPatient", 6))
        lengths = np.linalg.norm(orientation.reshape(2, 3), axis=1)
        if np.abs(lengths - 1).max() > 0.01 or abs(orientation[:3] @ orientation[3:]) > 0.01 or min(spacing) <= 0:
            raise SeriesError(
                f"{series.name} has orientation {orientation.tolist()} and pixel spacing {spacing}; expected a right-angled grid"
            )
        made.append(_Frame(index, frame, position, orientation, (spacing[0], spacing[1]), slope, intercept))
    return made


def _ordered(series: Series, frames: list[_Frame]) -> list[_Frame]:
    """The frames along the slice normal, after the checks that they are one stack."""
    if len(frames) < MIN_SLICES:
        raise SeriesError(f"{series.name} has {len(frames)} slices; expected at least {MIN_SLICES}: send the whole series")
    first = frames[0]
    if any(np.abs(f.orientation - first.orientation).max() > 2e-3 for f in frames):
        kinds = len({tuple(np.round(f.orientation, 2)) for f in frames})
        raise SeriesError(f"{series.name} mixes {kinds} orientations (a localiser?); expected parallel slices: send one stack")
    if any(max(abs(f.spacing[0] - first.spacing[0]), abs(f.spacing[1] - first.spacing[1])) > 1e-3 for f in frames):
        raise SeriesError(f"{series.name} mixes pixel spacings; expected one")
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    places = [float(f.position @ normal) for f in frames]
    order = np.argsort(places, kind="stable")
    steps = np.diff(np.array(places)[order])
    if float(steps.min()) < 1e-3:
        twice = int((steps < 1e-3).sum())
        raise SeriesError(
            f"{series.name} has {twice} slices at a place that another one takes (several echoes, phases or contrasts); "
            "expected one image a place: send one of them"
        )
    return [frames[i] for i in order]


def _affine(series: Series, frames: list[_Frame]) -> NDArray[np.float64]:
    """Index (column, row, slice) -> mm RAS, after the checks that the steps are equal and square to the slices."""
    positions = np.stack([f.position for f in frames])
    steps = np.diff(positions, axis=0)
    row, column = frames[0].orientation[:3], frames[0].orientation[3:]
    normal = np.cross(row, column)
    along = steps @ normal
    median = float(np.median(along))
    allowed = max(SPACING_TOLERANCE * median, 0.05)
    worst = int(np.abs(along - median).argmax())
    if abs(along[worst] - median) > allowed:
        missing = f", about {round(along[worst] / median) - 1} missing" if along[worst] > 1.5 * median else ""
        raise SeriesError(
            f"{series.name} has a step of {along[worst]:.2f} mm after slice {worst + 1} where the others are {median:.2f} mm{missing}; "
            "expected equal steps: send the whole series"
        )
    aside = positions[-1] - positions[0]
    aside = aside - (aside @ normal) * normal
    tilt = float(np.degrees(np.arctan2(np.linalg.norm(aside), float(along.sum()))))
    if tilt > TILT_DEGREES:
        raise SeriesError(
            f"{series.name} is sheared by {tilt:.1f} degrees (a tilted gantry); expected steps square to the slices: resample it first"
        )
    lps = np.eye(4)
    lps[:3, 0] = row * frames[0].spacing[1]
    lps[:3, 1] = column * frames[0].spacing[0]
    lps[:3, 2] = (positions[-1] - positions[0]) / (len(frames) - 1)
    lps[:3, 3] = positions[0]
    return np.asarray(LPS_TO_RAS @ lps)


def _voxels(series: Series, frames: list[_Frame]) -> NDArray[np.float32]:
    chosen = {index: series.instances[index] for index in sorted({f.instance for f in frames})}
    named = {index: (f"instance {dataset.SOPInstanceUID} of {series.name}", dataset) for index, dataset in chosen.items()}
    pixels_of = decoded(named, _claimed_bytes(series))
    slices = []
    for frame in frames:
        pixels = pixels_of[frame.instance]
        if frame.frame >= len(pixels):
            raise InputError(f"{series.name} states more frames than it holds ({len(pixels)}); the file is cut short: send it again")
        slices.append(pixels[frame.frame].astype(np.float32).T * np.float32(frame.slope) + np.float32(frame.intercept))
    return np.stack(slices, axis=-1)
