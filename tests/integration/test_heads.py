"""Whole heads: the shipped sample in many positions, and the real data sets where they are."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import shared_runtime as rt
from apps.medical.dicom.files import read_instances
from apps.medical.dicom.series import group_series, read_volume
from apps.medical.errors import InputError, MedicalError, NotHeadError
from apps.medical.evaluation.evaluate import case_files, evaluate_case, summarise
from apps.medical.segmentation.hippocampus import Segmentation, segment_hippocampi
from apps.medical.service import read_input, segment_file
from apps.medical.volume import Volume, read_nifti
from tests.phantoms import HEAD

SIDES = ("left hippocampus", "right hippocampus")
Change = Callable[[Volume], Volume]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rt.Session]:
    with rt.Session(rt.load("hippocampus-t1"), plans=tmp_path_factory.mktemp("plans")) as opened:
        yield opened


@pytest.fixture(scope="module")
def head() -> Volume:
    return read_input(HEAD)[0]


@pytest.fixture(scope="module")
def untouched(head: Volume, session: rt.Session) -> Segmentation:
    return segment_hippocampi(head, session)


def rotation(axis: int, degrees: float) -> np.ndarray:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    matrix = np.eye(4)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[i, i], matrix[j, j], matrix[i, j], matrix[j, i] = c, c, -s, s
    return matrix


def turned(axis: int, degrees: float) -> Change:
    """The head turned about the image's middle and sampled again on the old grid."""

    def change(v: Volume) -> Volume:
        middle = (v.affine @ [*((np.array(v.voxels.shape) - 1) / 2), 1])[:3]
        move = rotation(axis, degrees)
        move[:3, 3] = middle - move[:3, :3] @ middle
        back = np.linalg.inv(v.affine) @ np.linalg.inv(move) @ v.affine
        return Volume(ndimage.affine_transform(v.voxels, back[:3, :3], back[:3, 3], order=1), v.affine)

    return change


def shifted(v: Volume) -> Volume:
    move = np.eye(4)
    move[:3, 3] = (60, -45, 110)
    return Volume(v.voxels, move @ v.affine)


def thick(axis: int) -> Change:
    """Every three voxels along an axis become one."""

    def change(v: Volume) -> Volume:
        count = v.voxels.shape[axis] // 3
        moved = np.moveaxis(v.voxels, axis, 0)[: 3 * count]
        mean = np.moveaxis(moved.reshape(count, 3, *moved.shape[1:]).mean(1), 0, axis)
        scale, place = np.ones(4), np.zeros(4)
        scale[axis], place[axis], place[3] = 3, 1, 1
        affine = v.affine @ np.diag(scale)
        affine[:3, 3] = (v.affine @ place)[:3]
        return Volume(np.ascontiguousarray(mean), affine)

    return change


def without_front(v: Volume) -> Volume:
    """A quarter of the head is missing in front (rows run from front to back)."""
    cut = v.voxels.shape[1] // 4
    affine = v.affine.copy()
    affine[:3, 3] = (v.affine @ [0, cut, 0, 1])[:3]
    return Volume(np.ascontiguousarray(v.voxels[:, cut:]), affine)


def noisy(v: Volume) -> Volume:
    noise = np.random.default_rng(0).normal(0, 0.05 * np.percentile(v.voxels, 99), v.voxels.shape)
    return Volume((v.voxels + noise).astype(np.float32), v.affine)


def shaded(v: Volume) -> Volume:
    ramp = np.linspace(-1, 1, v.voxels.shape[1])[None, :, None] + 0.5 * np.linspace(-1, 1, v.voxels.shape[0])[:, None, None]
    return Volume((v.voxels * np.exp(0.4 * ramp)).astype(np.float32), v.affine)


def other_axes(v: Volume) -> Volume:
    """The same head stored back to front and with its axes in another order."""
    flipped = v.voxels[::-1, :, ::-1].transpose(2, 0, 1)
    turn = np.zeros((4, 4))
    turn[0, 1], turn[0, 3] = -1, v.voxels.shape[0] - 1
    turn[1, 2] = 1
    turn[2, 0], turn[2, 3] = -1, v.voxels.shape[2] - 1
    turn[3, 3] = 1
    return Volume(np.ascontiguousarray(flipped), v.affine @ turn)


