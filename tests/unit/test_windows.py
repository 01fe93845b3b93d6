"""Windows over a volume: the blend against its definition, every shape, in order and once, and what does not fit."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

import shared_runtime as rt
from shared_runtime.windows import LEAST, SIGMA
from tests.networks import save


def network(path: Path, kernel: np.ndarray) -> rt.Model:
    """One convolution of one channel to (classes, 1, *kernel), the volume's size kept."""
    rank = kernel.ndim - 2
    pads = [side // 2 for side in kernel.shape[2:]] * 2
    axes = [f"d{a}" for a in range(rank)]
    node = helper.make_node("Conv", ["image", "w"], ["scores"], pads=pads, kernel_shape=kernel.shape[2:])
    shapes = {"image": ["batch", 1, *axes]}, {"scores": ["batch", len(kernel), *axes]}
    return rt.load(save(path, [node], {"w": kernel}, *shapes))


def session(model: rt.Model, folder: Path) -> rt.Session:
    return rt.Session(model, "cpu", threads=1, variant="float32", plans=folder / "plans", budget_s=0.2, ladder=(1,))


@pytest.mark.parametrize("shape", [(30, 9, 12), (9, 30, 12), (9, 12, 31), (8, 8, 8), (5, 20, 3), (1, 1, 1)])
@pytest.mark.parametrize("rows", [1, 5])
def test_what_each_window_agrees_on_is_the_answer(shape: tuple[int, ...], rows: int, tmp_path: Path) -> None:
    """A pointwise network has the same scores in every window, so the blend must give exactly those."""
    kernel = np.array([1.0, -2.0, 0.5], np.float32).reshape(3, 1, 1, 1, 1)
    volume = np.random.default_rng(0).integers(-1000, 1000, (1, *shape)).astype(np.int16)
    with session(network(tmp_path / "m.onnx", kernel), tmp_path) as ready:
        windows = rt.SlidingWindow(ready, (8, 8, 8), overlap=0.5, rows=rows)
        expected = kernel.reshape(3, 1, 1, 1) * volume
        np.testing.assert_allclose(windows.scores(volume), expected, rtol=1e-5)
        np.testing.assert_array_equal(windows.labels(volume), expected.argmax(axis=0))
        given = np.full(shape, 9, np.uint8)
        assert windows.labels(volume, given) is given
        np.testing.assert_array_equal(given, expected.argmax(axis=0))
        seen = np.zeros(shape, int)
        for where, slab in windows.slabs(volume):
            assert slab.shape[1:] == seen[where].shape
            seen[where] += 1
        assert np.all(seen == 1)


def test_the_blend_is_the_weighted_mean_of_its_windows(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    kernel = generator.standard_normal((2, 1, 3, 3)).astype(np.float32)
    image = generator.standard_normal((1, 21, 10)).astype(np.float32)
    model = network(tmp_path / "m.onnx", kernel)
    line = np.maximum(np.exp(-0.5 * ((np.arange(8) - 3.5) / (8 * SIGMA)) ** 2), LEAST)
    weights = np.outer(line, line)
    total, weight = np.zeros((2, 21, 10)), np.zeros((21, 10))
    with session(model, tmp_path) as ready:
        for y, x in product((0, 4, 9, 13), (0, 2)):  # steps of at most 6 for a quarter of 8
            part = ready.run({"image": image[None, :, y : y + 8, x : x + 8]})["scores"][0]
            total[:, y : y + 8, x : x + 8] += part * weights
            weight[y : y + 8, x : x + 8] += weights
        np.testing.assert_allclose(rt.SlidingWindow(ready, (8, 8), overlap=0.25).scores(image), total / weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 24), (24, 5), (3, 8)])
