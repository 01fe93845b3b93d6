"""Series to volumes, refusals, and the SEG round trip on phantoms that no flip maps onto themselves."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from apps.medical.dicom.files import Instances, add_instance, read_instances
from apps.medical.dicom.segmentation_object import write_segmentation
from apps.medical.dicom.series import group_series, read_volume
from apps.medical.errors import InputError, MedicalError, SeriesError
from apps.medical.segmentation.hippocampus import CROP_STRUCTURES, HEAD_STRUCTURES, segment_hippocampi
from apps.medical.service import read_input
from apps.medical.volume import Volume, read_nifti
from tests.phantoms import AXIAL, OBLIQUE, as_bytes, blob, dicom_slices, save_series


def load(slices: list[pydicom.Dataset]) -> Volume:
    found = Instances()
    shuffled = list(slices)
    random.Random(1).shuffle(shuffled)
    for number, ds in enumerate(shuffled):
        add_instance(found, str(number), as_bytes(ds))
    (series,) = group_series(found.datasets)
    return read_volume(series)


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE, (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1)])
def test_voxels_lie_where_the_header_puts_them(orientation: tuple[float, ...]) -> None:
    pixels = blob()
    volume = load(dicom_slices(pixels, orientation=orientation))
    assert volume.voxels.shape == pixels.shape
    np.testing.assert_allclose(volume.spacing_mm, (0.8, 0.9, 2.5), atol=1e-5)
    row, column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    normal = np.cross(row, column)
    index = np.array([3, 5, 7])
    lps = np.array([-40.0, -50.0, 12.5]) + row * 0.8 * 3 + column * 0.9 * 5 + normal * 2.5 * 7
    np.testing.assert_allclose(volume.affine @ [*index, 1], [-lps[0], -lps[1], lps[2], 1], atol=1e-3)
    assert volume.voxels[3, 5, 7] == pixels[3, 5, 7]


def test_rescale_is_applied_slice_by_slice() -> None:
    slices = dicom_slices(blob())
    for number, ds in enumerate(slices):
        ds.RescaleSlope, ds.RescaleIntercept = str(1 + number), "-100"
    volume = load(slices)
    np.testing.assert_allclose(volume.voxels[:, :, 4], blob()[:, :, 4] * 5.0 - 100)


def test_duplicates_of_an_instance_count_once() -> None:
    slices = dicom_slices(blob())
    assert load([*slices, slices[3]]).voxels.shape == (20, 24, 10)


def without(slices: list[pydicom.Dataset], index: int) -> list[pydicom.Dataset]:
    return slices[:index] + slices[index + 1 :]


def sheared() -> list[pydicom.Dataset]:
    slices = dicom_slices(blob())
    for number, ds in enumerate(slices):
        ds.ImagePositionPatient = [-40, -50 + 0.6 * number, 12.5 + 2.5 * number]
    return slices


def two_orientations() -> list[pydicom.Dataset]:
    slices = dicom_slices(blob())
    for ds in slices[:4]:
        ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    return slices


def echoes() -> list[pydicom.Dataset]:
    slices = dicom_slices(blob())
    more = dicom_slices(blob(1))
    for ds in more:
        ds.SeriesInstanceUID, ds.StudyInstanceUID = slices[0].SeriesInstanceUID, slices[0].StudyInstanceUID
    return slices + more


def no_position() -> list[pydicom.Dataset]:
    slices = dicom_slices(blob())
    del slices[2].ImagePositionPatient
    return slices


def sizes() -> list[pydicom.Dataset]:
    slices = dicom_slices(blob())
    slices[1].Rows, slices[1].PixelData = 12, slices[1].PixelData[: 20 * 12 * 2]
    return slices


@pytest.mark.parametrize(
    ("slices", "words"),
    [
        (lambda: without(dicom_slices(blob()), 4), ["5.00 mm", "2.50 mm", "about 1 missing"]),
        (sheared, ["sheared by 13.5 degrees"]),
        (two_orientations, ["mixes 2 orientations"]),
        (echoes, ["10 slices at a place that another one takes"]),
        (lambda: dicom_slices(blob())[:1], ["1 slices", "at least 3"]),
        (no_position, ["ImagePositionPatient missing"]),
        (sizes, ["different sizes", "(12, 20)"]),
    ],
)
def test_what_is_not_one_regular_volume_is_refused_with_the_reason(slices: Callable[[], list[pydicom.Dataset]], words: list[str]) -> None:
    with pytest.raises(SeriesError) as caught:
        load(slices())
    assert all(word in str(caught.value) for word in words), caught.value
    assert "Test" not in str(caught.value)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    slices = dicom_slices(blob())
    for ds in slices:
        ds.Rows = ds.Columns = 65535
        ds.NumberOfFrames = 300
    with pytest.raises(SeriesError, match=r"claims .* bytes"):
        load(slices)


def test_truncated_pixels_are_refused() -> None:
    slices = dicom_slices(blob())
    slices[5].PixelData = slices[5].PixelData[:100]
    with pytest.raises(InputError, match=r"can't be decoded .* send it again"):
        load(slices)


def test_damaged_and_foreign_files_are_passed_over_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = save_series(dicom_slices(blob()), tmp_path / "mixed")
    (folder / "notes.txt").write_text("not an image")
    (folder / "cut.dcm").write_bytes((folder / "0.dcm").read_bytes()[:300])
    save_series(dicom_slices(blob(2)[:, :, :4]), folder / "second")
    found = read_instances(folder)
    assert {name for name, _ in found.skipped} >= {"notes.txt"}
    series = group_series(found.datasets)
    assert [len(s.instances) for s in series][:2] == [10, 4]
    volume, notes = read_input(folder)
    assert volume.voxels.shape == (20, 24, 10)
    assert any("left aside" in note for note in notes)


@pytest.mark.parametrize(("implicit", "little"), [(True, True), (False, True), (False, False)])
def test_objects_without_the_file_header_are_read(tmp_path: Path, implicit: bool, little: bool) -> None:
    """As older archives write them: the data set alone, which begins with its first group."""
    found = Instances()
    for number, ds in enumerate(dicom_slices(blob())):
        buffer = io.BytesIO()
        bare = pydicom.Dataset(ds)
        bare.PixelData = ds.PixelData if little else np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
        pydicom.dcmwrite(buffer, bare, implicit_vr=implicit, little_endian=little, enforce_file_format=False)
        assert buffer.getvalue()[:2] == (b"\x08\x00" if little else b"\x00\x08")
        add_instance(found, str(number), buffer.getvalue())
    (series,) = group_series(found.datasets)
    np.testing.assert_array_equal(read_volume(series).voxels, blob())
    again = Instances()
    add_instance(again, "again", as_bytes(series.instances[0]))  # as a study is handed to the log
    assert len(again.datasets) == 1
    for foreign in (b"\x08\x00\x05\x00", b"\x08\x00\x16\x00" + bytes(range(200)), b"\x00\x08\x00\x05"):
        add_instance(again, "foreign", foreign)
    assert [why for _, why in again.skipped] == ["not a DICOM file"] * 3


@pytest.mark.parametrize(("keyword", "place", "text"), [("SamplesPerPixel", b"\x28\x00\x02\x00US", b""), ("NumberOfFrames", b"", b"1,5 ")])
def test_a_count_that_is_no_number_refuses_its_series_alone(tmp_path: Path, keyword: str, place: bytes, text: bytes) -> None:
    slices = dicom_slices(blob())
    contents = []
    for ds in slices:
        ds.NumberOfFrames = "1234"
        content = as_bytes(ds)
        if text:
            content = content.replace(b"1234", text)
        else:  # two values where one is expected
            start = content.index(place) + len(place)
            content = content[:start] + b"\x04\x00\x01\x00\x01\x00" + content[start + 4 :]
            content = content.replace(b"1234", b"1   ")
        contents.append(content)
    found = Instances()
    for number, content in enumerate([*contents, *(as_bytes(ds) for ds in dicom_slices(blob(2)))]):
        add_instance(found, str(number), content)
    good, bad = group_series(found.datasets)
    assert read_volume(good).voxels.shape == blob(2).shape
    with pytest.raises(SeriesError, match=f"{keyword} .*expected one whole number"):
        read_volume(bad)


def test_a_zip_is_read_like_a_folder(tmp_path: Path) -> None:
    archive = tmp_path / "study.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        for number, ds in enumerate(dicom_slices(blob())):
            writer.writestr(f"deep/{number}", as_bytes(ds))
    assert read_input(archive)[0].voxels.shape == (20, 24, 10)
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(InputError):
        read_input(archive)


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file or folder"):
        read_input(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no DICOM series"):
        read_input(tmp_path / "empty")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    voxels = np.random.default_rng(0).random((10, 10, 10)).astype(np.float32)
    voxels[2, 3, 4] = value
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "x.nii.gz")
    with pytest.raises(InputError, match="1 voxels that are NaN or infinite"):
        read_nifti(tmp_path / "x.nii.gz")


@pytest.mark.parametrize("kind", [np.complex64, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])], ids=["complex", "colours"])
def test_voxels_of_several_numbers_are_refused(tmp_path: Path, kind: Any) -> None:
    nib.save(nib.Nifti1Image(np.ones((10, 10, 10), kind), np.eye(4)), tmp_path / "x.nii.gz")
    with pytest.raises(InputError, match="expected one number a voxel"):
        read_nifti(tmp_path / "x.nii.gz")


@pytest.mark.parametrize(("unit", "scale"), [("mm", 1.0), ("meter", 0.001), ("micron", 1000.0), ("unknown", 1.0)])
def test_the_unit_of_a_nifti_is_followed(tmp_path: Path, unit: str, scale: float) -> None:
    voxels = np.random.default_rng(0).random((10, 10, 10)).astype(np.float32)
    image = nib.Nifti1Image(voxels, np.diag([2 * scale, 3 * scale, 4 * scale, 1]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "x.nii.gz")
    np.testing.assert_allclose(read_nifti(tmp_path / "x.nii.gz").spacing_mm, (2, 3, 4), rtol=1e-5)


def test_an_orientation_that_is_not_stated_is_a_doubt(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).random((10, 10, 10)).astype(np.float32)
    for name, sform, qform in (("none", 0, 0), ("one", 1, 0), ("same", 1, 1), ("two", 1, 1)):
        image = nib.Nifti1Image(voxels, np.eye(4))
        image.set_sform(np.eye(4), sform)
        image.set_qform(np.diag([-1, 1, 1, 1]) if name == "two" else np.eye(4), qform)
        nib.save(image, tmp_path / f"{name}.nii.gz")
    assert "left and right are a guess" in read_nifti(tmp_path / "none.nii.gz").doubts[0]
    assert "sform RAS, qform LAS" in read_nifti(tmp_path / "two.nii.gz").doubts[0]
    assert not read_nifti(tmp_path / "one.nii.gz").doubts
    assert not read_nifti(tmp_path / "same.nii.gz").doubts


@pytest.mark.parametrize("value", [4e20, np.nan, np.inf])
def test_a_qform_that_is_none_beside_a_good_sform_is_a_doubt(tmp_path: Path, value: float) -> None:
    image = nib.Nifti1Image(np.random.default_rng(0).random((10, 10, 10)).astype(np.float32), np.eye(4))
    image.set_sform(np.eye(4), 1)
    image.set_qform(np.eye(4), 1)
    nib.save(image, tmp_path / "x.nii")
    content = bytearray((tmp_path / "x.nii").read_bytes())
    content[256:260] = np.float32(value).tobytes()  # quatern_b
    (tmp_path / "x.nii").write_bytes(content)
    assert read_nifti(tmp_path / "x.nii").doubts == ("the file's qform can't be read: sform was followed",)


def test_an_image_larger_than_a_body_is_refused_at_once() -> None:
    image = Volume(np.random.default_rng(0).random((40, 40, 40)).astype(np.float32), np.diag([50.0, 50.0, 50.0, 1.0]))
    with pytest.raises(InputError, match="measures 2000 x 2000 x 2000 mm, with voxels of 50 x 50 x 50"):
        segment_hippocampi(image, None)  # type: ignore[arg-type]


def test_a_nifti_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.nii").write_bytes(b"1234" * 200)
    with pytest.raises(InputError, match="not a readable NIfTI"):
        read_nifti(tmp_path / "x.nii")


SYNTAXES = {
    "MR_small.dcm": "explicit little endian",
    "MR_small_bigendian.dcm": "explicit big endian",
    "MR_small_implicit.dcm": "implicit little endian",
    "MR_small_RLE.dcm": "RLE lossless",
    "MR_small_jp2klossless.dcm": "JPEG 2000 lossless",
    "MR_small_jpeg_ls_lossless.dcm": "JPEG-LS lossless",
}


@pytest.mark.parametrize("name", SYNTAXES)
def test_transfer_syntaxes_decode_to_the_same_pixels(name: str) -> None:
    """pydicom's own files, made into a three-slice series; the first is the uncompressed truth."""
    truth = pydicom.dcmread(get_testdata_file("MR_small.dcm")).pixel_array
    ds = pydicom.dcmread(get_testdata_file(name))
    slices = []
    for number in range(3):
        copy = pydicom.dcmread(get_testdata_file(name))
        copy.SOPInstanceUID = f"{ds.SOPInstanceUID}.{number}"
        copy.ImagePositionPatient = [*ds.ImagePositionPatient[:2], float(ds.ImagePositionPatient[2]) + number]
        slices.append(copy)
    found = Instances()
    for copy in slices:
        buffer = io.BytesIO()
        copy.save_as(buffer)
        add_instance(found, "x", buffer.getvalue())
    volume = read_volume(group_series(found.datasets)[0])
    np.testing.assert_array_equal(volume.voxels[:, :, 1].T, truth.astype(np.float32))


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE])
def test_seg_round_trip_keeps_place_labels_and_references(
    tmp_path: Path, orientation: tuple[float, ...], program: Callable[[str], str]
) -> None:
    slices = dicom_slices(blob(), orientation=orientation)
    volume = load(slices)
    labels = np.zeros(volume.voxels.shape, np.uint8)
    labels[2:9, 3:7, 1:3], labels[12:18, 10:21, 6:8], labels[4:6, 18:22, 8:] = 1, 3, 4
    path = tmp_path / "seg.dcm"
    write_segmentation(labels, HEAD_STRUCTURES, volume, "hippocampus-t1", "1.0.0", path)

    seg = hd.seg.segread(path)
    assert seg.FrameOfReferenceUID == slices[0].FrameOfReferenceUID
    assert seg.PatientID == slices[0].PatientID
    assert seg.StudyInstanceUID == slices[0].StudyInstanceUID
    referred = {item.ReferencedSOPInstanceUID for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referred <= {ds.SOPInstanceUID for ds in slices}
    names = {n: seg.get_segment_description(n).segment_label for n in range(1, seg.number_of_segments + 1)}
    assert list(names.values()) == ["left anterior hippocampus", "right anterior hippocampus", "right posterior hippocampus"]
    sides = [seg.get_segment_description(n).AnatomicRegionSequence[0].AnatomicRegionModifierSequence[0].CodeMeaning for n in names]
    assert sides == ["Left", "Right", "Right"]

    back = seg.get_volume(combine_segments=True, rescale_fractional=False)
    lps_to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    for number, structure in zip(names, (1, 3, 4), strict=True):
        index = np.argwhere(back.array == number)
        places = (lps_to_ras @ back.affine @ np.c_[index, np.ones(len(index))].T).T[:, :3]
        expected = np.argwhere(labels == structure)
        truth = (volume.affine @ np.c_[expected, np.ones(len(expected))].T).T[:, :3]
        order = np.lexsort(np.round(places, 2).T), np.lexsort(np.round(truth, 2).T)
        np.testing.assert_allclose(places[order[0]], truth[order[1]], atol=0.02)

    answer = subprocess.run([program("dciodvfy"), str(path)], capture_output=True, text=True, check=False)
    assert "Error" not in answer.stderr + answer.stdout, answer.stderr


def test_a_seg_of_a_crop_states_no_side(tmp_path: Path, program: Callable[[str], str]) -> None:
    volume = load(dicom_slices(blob()))
    labels = np.zeros(volume.voxels.shape, np.uint8)
    labels[2:9, 3:7, 1:3], labels[12:18, 10:21, 6:8] = 1, 2
    write_segmentation(labels, CROP_STRUCTURES, volume, "hippocampus-t1", "1.0.0", tmp_path / "seg.dcm")
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    regions = [seg.get_segment_description(n).AnatomicRegionSequence[0] for n in seg.segment_numbers]
    assert [region.CodeMeaning for region in regions] == ["Hippocampus", "Hippocampus"]
    assert not any("AnatomicRegionModifierSequence" in region for region in regions)
    answer = subprocess.run([program("dciodvfy"), str(tmp_path / "seg.dcm")], capture_output=True, text=True, check=False)
    assert "Error" not in answer.stderr + answer.stdout, answer.stderr


def test_uids_that_an_anonymiser_emptied_are_made_up_again(tmp_path: Path) -> None:
    slices = dicom_slices(blob())
    usual = load(slices)
    for place, ds in enumerate(slices):
        ds.SeriesInstanceUID = ds.StudyInstanceUID = ""
        ds.SOPInstanceUID = ""
        if place % 2:
            del ds.SeriesInstanceUID
    emptied = load(slices)
    np.testing.assert_array_equal(emptied.voxels, usual.voxels)
    assert [ds.SOPInstanceUID for ds in emptied.datasets] == [ds.SOPInstanceUID for ds in usual.datasets]
    assert load(slices).datasets[0].SeriesInstanceUID == emptied.datasets[0].SeriesInstanceUID
    labels = np.zeros(emptied.voxels.shape, np.uint8)
    labels[2:9, 3:7, 1:3] = 1
    with pytest.raises(MedicalError, match="can't be referred to"):
        write_segmentation(labels, CROP_STRUCTURES, emptied, "hippocampus-t1", "1.0.0", tmp_path / "seg.dcm")


def test_an_image_whose_low_values_are_white_is_inverted() -> None:
    slices = dicom_slices(blob())
    usual = load(slices)
    for ds in slices:
        ds.PhotometricInterpretation = "MONOCHROME1"
    inverted = load(slices)
    np.testing.assert_allclose(inverted.voxels, usual.voxels.max() + usual.voxels.min() - usual.voxels)
    assert "MONOCHROME1" in inverted.doubts[0]
    for ds in slices:
        ds.Modality = "CT"
    np.testing.assert_array_equal(load(slices).voxels, usual.voxels)


@pytest.mark.parametrize("text", ["7,25", "nan", "a"])
def test_a_rescale_slope_that_is_no_number_is_named(text: str) -> None:
    slices = dicom_slices(blob())
    slices[2].RescaleSlope = "7.25"
    found = Instances()
    for number, ds in enumerate(slices):
        add_instance(found, str(number), as_bytes(ds).replace(b"7.25", text.encode().ljust(4)))
    with pytest.raises(SeriesError, match=f"RescaleSlope .*{text}.*expected a number"):
        read_volume(group_series(found.datasets)[0])


LARGE = np.kron(blob(), np.ones((4, 4, 1), blob().dtype))
"""JPEG 2000 has five levels, each half of the last."""


def spoiled(slices: list[pydicom.Dataset], syntax: pydicom.uid.UID, place: int, values: bytes) -> list[pydicom.Dataset]:
    """The slices compressed, the fourth with other bytes at a place of its stream."""
    for number, ds in enumerate(slices):
        ds.compress(syntax)
        if number == 3:
            stream = bytearray(next(generate_frames(ds.PixelData, number_of_frames=1)))
            stream[place : place + len(values)] = values
            ds.PixelData = encapsulate([bytes(stream)])
    return slices


@pytest.mark.parametrize(
    ("syntax", "place", "values"),
    [
        (JPEGLSLossless, 6, b"\xff"),  # GDCM throws what nobody catches
        (JPEGLSLossless, 10, b"\x00"),  # GDCM divides by no components
        (JPEG2000Lossless, 8, struct.pack(">II", 60_000, 60_000)),  # 14 GB of pixels by the stream, 1 kB by the header
    ],
)
def test_streams_that_end_their_decoder_are_refused(syntax: pydicom.uid.UID, place: int, values: bytes) -> None:
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"instance .* can't be decoded .* send it again"):
        load(spoiled(dicom_slices(LARGE), syntax, place, values))
    assert time.monotonic() - begin < 30
    assert load(spoiled(dicom_slices(LARGE), syntax, 0, b"")).voxels.shape == LARGE.shape


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, RLELossless])
def test_lossless_series_are_what_they_were(syntax: pydicom.uid.UID) -> None:
    np.testing.assert_array_equal(load(spoiled(dicom_slices(LARGE), syntax, 0, b"")).voxels, LARGE)


def test_a_decoder_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.medical.dicom.decode.BASE_SECONDS", 0.01)
    monkeypatch.setattr("apps.medical.dicom.decode.BYTES_A_SECOND", 2.0**40)
    with pytest.raises(InputError, match="was not decoded within 0 s"):
        load(spoiled(dicom_slices(LARGE), JPEGLSLossless, 0, b""))


def test_none_of_pydicoms_own_files_does_worse_than_a_refusal() -> None:
    """176 files that pydicom collected for their oddities: each is read, passed over with a reason, or refused."""
    root = Path(get_testdata_file("MR_small.dcm")).parent
    outcomes = {"read": 0, "passed over": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in sorted(p for p in root.rglob("*") if p.is_file()):
            try:
                series = group_series(read_instances(file).datasets)
                outcome = "read" if series and read_volume(series[0]) else "passed over"
            except InputError:
                outcome = "refused"
            outcomes[outcome] += 1
    assert outcomes["refused"] > 50
    assert outcomes["passed over"] > 50
