"""Metrics, normalisation, windows, crops and the preview."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from apps.medical.errors import InputError, NotHeadError
from apps.medical.evaluation.evaluate import evaluate_case, summarise
from apps.medical.evaluation.metrics import bootstrap_interval, dice, hd95_mm, volume_error_percent
from apps.medical.preprocessing.normalise import normalise_mr
from apps.medical.preview import write_preview
from apps.medical.segmentation import hippocampus
from apps.medical.segmentation.hippocampus import CROP_STRUCTURES, segment_hippocampi
from apps.medical.segmentation.window import WINDOW, place_in_window
from apps.medical.volume import Volume, read_labels, read_nifti, write_nifti
from shared_runtime.signature import Tensors


def cube(start: int, size: int = 10) -> np.ndarray:
    mask = np.zeros((40, 40, 40), bool)
    mask[start : start + size, 10:20, 10:20] = True
    return mask


def test_dice_is_overlap_over_mean_size() -> None:
    assert dice(cube(5), cube(5)) == 1
    assert dice(cube(5), cube(10)) == pytest.approx(0.5)
    assert dice(cube(5), cube(25)) == 0
    empty = np.zeros((3, 3, 3), bool)
    assert dice(empty, empty) == 1


def test_hd95_is_in_millimetres_of_each_axis() -> None:
    assert hd95_mm(cube(5), cube(5), (1, 1, 1)) == 0
    assert hd95_mm(cube(5), cube(8), (1, 1, 1)) == pytest.approx(3)
    assert hd95_mm(cube(5), cube(8), (2.5, 1, 1)) == pytest.approx(7.5)
    assert hd95_mm(cube(5), np.zeros((40, 40, 40), bool), (1, 1, 1)) == np.inf


def test_volume_error_is_signed_and_relative_to_the_reference() -> None:
    assert volume_error_percent(cube(5, 12), cube(5, 10)) == pytest.approx(20)
    assert volume_error_percent(cube(5, 5), cube(5, 10)) == pytest.approx(-50)


def test_the_bootstrap_interval_holds_the_mean_and_narrows() -> None:
    values = np.random.default_rng(0).normal(0.9, 0.05, 400)
    low, high = bootstrap_interval(values[:40].tolist())
    assert low < values[:40].mean() < high
    narrow = bootstrap_interval(values.tolist())
    assert narrow[1] - narrow[0] < high - low


@pytest.mark.parametrize("scale", [1e-3, 1.0, 255.0, 1.7e6])
def test_normalisation_does_not_depend_on_the_unit(scale: float) -> None:
    image = np.random.default_rng(0).gamma(2, 1, (20, 20, 20))
    image[0, 0, 0] = 1000
    result = normalise_mr(image * scale + 3 * scale)
    np.testing.assert_allclose(result, normalise_mr(image), atol=2e-4)
    assert abs(result.mean()) < 1e-4
    assert result.std() == pytest.approx(1, abs=1e-3)


def test_a_constant_image_becomes_zero() -> None:
    assert not normalise_mr(np.full((4, 4, 4), 7.0)).any()


def test_the_window_centres_small_and_cuts_large_images() -> None:
    small = np.ones((35, 50, 36), np.float32)
    placed = place_in_window(small)
    assert placed.shape == WINDOW
    assert placed.sum() == small.size
    large = np.zeros((60, 70, 60), np.float32)
    large[30, 35, 30] = 1
    assert place_in_window(large)[24, 32, 24] == 1


class Threshold:
    """Stands in for the network: bright voxels are hippocampus, the brighter of them its anterior part."""

    model = None

    def run(self, inputs: Tensors) -> Tensors:
        image = inputs["image"][:, 0]
        bright = image > 1.5
        brighter = [image[i] > image[i][bright[i]].mean() if bright[i].any() else bright[i] for i in range(len(image))]
        logits = np.zeros((len(image), 3, *WINDOW), np.float32)
        logits[:, 0] = np.where(bright, -9, 9)
        logits[:, 1], logits[:, 2] = np.where(brighter, 6, 0), np.where(brighter, 0, 6)
        return {"logits": logits}


def crop_with_box(flip: tuple[int, ...] = (), permute: tuple[int, int, int] = (0, 1, 2)) -> tuple[Volume, float]:
    """A crop in RAS mm with a box of 12 x 24 x 10 mm, its front half brighter, stored in any axis order; and the box's mL."""
    voxels = np.random.default_rng(0).normal(0, 0.1, (40, 52, 40)).astype(np.float32)
    voxels[14:26, 14:38, 15:25] += 10
    voxels[14:26, 26:38, 15:25] += 4
    affine = np.eye(4)
    affine[:3, 3] = (-20, -30, -10)
    for axis in flip:
        voxels = np.flip(voxels, axis)
        turn = np.eye(4)
        turn[axis, axis], turn[axis, 3] = -1, voxels.shape[axis] - 1
        affine = affine @ turn
    voxels = voxels.transpose(permute)
    order = np.zeros((4, 4))
    for new, old in enumerate(permute):
        order[old, new] = 1
    order[3, 3] = 1
    return Volume(np.ascontiguousarray(voxels), affine @ order), 12 * 24 * 10 / 1000