def scaled(v: Volume) -> Volume:
    return Volume(v.voxels * 4000 - 777, v.affine)


CHANGES: dict[str, Change] = {
    "pitch +20": turned(0, 20),
    "pitch -20": turned(0, -20),
    "roll 20": turned(1, 20),
    "yaw 20": turned(2, 20),
    "shifted": shifted,
    "thick sagittal": thick(0),
    "thick coronal": thick(1),
    "thick axial": thick(2),
    "without front": without_front,
    "noisy": noisy,
    "shaded": shaded,
    "other axes": other_axes,
    "scaled": scaled,
}


def centroid(result: Segmentation, volume: Volume, side: str) -> np.ndarray:
    """Middle of a side's structures [mm, RAS]."""
    values = [s.value for s in result.structures if s.side == side]
    index = np.argwhere(np.isin(result.labels, values)).mean(0)
    return np.asarray(volume.affine[:3, :3] @ index + volume.affine[:3, 3])


def test_the_sample_head_gives_two_plausible_hippocampi(head: Volume, untouched: Segmentation) -> None:
    assert untouched.flags == ()
    for side in SIDES:
        assert 2 < untouched.volumes_ml[side] < 4
    left, right = (centroid(untouched, head, side) for side in ("left", "right"))
    assert right[0] - left[0] > 35, "the patient's right has the larger x in RAS"
    assert abs(left[1] - right[1]) < 8
    front, back = (np.argwhere(untouched.labels == v).mean(0) for v in (1, 2))
    assert (head.affine[:3, :3] @ (front - back))[1] > 8, "anterior lies in front of posterior"
    counts = np.bincount(untouched.labels.ravel())
    assert untouched.volumes_ml["left anterior hippocampus"] == pytest.approx(counts[1] * head.voxel_ml)


@pytest.mark.parametrize("name", CHANGES)
def test_volumes_and_sides_stand_a_changed_image(name: str, head: Volume, untouched: Segmentation, session: rt.Session) -> None:
    volume = CHANGES[name](head)
    result = segment_hippocampi(volume, session)
    for side in SIDES:
        assert result.volumes_ml[side] == pytest.approx(untouched.volumes_ml[side], rel=0.1), side
    assert centroid(result, volume, "right")[0] > centroid(result, volume, "left")[0] + 25


@pytest.mark.parametrize("size", [0.87, 1.12])
def test_small_and_large_heads_are_found(size: float, head: Volume, untouched: Segmentation, session: rt.Session) -> None:
    """The sample is 0.9 times as large as the average brain; these are 0.78 and 1.0 times."""
    affine = head.affine.copy()
    affine[:3, :3] *= size
    result = segment_hippocampi(Volume(head.voxels, affine), session)
    for side in SIDES:
        assert result.volumes_ml[side] == pytest.approx(untouched.volumes_ml[side] * size**3, rel=0.15)


def test_what_is_no_head_is_refused(session: rt.Session) -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(150, 150, 150)).astype(np.float32)
    blobs = ndimage.gaussian_filter(noise, 8)
    ball = (np.indices((150, 150, 150)).transpose(1, 2, 3, 0) - 75) ** 2
    sphere = np.where(ball.sum(-1) < 60**2, 100, 0).astype(np.float32) + noise
    for image in (noise, blobs, sphere):
        with pytest.raises(NotHeadError):
            segment_hippocampi(Volume(image, np.eye(4)), session)


def test_an_inverted_contrast_is_refused(head: Volume, session: rt.Session) -> None:
    brain = np.where(head.voxels > 40, np.percentile(head.voxels, 99.9) - head.voxels, 0).clip(0)
    with pytest.raises(NotHeadError):
        segment_hippocampi(Volume(brain.astype(np.float32), head.affine), session)


def test_too_little_of_a_head_is_refused(head: Volume, session: rt.Session) -> None:
    slab = Volume(np.ascontiguousarray(head.voxels[:, :, 110:140]), head.affine)
    with pytest.raises(MedicalError):
        segment_hippocampi(slab, session)


def test_real_crops_reach_the_published_overlap(data_dir: Path, session: rt.Session) -> None:
    """The shipped model on a sample of its own training cases: catches a broken path, says nothing of accuracy."""
    folder = data_dir / "msd_hippocampus"
    pairs = case_files(folder / "images", folder / "labels")[::26]
    metrics = summarise([evaluate_case(image, label, session, None) for image, label in pairs])
    assert metrics["dice"]["mean"] > 0.9
    assert metrics["failed"] == 0
    assert set(metrics["dice"]) == {"mean", "anterior", "posterior", "whole"}


