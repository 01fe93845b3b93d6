"""Segmentations as DICOM SEG (PS3.3 A.51), by highdicom, on the geometry of their source series."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

from apps.medical.errors import MedicalError
from apps.medical.volume import Volume

BRAIN_STRUCTURE = Code("91723000", "SCT", "Anatomical Structure")
SIDES = {"left": codes.SCT.Left, "right": codes.SCT.Right}


TYPE_2 = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName", "SeriesNumber", "InstanceNumber"),
)
SHORT_STRINGS = ("StudyID", "AccessionNumber")


@dataclass(frozen=True)
class Structure:
    """One label of a label map. `side` is "left", "right" or empty, `part` "anterior", "posterior" or empty."""

    value: int
    name: str
    side: str
    part: str
    colour: tuple[int, int, int]


def _description(structure: Structure, number: int, model: str, version: str, tracking: str) -> hd.seg.SegmentDescription:
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=structure.name,
        segmented_property_category=BRAIN_STRUCTURE,
        segmented_property_type=codes.SCT.Hippocampus,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(name=model, version=version, family=codes.DCM.ArtificialIntelligence),
        tracking_uid=hd.UID(),
        tracking_id=f"{tracking} {structure.name}"[:64],
        anatomic_regions=[codes.SCT.Hippocampus],
    )


def write_segmentation(
    labels: NDArray[np.uint8], structures: Sequence[Structure], volume: Volume, model: str, version: str, path: Path
) -> None:
    """Write the labels (X, Y, Z, on the volume's grid) as a BINARY SEG that references the source slices.

    Labels without a voxel are left out, as the standard has no empty segments. Raises MedicalError where
    the volume did not come from DICOM.
    """
    if not volume.datasets:
        raise MedicalError("a DICOM SEG needs a DICOM series to refer to; this volume came from another format")
    if not volume.datasets[0].get("StudyInstanceUID"):
        raise MedicalError("the source series can't be referred to: it has no StudyInstanceUID")
    present = [s for s in structures if (labels == s.value).any()]
    planes = np.zeros((labels.shape[2], labels.shape[1], labels.shape[0]), np.uint8)
    for number, structure in enumerate(present, start=1):
        planes[np.transpose(labels == structure.value, (2, 1, 0))] = number
    if volume.frames:
        unsorted = np.zeros_like(planes)
        unsorted[list(volume.frames)] = planes
        planes = unsorted
    descriptions = [_description(s, n, model, version, "Triscope") for n, s in enumerate(present, start=1)]
    for description, structure in zip(descriptions, present, strict=True):
        region = description.AnatomicRegionSequence[0]
        if structure.side:
            region.AnatomicRegionModifierSequence = [hd.sr.CodedConcept.from_code(SIDES[structure.side])]
    try:
        segmentation = _segmentation(planes, descriptions, volume, model, version)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MedicalError(f"the source series can't be referred to: {error}") from error
    segmentation.save_as(path)


def _segmentation(
    planes: NDArray[np.uint8], descriptions: Sequence[hd.seg.SegmentDescription], volume: Volume, model: str, version: str
) -> hd.seg.Segmentation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # remarks on values of the source's own header
        return _build(planes, descriptions, volume, model, version)


def _build(
    planes: NDArray[np.uint8], descriptions: Sequence[hd.seg.SegmentDescription], volume: Volume, model: str, version: str
) -> hd.seg.Segmentation:
    return hd.seg.Segmentation(
        source_images=[_complete(dataset, volume.spacing_mm[2]) for dataset in volume.datasets],
        pixel_array=planes,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=hd.UID(),
        series_number=9000,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="Triscope",
        manufacturer_model_name=model,
        software_versions=version,
        device_serial_number="1",
        series_description=f"Segmentation by {model}"[:64],
        content_label="SEGMENTATION",
        omit_empty_frames=True,
    )


def _complete(dataset: Dataset, slice_step_mm: float) -> Dataset:
    """The header for the SEG to copy: without pixels, absent type 2 attributes empty, short strings cut to fit."""
    header = Dataset()
    header.update({element.tag: element for element in dataset if element.keyword != "PixelData"})
    header.file_meta = dataset.file_meta
    for keyword in TYPE_2:
        if keyword not in header:
            setattr(header, keyword, None if keyword.endswith(("Date", "Time")) else "")
    if not header.get("FrameOfReferenceUID"):
        # The SEG must name a frame of reference; one made from the series' UID is at least the same each time.
        header.FrameOfReferenceUID = generate_uid(entropy_srcs=[str(header.SeriesInstanceUID), "frame of reference"])
    if "PerFrameFunctionalGroupsSequence" in header:
        _share_groups(header)
    elif header.get("SliceThickness") is None:
        header.SliceThickness = f"{slice_step_mm:.6g}"
    for keyword in SHORT_STRINGS:
        if len(str(header.get(keyword) or "")) > 16:
            setattr(header, keyword, str(header.get(keyword))[:16])
    return header


def _share_groups(header: Dataset) -> None:
    """Put the groups that every frame repeats, and highdicom reads as shared, where it reads them."""
    stated = header.get("SharedFunctionalGroupsSequence")
    shared = copy.deepcopy(stated[0]) if stated else Dataset()
    for keyword in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
        own = header.PerFrameFunctionalGroupsSequence[0].get(keyword)
        if keyword not in shared and own:
            setattr(shared, keyword, own)
    header.SharedFunctionalGroupsSequence = [shared]