@pytest.mark.parametrize(("flip", "permute"), [((), (0, 1, 2)), ((0, 1), (0, 1, 2)), ((2,), (2, 0, 1)), ((0, 2), (1, 2, 0))])
def test_a_crop_is_segmented_in_place_whatever_its_axis_order(flip: tuple[int, ...], permute: tuple[int, int, int]) -> None:
    volume, expected = crop_with_box(flip, permute)
    result = segment_hippocampi(volume, Threshold())  # type: ignore[arg-type]
    assert result.volumes_ml["hippocampus"] == pytest.approx(expected, rel=0.02)
    assert result.structures == CROP_STRUCTURES
    np.testing.assert_array_equal(result.labels > 0, volume.voxels > 5)
    anterior = np.argwhere(result.labels == 1).mean(0)
    posterior = np.argwhere(result.labels == 2).mean(0)
    toward_front = (volume.affine[:3, :3] @ (anterior - posterior))[1]
    assert toward_front > 5


@pytest.mark.parametrize("shape", [(35, 50, 36), (36, 51, 37), (48, 64, 48)])
def test_a_crop_of_one_millimetre_is_seen_as_it_is(shape: tuple[int, int, int]) -> None:
    """Nothing is interpolated, whether its sides are odd or even."""
    voxels = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    volume = Volume(voxels, np.eye(4))
    centre, axes = hippocampus._crop_pose(volume)
    values, inside = hippocampus._sampled(volume, hippocampus._frame(axes, centre))
    assert inside.sum() == voxels.size
    np.testing.assert_allclose(values[inside], place_in_window(voxels)[inside], atol=1e-5)