def test_windows_that_do_not_overlap_are_handed_on_one_by_one(shape: tuple[int, int], tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    kernel = generator.standard_normal((2, 1, 3, 3)).astype(np.float32)
    image = generator.standard_normal((1, *shape)).astype(np.float32)
    padded = np.pad(image, ((0, 0), *((0, -n % 8) for n in shape)))
    expected = np.zeros((2, *padded.shape[1:]), np.float32)
    with session(network(tmp_path / "m.onnx", kernel), tmp_path) as ready:
        for y, x in product(range(0, padded.shape[1], 8), range(0, padded.shape[2], 8)):
            expected[:, y : y + 8, x : x + 8] = ready.run({"image": padded[None, :, y : y + 8, x : x + 8]})["scores"][0]
        windows = rt.SlidingWindow(ready, (8, 8), overlap=0.0, rows=2)
        np.testing.assert_allclose(windows.scores(image), expected[:, : shape[0], : shape[1]], rtol=1e-5, atol=1e-6)
        slabs = [slab.shape[1:] for _, slab in windows.slabs(image)]
    assert len(slabs) == padded.size // 64
    assert max(size for slab in slabs for size in slab) <= 8


def test_a_volume_on_disk_is_read_window_by_window(tmp_path: Path) -> None:
    path = tmp_path / "volume.raw"
    volume = np.random.default_rng(2).integers(-5, 5, (1, 40, 12, 12)).astype(np.int16)
    volume.tofile(path)
    kernel = np.array([1.0, -1.0], np.float32).reshape(2, 1, 1, 1, 1)
    with session(network(tmp_path / "m.onnx", kernel), tmp_path) as ready:
        out = np.memmap(tmp_path / "labels.raw", np.uint8, "w+", shape=volume.shape[1:])
        rt.SlidingWindow(ready, (8, 8, 8)).labels(np.memmap(path, np.int16, "r", shape=volume.shape), out)
    np.testing.assert_array_equal(out, volume[0] < 0)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with session(network(tmp_path / "m.onnx", np.ones((2, 1, 1, 1, 1), np.float32)), tmp_path) as ready:
        with pytest.raises(rt.ModelError, match="a window of 2 axes"):
            rt.SlidingWindow(ready, (8, 8))
        with pytest.raises(ValueError, match="overlap"):
            rt.SlidingWindow(ready, (8, 8, 8), overlap=1.0)
        windows = rt.SlidingWindow(ready, (8, 8, 8))
        with pytest.raises(rt.InputError, match=r"got \[9, 9, 9\]"):
            windows.labels(np.zeros((9, 9, 9)))
        with pytest.raises(rt.InputError, match="without empty axes"):
            windows.labels(np.zeros((1, 9, 0, 9)))
        with pytest.raises(rt.InputError, match="image"):
            windows.labels(np.zeros((2, 9, 9, 9)))
    pooled = helper.make_node("GlobalAveragePool", ["image"], ["scores"])
    model = rt.load(save(tmp_path / "p.onnx", [pooled], {}, {"image": ["batch", 1, "h", "w"]}, {"scores": ["batch", 1, 1, 1]}))
    with session(model, tmp_path) as ready, pytest.raises(rt.ModelError, match="needs scores"):
        rt.SlidingWindow(ready, (8, 8)).scores(np.zeros((1, 9, 9)))


def test_one_score_a_voxel_has_no_labels(tmp_path: Path) -> None:
    with session(network(tmp_path / "m.onnx", np.ones((1, 1, 1, 1, 1), np.float32)), tmp_path) as ready:
        windows = rt.SlidingWindow(ready, (8, 8, 8))
        assert windows.scores(np.ones((1, 9, 9, 9), np.float32)).shape == (1, 9, 9, 9)
        with pytest.raises(rt.ModelError, match="put a limit to `scores`"):
            windows.labels(np.ones((1, 9, 9, 9), np.float32))


def test_a_model_of_a_fixed_number_of_rows_takes_that_many_windows(tmp_path: Path) -> None:
    kernel = np.random.default_rng(0).normal(size=(2, 1, 3, 3)).astype(np.float32)
    node = helper.make_node("Conv", ["image", "w"], ["scores"], pads=[1] * 4, kernel_shape=[3, 3])
    shapes = {"image": [4, 1, 8, 8]}, {"scores": [4, 2, 8, 8]}
    fixed = rt.load(save(tmp_path / "fixed.onnx", [node], {"w": kernel}, *shapes))
    volume = np.random.default_rng(1).normal(size=(1, 21, 13)).astype(np.float32)
    with session(fixed, tmp_path) as four, session(network(tmp_path / "free.onnx", kernel), tmp_path) as free:
        expected = rt.SlidingWindow(free, (8, 8)).scores(volume)
        np.testing.assert_allclose(rt.SlidingWindow(four, (8, 8)).scores(volume), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (np.zeros((9, 8), np.uint8), r"shape \[9, 9\], got uint8 \[9, 8\]"),
        (np.zeros((9, 9), np.float32), "whole numbers"),
        (np.zeros((9, 9), bool), "whole numbers"),
    ],
)
def test_labels_are_written_to_what_holds_them(out: np.ndarray, words: str, tmp_path: Path) -> None:
    with session(network(tmp_path / "m.onnx", np.ones((300, 1, 1, 1), np.float32)), tmp_path) as ready:
        windows = rt.SlidingWindow(ready, (8, 8))
        with pytest.raises(rt.InputError, match=words):
            windows.labels(np.ones((1, 9, 9), np.float32), out)
        with pytest.raises(rt.InputError, match="can't hold 300 classes"):
            windows.labels(np.ones((1, 9, 9), np.float32), np.zeros((9, 9), np.uint8))
        with pytest.raises(rt.InputError, match="got a list"):
            windows.labels([[1.0]])  # type: ignore[arg-type]
