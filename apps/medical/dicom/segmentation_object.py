"""Segmentations as DICOM SEG (PS3.3 A.51), by highdicom, on the geometry of their source series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from apps.medical.errors import MedicalError
from apps.medical.volume import Volume

BRAIN_STRUCTURE = Code("91723000", "SCT", "Anatomical Structure")
SIDES = {"left": codes.SCT.Left, "right": codes.SCT.Right}


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
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=model, version=version, family=codes.DCM.ArtificialIntelligence
        ),
        tracking_uid=hd.UID(),
        tracking_id=f"{tracking} {structure.name}"[:64],
        anatomic_regions=[codes.SCT.Hippocampus],
        primary_anatomic_structures=None if not structure.side else [codes.SCT.Hippocampus],
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
        del description.PrimaryAnatomicStructureSequence
    segmentation = hd.seg.Segmentation(
        source_images=list(volume.datasets),
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
    segmentation.save_as(path)
