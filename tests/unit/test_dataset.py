"""Data sets of parts: what `boxes.csv` says of which image, and what it may not say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apps.industrial.errors import InputError
from apps.industrial.evaluation.dataset import labelled_samples
from apps.industrial.features import MAP
from apps.industrial.images import png
from apps.medical.evaluation.evaluate import case_files

HEADER = "file,x,y,width,height\n"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "test" / "hole"
    folder.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(png(np.random.default_rng(0).integers(0, 255, (64, 128), dtype=np.uint8)))
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        HEADER + "hole/a.png,64,0,64,32\nhole/a.png,0,32,64,32\n",
        "\ufefffile;x;y;width;height\r\ntest/hole/a.png;64;0;64;32\r\nhole\\a.png;-8;32;72;40\r\n",
        HEADER.replace(",", "\t") + "hole/a.png\t64\t0\t64\t32\nhole/a.png\t0\t32\t64\t32\n",
    ],
    ids=["commas", "as Excel writes it, a box beyond the edge", "tabs"],
)
def test_boxes_stand_for_outlines(dataset: Path, text: str) -> None:
    (dataset / "boxes.csv").write_text(text, newline="")
    a, b = labelled_samples(dataset)
    expected = np.zeros((MAP, MAP))
    expected[: MAP // 2, MAP // 2 :] = expected[MAP // 2 :, : MAP // 2] = 1
    np.testing.assert_array_equal(a.cells((64, 128)), expected)
    assert b.cells((64, 128)) is None  # the label alone is known


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEADER + "hole/c.png,1,1,5,5\n", "names 1 files that are not below .*hole/c.png; expected KIND/NAME"),
        (HEADER + "a.png,1,1,5,5\n", "such as a.png"),
        (HEADER + "hole/a.png,1,1,0,5\n", "line 2: box .*above 0"),
        (HEADER + "hole/a.png,nan,1,5,5\n", "line 2: box"),
        (HEADER + "hole/a.png,1,1,5\n", "line 2: .*expected the columns"),
        ("name,x,y,w,h\nhole/a.png,1,1,5,5\n", "expected the columns file, x, y, width, height"),
    ],
)
def test_boxes_that_fit_no_image_are_refused(dataset: Path, text: str, words: str) -> None:
    (dataset / "boxes.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        labelled_samples(dataset)


def test_a_file_of_boxes_in_another_encoding_is_refused(dataset: Path) -> None:
    (dataset / "boxes.csv").write_bytes(HEADER.encode() + "hole/ä.png,1,1,5,5\n".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8"):
        labelled_samples(dataset)


def test_a_box_outside_of_its_image_is_said(dataset: Path) -> None:
    (dataset / "boxes.csv").write_text(HEADER + "hole/a.png,200,10,20,20\n")
    with pytest.raises(InputError, match="lie outside of its 128 x 64 pixels"):
        labelled_samples(dataset)[0].cells((64, 128))


@pytest.mark.parametrize("name", ["a_mask.png", "a.png", "a_mask.tif", "a.bmp"])
def test_outlines_by_the_name_of_their_image(dataset: Path, name: str) -> None:
    folder = dataset / "ground_truth" / "hole"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(png(np.zeros((64, 128), np.uint8)))
    a, b = labelled_samples(dataset)
    assert a.mask == folder / name
    assert b.mask is None


def test_outlines_of_no_image_are_said(dataset: Path) -> None:
    folder = dataset / "ground_truth" / "hole"
    folder.mkdir(parents=True)
    (folder / "a_gt.png").write_bytes(png(np.zeros((64, 128), np.uint8)))
    with pytest.raises(InputError, match=r"1 outlines, such as a_gt\.png, and none .* expected a_mask\.png"):
        labelled_samples(dataset)


def test_what_systems_leave_beside_images_is_no_image_and_no_kind(dataset: Path) -> None:
    before = [sample.path for sample in labelled_samples(dataset)]
    kind = before[0].parent
    (kind / f"._{before[0].name}").write_bytes(b"\x00\x05\x16\x07 a Mac's notes")
    (kind.parent / ".ipynb_checkpoints").mkdir()
    (kind.parent / ".ipynb_checkpoints" / "a.png").write_bytes(before[0].read_bytes())
    assert [sample.path for sample in labelled_samples(dataset)] == before
    (kind / "._b.nii.gz").touch()
    (kind / "b.nii.gz").touch()
    assert [image.name for image, _ in case_files(kind, kind)] == ["b.nii.gz"]