def test_real_heads_and_what_is_none(data_dir: Path, session: rt.Session) -> None:
    for name in ("seg3d_mr", "stroke_t1"):
        result = segment_hippocampi(read_nifti(data_dir / "head_t1" / f"{name}.nii.gz"), session)
        assert all(1.5 < result.volumes_ml[side] < 4.5 for side in SIDES)
    others = ["totalseg_example/example_ct.nii.gz", "totalseg_example/example_mr_sm.nii.gz", "sts_ct_gtv/images/STS_001.nii.gz"]
    for name in others:
        with pytest.raises(InputError):
            segment_hippocampi(read_nifti(data_dir / name), session)


def test_a_t2_or_flair_head_is_refused_or_flagged(data_dir: Path, session: rt.Session) -> None:
    for name in ("t2", "flair"):
        path = next((data_dir / "brain_tumour_mri").rglob(f"{name}.nii.gz"))
        with pytest.raises(NotHeadError):
            segment_hippocampi(read_nifti(path), session)


ROBUSTNESS = {
    "ct_gantry_tilt_14deg_4slices.zip": "sheared by 14.0 degrees",
    "ct_nonuniform_spacing_5_5_10mm_4slices.zip": "about 1 missing",
    "mr_two_orientations_in_one_folder.zip": "mixes 2 orientations",
    "mr_only_two_slices.zip": "2 slices",
    "mr_jpeg_lossless_sv1_4slices.zip": (256, 256, 4),
    "mr_enhanced_multiframe_philips.dcm": (256, 256, 8),
    "ct_3slices_for_dicom_seg.zip": (512, 512, 3),
}


@pytest.mark.parametrize("name", ROBUSTNESS)
def test_awkward_real_dicom(name: str, data_dir: Path) -> None:
    expected = ROBUSTNESS[name]
    (series,) = group_series(read_instances(data_dir / "dicom_robustness" / name).datasets)
    if isinstance(expected, tuple):
        assert read_volume(series).voxels.shape == expected
    else:
        with pytest.raises(InputError, match=expected):
            read_volume(series)


@pytest.mark.parametrize("study", ["Study1", "Study2", "Study3"])
def test_a_crop_from_dicom_is_segmented_into_a_valid_dicom_seg(
    study: str, data_dir: Path, session: rt.Session, program: Callable[[str], str], tmp_path: Path
) -> None:
    report = segment_file(data_dir / "hippocampus_dicom_crops" / study, session, tmp_path)
    assert 1.5 < report["volumes_ml"]["hippocampus"] < 6
    seg = hd.seg.segread(tmp_path / "segmentation.dcm")
    labels = [seg.get_segment_description(n).segment_label for n in seg.segment_numbers]
    assert labels == ["anterior hippocampus", "posterior hippocampus"]
    answer = subprocess.run([program("dciodvfy"), str(tmp_path / "segmentation.dcm")], capture_output=True, text=True, check=False)
    assert "Error" not in answer.stderr + answer.stdout, answer.stderr


def test_compressed_ct_slices_decode_to_one_truth(data_dir: Path) -> None:
    folder = data_dir / "dicom_robustness" / "transfer_syntax"
    lossless = ["ct_big_endian", "ct_deflated", "ct_jpeg2000_lossless", "ct_jpegls_lossless", "ct_jpeg_lossless_sv1"]
    images = [read_instances(folder / f"{name}.dcm").datasets[0].pixel_array for name in lossless]
    for image in images[1:]:
        np.testing.assert_array_equal(image, images[0])


def test_the_label_map_lies_on_the_images_grid(data_dir: Path, session: rt.Session, tmp_path: Path) -> None:
    folder = data_dir / "msd_hippocampus"
    image, label = case_files(folder / "images", folder / "labels")[0]
    evaluate_case(image, label, session, tmp_path)
    written = nib.load(tmp_path / image.name)
    np.testing.assert_allclose(written.affine, nib.load(image).affine)
    assert written.shape == nib.load(image).shape
    assert set(np.unique(np.asanyarray(written.dataobj))) == {0, 1, 2}
