"""Made-up images whose truth is known."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from apps.demo import HEAD_SAMPLE, sample

HEAD = sample(HEAD_SAMPLE)
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
OBLIQUE = (0.9396926, 0.3420201, 0.0, -0.2961981, 0.8137977, 0.5)
"""Row and column directions turned by 20 degrees about z, then 30 about the row."""


def dicom_slices(
    pixels: NDArray[np.generic],
    *,
    spacing: Sequence[float] = (0.8, 0.9, 2.5),
    orientation: Sequence[float] = AXIAL,
    origin: Sequence[float] = (-40.0, -50.0, 12.5),
    modality: str = "MR",
    patient: str = "Test^Person",
) -> list[Dataset]:
    """A series from `pixels` (columns, rows, slices); `spacing` [mm] along the same axes."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    normal = np.cross(row, column)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    made = []
    for number in range(pixels.shape[2]):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = MRImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = patient, "ID-4711", "", ""
        ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber, ds.ReferringPhysicianName = "20260101", "120000", "1", "", ""
        ds.Modality, ds.Manufacturer, ds.SeriesNumber, ds.InstanceNumber = modality, "", 1, number + 1
        ds.PositionReferenceIndicator, ds.ImageType = "", ["ORIGINAL", "PRIMARY", "OTHER"]
        ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions, ds.MRAcquisitionType = "GR", "NONE", "", "3D"
        ds.EchoTime, ds.RepetitionTime, ds.EchoTrainLength = "", "", ""
        ds.SliceThickness, ds.PixelSpacing = f"{spacing[2]:.6g}", [f"{spacing[1]:.6g}", f"{spacing[0]:.6g}"]
        ds.ImageOrientationPatient = [f"{v:.8f}" for v in orientation]
        place = np.array(origin) + number * spacing[2] * normal
        ds.ImagePositionPatient = [f"{v:.8f}"[:16] for v in place]
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
        ds.Columns, ds.Rows = pixels.shape[:2]
        ds.PixelData = np.ascontiguousarray(pixels[:, :, number].T).astype("<u2").tobytes()
        ds["PixelData"].VR = "OW"
        made.append(ds)
    return made


def save_series(slices: Sequence[Dataset], folder: Path) -> Path:
    """Write a series in names that sort wrongly (1, 10, 11, 2 ...)."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, ds in enumerate(slices):
        ds.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder


def as_bytes(ds: Dataset) -> bytes:
    """A DICOM file's content."""
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def unpack_head(folder: Path) -> Path:
    """The head sample as a folder of DICOM files."""
    with zipfile.ZipFile(HEAD) as archive:
        archive.extractall(folder)
    return folder


def blob(seed: int = 0, shape: tuple[int, int, int] = (20, 24, 10)) -> NDArray[np.uint16]:
    """An image that no flip or permutation maps onto itself."""
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 50, shape).astype(np.uint16)
    image[2:9, 3:7, 1:3] += 500
    image[12:18, 10:21, 6:8] += 900
    image[4:6, 18:22, 8:] += 1500
    return image