def test_a_refused_case_counts_as_an_empty_answer(tmp_path: Path) -> None:
    flat = np.random.default_rng(0).normal(0, 0.01, (40, 50, 40)).astype(np.float32).clip(-0.01, 0.01)
    labels = np.zeros(flat.shape, np.uint8)
    labels[10:20, 10:30, 10:20], labels[10:20, 30:40, 10:20] = 2, 1
    for name, array in (("image", flat), ("label", labels)):
        write_nifti(array, np.eye(4), tmp_path / f"{name}.nii.gz")
    case = evaluate_case(tmp_path / "image.nii.gz", tmp_path / "label.nii.gz", Threshold(), tmp_path)  # type: ignore[arg-type]
    assert case["dice"] == {"anterior": 0, "posterior": 0, "whole": 0, "mean": 0}
    assert case["flags"][0].startswith("refused: no hippocampus")
    metrics = summarise([case])
    assert metrics["failed"] == 1
    assert metrics["hd95_mm"]["mean"] is None


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path, labels: path.write_bytes(path.read_bytes()[:200]), "label map .* is not a readable NIfTI file"),
        (lambda path, labels: write_nifti(labels[1:], np.eye(4), path), "label map .* has shape .* expected one grid"),
        (lambda path, labels: write_nifti(labels, np.diag([2, 1, 1, 1.0]), path), "different affines"),
        (lambda path, labels: write_nifti(labels * 7, np.eye(4), path), "holds labels 7, 14; expected 0, 1, 2"),
    ],
)
def test_a_label_map_that_does_not_fit_is_named(tmp_path: Path, spoil: Callable[[Path, np.ndarray], Any], why: str) -> None:
    labels = np.zeros((40, 50, 40), np.uint8)
    labels[10:20, 10:30, 10:20], labels[10:20, 30:40, 10:20] = 1, 2
    for name in ("image", "label"):
        write_nifti(labels, np.eye(4), tmp_path / f"{name}.nii.gz")
    image = read_nifti(tmp_path / "image.nii.gz")
    np.testing.assert_array_equal(read_labels(tmp_path / "label.nii.gz", image, (1, 2)), labels)
    spoil(tmp_path / "label.nii.gz", labels)
    with pytest.raises(InputError, match=why):
        read_labels(tmp_path / "label.nii.gz", image, (1, 2))


def test_an_anisotropic_crop_keeps_its_volume() -> None:
    volume, expected = crop_with_box()
    thick = volume.voxels[:, :, 1:39].reshape(40, 52, 19, 2).mean(-1)
    affine = volume.affine @ np.diag([1, 1, 2, 1.0])
    affine[2, 3] += 1.5
    result = segment_hippocampi(Volume(thick, affine), Threshold())  # type: ignore[arg-type]
    assert result.volumes_ml["hippocampus"] == pytest.approx(expected, rel=0.1)


def test_a_crop_larger_than_the_window_is_searched() -> None:
    voxels = np.random.default_rng(0).normal(0, 0.1, (84, 88, 80)).astype(np.float32)
    voxels[8:20, 50:74, 60:70] += 10
    result = segment_hippocampi(Volume(voxels, np.eye(4)), Threshold())  # type: ignore[arg-type]
    assert result.volumes_ml["hippocampus"] == pytest.approx(2.88, rel=0.05)


def test_other_modalities_and_empty_answers_are_refused() -> None:
    volume, _ = crop_with_box()
    with pytest.raises(InputError, match="modality CT"):
        segment_hippocampi(Volume(volume.voxels, volume.affine, modality="CT"), Threshold())  # type: ignore[arg-type]
    flat = np.random.default_rng(0).normal(0, 0.01, (40, 50, 40)).astype(np.float32).clip(-0.01, 0.01)
    with pytest.raises(NotHeadError, match="no hippocampus"):
        segment_hippocampi(Volume(flat, np.eye(4)), Threshold())  # type: ignore[arg-type]


def test_implausible_volumes_and_cut_structures_are_flagged() -> None:
    voxels = np.random.default_rng(0).normal(0, 0.1, (40, 52, 40)).astype(np.float32)
    voxels[15:25, 20:28, 15:24] += 10
    result = segment_hippocampi(Volume(voxels, np.eye(4)), Threshold())  # type: ignore[arg-type]
    assert any("is outside of 1.2-6.0 mL" in flag for flag in result.flags)
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[0, 3, 3] = 2
    assert hippocampus._edge_flags(labels, CROP_STRUCTURES) == ["posterior hippocampus: it is cut by the edge of the image"]


def test_the_preview_shows_the_structures_in_their_colours(tmp_path: Path) -> None:
    volume, _ = crop_with_box()
    labels = np.where(volume.voxels > 5, 1, 0).astype(np.uint8)
    write_preview(volume, labels, CROP_STRUCTURES, tmp_path / "p.png")
    pixels = np.asarray(Image.open(tmp_path / "p.png"))
    assert (pixels == np.array(CROP_STRUCTURES[0].colour)).all(-1).sum() > 100
