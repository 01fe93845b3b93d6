"""DICOM files from a file, a folder or a zip archive, read with limits."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pydicom
from pydicom.dataset import FileDataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

from apps.medical.errors import InputError
from pipelines.messages import printable

logger = logging.getLogger(__name__)
MAX_FILE_BYTES = 4 * 2**30
MAX_TOTAL_BYTES = 16 * 2**30
MAX_FILES = 100_000
SERIES = ("StudyInstanceUID", "FrameOfReferenceUID", "Modality", "SeriesNumber", "SeriesDescription", "ProtocolName", "PatientID")
"""What instances of one series have in common, where its UID was emptied."""
FIRST_ELEMENTS = {tag for g in (2, 8) for e in (0, 1, 5, 8, 0x12, 0x16, 0x18) for tag in (bytes((g, 0, e, 0)), bytes((0, g, 0, e)))}
"""Tags that an object without the file's header begins with: lengths of groups, character set, image type, creation date, UIDs; in either
order of bytes."""


@dataclass
class Instances:
    """What was read: `datasets`, and for each file that was passed over its name and the reason."""

    datasets: list[FileDataset] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def file_contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a file, of every file below a folder, or of every member of a zip, sorted by name.

    Raises InputError for a path that does not exist, a broken archive, or more than is read.
    """
    if not path.exists():
        raise InputError(f"no file or folder at {path}; expected a DICOM file, a folder, a zip archive or a NIfTI file")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
    elif zipfile.is_zipfile(path):
        yield from _zip_members(path)
        return
    else:
        files = [path]
    if len(files) > MAX_FILES:
        raise InputError(f"{path} holds {len(files)} files, more than the {MAX_FILES} that are read; name a smaller folder")
    total = 0
    for file in files:
        size = file.stat().st_size
        total += size
        if size > MAX_FILE_BYTES or total > MAX_TOTAL_BYTES:
            raise InputError(f"{file} brings the input to {total} bytes, more than the {MAX_TOTAL_BYTES} that are read")
        if zipfile.is_zipfile(file):
            yield from _zip_members(file)
        else:
            yield printable(str(file.relative_to(path) if path.is_dir() else file.name)), file.read_bytes()


def _zip_members(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            total = sum(m.file_size for m in members)
            if total > MAX_TOTAL_BYTES or len(members) > MAX_FILES:
                raise InputError(f"{path.name} would unpack to {total} bytes in {len(members)} files, more than is read")
            for member in sorted(members, key=lambda m: m.filename):
                yield member.filename, archive.read(member)
    except (zipfile.BadZipFile, RuntimeError, OSError, EOFError) as error:
        raise InputError(f"{path.name} is a damaged or locked zip archive: {error}; pack it again without a password") from error


def read_instances(path: Path) -> Instances:
    """Every DICOM object below `path`. Files that are not DICOM are passed over and named."""
    found = Instances()
    for name, content in file_contents(path):
        add_instance(found, name, content)
    return found


def add_instance(found: Instances, name: str, content: bytes) -> None:
    """Parse one file into `found`, or note why it was passed over."""
    try:
        dataset = _parsed(content)
    except InvalidDicomError:
        found.skipped.append((name, "not a DICOM file"))
        return
    except Exception as error:  # pydicom raises whatever its parser meets in damaged bytes
        found.skipped.append((name, f"damaged DICOM: {type(error).__name__}: {error}"))
        return
    if "DirectoryRecordSequence" in dataset:
        found.skipped.append((name, "a DICOMDIR index"))
    elif not _identified(dataset):
        found.skipped.append((name, "damaged DICOM: no SOPInstanceUID"))
    else:
        found.datasets.append(dataset)


def _parsed(content: bytes) -> FileDataset:
    """One object. Old archives and network dumps hold objects without the file's header (PS3.10, 7.1): they begin with their first group,
    and their transfer syntax is one of the three that can be told by looking. Raises InvalidDicomError where it is neither."""
    try:
        return pydicom.dcmread(io.BytesIO(content))
    except InvalidDicomError:
        if content[:4] not in FIRST_ELEMENTS:
            raise
    dataset = pydicom.dcmread(io.BytesIO(content), force=True)
    if "SOPClassUID" not in dataset or "SOPInstanceUID" not in dataset:
        raise InvalidDicomError
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        told = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = told
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def _identified(dataset: FileDataset) -> bool:
    """Whether an object can be told from others. What an anonymiser emptied is taken from the file's preamble, and a series without a
    UID is what the same equipment calls the same series: its UID is made of that."""
    dataset.SOPInstanceUID = dataset.get("SOPInstanceUID") or dataset.file_meta.get("MediaStorageSOPInstanceUID") or ""
    if not dataset.get("SeriesInstanceUID"):
        dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[f"{keyword}={dataset.get(keyword, '')}" for keyword in SERIES])
    return bool(dataset.SOPInstanceUID)
