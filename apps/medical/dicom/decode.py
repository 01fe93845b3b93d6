"""Pixels of instances. Compressed ones are decoded in a process of their own.

The decoders are native libraries. Damaged streams make them end the process that they are in (GDCM, on any kind of JPEG) or ask for more
memory than there is (OpenJPEG, by the size in the stream), and a worker has to outlive that.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage, generate_uid

from apps.medical.errors import InputError

IMAGE_GROUPS = (0x0028, 0x7FE0)
"""All that a decoder looks at: how pixels are stored, and the pixels."""
OURSELVES = (DeflatedExplicitVRLittleEndian, RLELossless)
"""Compressed, and decoded in Python."""
BASE_BYTES, TIMES_CLAIMED = 4 * 2**30, 4
"""Address space of the process that decodes: what Python and its libraries reserve, and several times the pixels that headers claim."""
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""Else numpy reserves memory for each core."""
BASE_SECONDS, BYTES_A_SECOND = 60.0, 2**20
"""How long it may take: far more than any decoder needs."""


def decoded(instances: Mapping[int, tuple[str, FileDataset]], claimed: int) -> dict[int, NDArray[np.generic]]:
    """Pixels (frames, rows, columns) of each instance, which comes with its name for messages; `claimed`: bytes of all by their headers.

    Raises InputError where they can't be had.
    """
    found: dict[int, NDArray[np.generic]] = {}
    apart: dict[int, tuple[str, FileDataset]] = {}
    for place, (name, dataset) in instances.items():
        if "PixelData" not in dataset:
            raise InputError(f"{name} holds no pixels; the file is cut short or is a header alone")
        syntax = getattr(dataset, "file_meta", FileMetaDataset()).get("TransferSyntaxUID")
        if syntax is not None and syntax.is_compressed and syntax not in OURSELVES:
            apart[place] = (name, dataset)
            continue
        try:
            found[place] = np.asarray(dataset.pixel_array)
        except Exception as error:  # whatever is met in damaged bytes
            raise _refusal(name, dataset, _reason(error)) from error
    if apart:
        found |= _decoded_apart(apart, claimed)
    return {place: pixels.reshape(-1, *pixels.shape[-2:]) for place, pixels in found.items()}


def _decoded_apart(instances: Mapping[int, tuple[str, FileDataset]], claimed: int) -> dict[int, NDArray[np.generic]]:
    seconds = BASE_SECONDS + claimed / BYTES_A_SECOND
    with tempfile.TemporaryDirectory(prefix="triscope-decode-") as folder:
        for place, (name, dataset) in instances.items():
            try:
                _image_alone(dataset).save_as(Path(folder) / f"{place}.dcm", enforce_file_format=True)
            except Exception as error:  # values that can't be written
                raise _refusal(name, dataset, _reason(error)) from error
        command = [sys.executable, "-m", __name__, folder, str(BASE_BYTES + TIMES_CLAIMED * claimed)]
        try:
            process = subprocess.run(command, capture_output=True, env=os.environ | ONE_THREAD, timeout=seconds, check=False)
            ended = f"its decoder ended by signal {-process.returncode}"
            if process.returncode >= 0:
                ended = f"its decoder could not be run ({process.stderr.decode(errors='replace').strip()[-200:]})"
        except subprocess.TimeoutExpired:
            ended = f"it was not decoded within {seconds:.0f} s"
        found = {}
        for place, (name, dataset) in instances.items():
            pixels, reason = Path(folder) / f"{place}.npy", Path(folder) / f"{place}.txt"
            if not pixels.is_file():
                raise _refusal(name, dataset, reason.read_text() if reason.is_file() else ended)
            found[place] = np.load(pixels, allow_pickle=False)
        return found


def _image_alone(dataset: FileDataset) -> Dataset:
    image = Dataset()
    image.update({element.tag: element for element in dataset if element.tag.group in IMAGE_GROUPS})
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    image.SOPClassUID, image.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    return image


def _refusal(name: str, dataset: FileDataset, reason: str) -> InputError:
    meta = getattr(dataset, "file_meta", FileMetaDataset())
    syntax = meta.TransferSyntaxUID.name if "TransferSyntaxUID" in meta else "unknown"
    return InputError(f"{name} can't be decoded ({syntax}): {reason}; the file is damaged or cut short: send it again")


def _reason(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def main(folder: Path, most_bytes: int) -> None:
    """Decode every `N.dcm` of `folder` to `N.npy`, or say why not in `N.txt`, in no more address space than `most_bytes`."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # where there are no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    for file in sorted(folder.glob("*.dcm"), key=lambda file: int(file.stem)):
        part = file.with_suffix(".part")
        try:
            with part.open("wb") as stream:
                np.save(stream, np.asarray(pydicom.dcmread(file).pixel_array), allow_pickle=False)
            part.rename(file.with_suffix(".npy"))
        except Exception as error:  # decoders raise whatever they meet
            file.with_suffix(".txt").write_text(_reason(error))
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
