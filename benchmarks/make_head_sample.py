"""Makes `data/samples/head_t1_dicom.zip`: a real T1 head, defaced, as a DICOM MR series.

    python benchmarks/make_head_sample.py DATA_DIR/head_t1/seg3d_mr.nii.gz

The face is removed by a plane in the coordinates of the average brain: everything in front of and below
the line from (y 95, z 10) to (y 30, z -60) mm becomes background. The brain lies behind it.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from apps.medical.segmentation.locate import register
from apps.medical.volume import Volume, read_nifti

FACE = ((95.0, 10.0), (30.0, -60.0))
OUT = Path(__file__).parent.parent / "data" / "samples" / "head_t1_dicom.zip"


def deface(volume: Volume) -> np.ndarray:
    """Voxels with the face set to background."""
    matrix = np.linalg.inv(register(volume.voxels, volume.affine).matrix) @ volume.affine
    index = np.indices(volume.voxels.shape).reshape(3, -1)
    y, z = (matrix[:3, :3] @ index + matrix[:3, 3:])[1:]
    (y0, z0), (y1, z1) = FACE
    below = z < z0 + (y - y0) * (z1 - z0) / (y1 - y0)
    face = (below & (y > y1)).reshape(volume.voxels.shape)
    return np.where(face, 0, volume.voxels)


def slice_object(pixels: np.ndarray, number: int, uids: dict[str, str], volume: Volume, count: int) -> Dataset:
    """One axial MR slice; the grid runs right to left and front to back as scanners store it."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = MRImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["triscope head sample", str(number)])
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = uids["study"], uids["series"], uids["frame"]
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Sample^Head", "SAMPLE-HEAD", "", ""
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber, ds.ReferringPhysicianName = "20150101", "120000", "1", "", ""
    ds.Modality, ds.Manufacturer, ds.SeriesDescription = "MR", "", "T1 head (defaced sample)"
    ds.SeriesNumber, ds.InstanceNumber, ds.PositionReferenceIndicator = 1, number + 1, ""
    ds.ImageType = ["DERIVED", "PRIMARY", "OTHER"]
    ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions, ds.MRAcquisitionType = "GR", "NONE", "", "3D"
    ds.EchoTime, ds.RepetitionTime, ds.EchoTrainLength = "", "", ""
    ds.PatientIdentityRemoved, ds.DeidentificationMethod = "YES", "Published de-identified; face removed"
    ds.BurnedInAnnotation, ds.RecognizableVisualFeatures = "NO", "NO"
    sx, sy, sz = volume.spacing_mm
    ds.SliceThickness, ds.PixelSpacing = f"{sz:.6g}", [f"{sy:.6g}", f"{sx:.6g}"]
    ds.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    corner = volume.affine @ np.array([volume.voxels.shape[0] - 1, volume.voxels.shape[1] - 1, number, 1])
    ds.ImagePositionPatient = [f"{-corner[0]:.6g}", f"{-corner[1]:.6g}", f"{corner[2]:.6g}"]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    plane = pixels[::-1, ::-1, number].T
    ds.Rows, ds.Columns = plane.shape
    ds.PixelData = np.ascontiguousarray(plane).astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    return ds


def main() -> None:
    """Read the NIfTI named on the command line and write the sample."""
    volume = read_nifti(Path(sys.argv[1]))
    pixels = np.rint(deface(volume)).clip(0, 4095).astype(np.uint16)
    uids = {name: generate_uid(entropy_srcs=["triscope head sample", name]) for name in ("study", "series", "frame")}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(OUT, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for number in range(pixels.shape[2]):
            buffer = io.BytesIO()
            slice_object(pixels, number, uids, volume, pixels.shape[2]).save_as(buffer, enforce_file_format=True)
            name = zipfile.ZipInfo(f"IM{number + 1:04}.dcm", (1980, 1, 1, 0, 0, 0))
            archive.writestr(name, buffer.getvalue(), zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    main()
