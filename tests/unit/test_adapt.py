"""Learning from labelled defects: what batches hold, and the copies whose mean is learned."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

import shared_runtime as rt
from apps.industrial.features import MAP, MODEL, SIZE, prepared
from apps.industrial.training import adapt as module
from apps.industrial.training.adapt import BATCH, MOST_PASTED, WINDOW, Examples, _Pool, adapt
from apps.industrial.training.augment import _mean, _widest
from apps.industrial.training.export import network_from
from apps.industrial.training.network import TextureNetwork

GOOD, BAD = 12, 4
CPU = torch.device("cpu")


def examples() -> Examples:
    """Grey noise, and the same with a dark square where its outline says."""
    rng = np.random.default_rng(0)
    images = [rng.integers(90, 166, (SIZE, SIZE)).astype(np.uint8) for _ in range(GOOD + BAD)]
    outline = np.zeros((MAP, MAP), np.float32)
    outline[20:32, 24:36] = 1
    for image in images[GOOD:]:
        image[80:128, 96:144] = 10
    return Examples.of(images[:GOOD], images[GOOD:], [outline] * BAD)


@pytest.fixture(scope="module")
def shipped() -> TextureNetwork:
    """The shipped network."""
    return network_from(onnx.load(rt.load(MODEL).graph))


def test_half_of_what_is_drawn_is_good() -> None:
    made = examples()
    assert made.images.shape == (GOOD + BAD, 1, SIZE, SIZE), "all are grey"
    assert made.share[:GOOD].sum() == pytest.approx(0.5)
    assert made.share.sum() == pytest.approx(1)
    assert made.masks.sum(axis=(1, 2)).tolist() == [0] * GOOD + [12 * 12] * BAD


def test_one_image_in_colour_and_all_have_three_channels() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE)).astype(np.uint8)
    alike, nothing = np.repeat(grey[:, :, None], 3, axis=2), np.zeros((MAP, MAP), np.float32)
    assert Examples.of([grey], [alike], [nothing]).images.shape[1] == 1
    coloured = alike.copy()
    coloured[..., 2] //= 2
    made = Examples.of([grey], [coloured], [nothing])
    assert made.images.shape[1] == 3
    np.testing.assert_array_equal(made.images[0], prepared(grey))
    np.testing.assert_array_equal(made.images[1], prepared(coloured))


def test_a_batch_says_of_each_image_what_its_pixels_show() -> None:
    torch.manual_seed(1)
    pool, defective = _Pool(examples(), CPU), []
    for _ in range(20):
        images, masks, bad = pool.batch()
        assert images.shape == (BATCH, 3, WINDOW, WINDOW)
        assert masks.shape == (BATCH, WINDOW // 4, WINDOW // 4)
        dark = torch.nn.functional.avg_pool2d(images[:, 0], 12).amin(dim=(1, 2)) < images[:, 0].mean(dim=(1, 2)) - 0.15
        assert (dark.float() == bad).float().mean() > 0.8  # a paste over a window's edge may show little of itself
        outlined = masks.amax(dim=(1, 2)) > 0.5
        assert bool((outlined == (bad > 0)).all())
        defective.append(float(bad.mean()))
    assert 0.45 < np.mean(defective) < 0.8  # half of them, the windows beside a defect fewer, and some of the good ones by a paste


def test_defects_are_pasted_on_good_images_alone_and_not_on_too_many() -> None:
    torch.manual_seed(2)
    pool, changed = _Pool(examples(), CPU), []
    for _ in range(60):
        seen, target, bad = pool.images[:BATCH].clone(), pool.masks[:BATCH].clone(), pool.bad[:BATCH].clone()
        pool._paste(seen, target, bad)
        moved = (seen != pool.images[:BATCH]).flatten(1).any(dim=1)
        assert not moved[GOOD:].any()
        assert int(moved.sum()) <= MOST_PASTED
        assert bool(((target - pool.masks[:BATCH]).flatten(1).abs().amax(dim=1) == 0)[~moved].all())
        assert bool((bad[:GOOD] <= moved[:GOOD].float()).all())
        assert bool(bad[GOOD:].all())
        changed.append(int(moved.sum()))
    assert 0.2 * GOOD < np.mean(changed) < 0.32 * GOOD


def test_what_was_learned_is_the_mean_of_copies_that_parted(shipped: TextureNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[module._Member] = []

    class Kept(module._Member):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(module, "_Member", Kept)
    learned = adapt(shipped, examples(), 1e9, CPU, most_steps=5, members=3)
    assert len(made) == 3
    ways = [copy.average[0] - made[0].average[0] for copy in made[1:]]
    assert all(way.abs().max() > 0 for way in ways)
    after = dict(learned.named_parameters())
    before = dict(shipped.named_parameters())
    name = next(name for name, value in made[0].network.named_parameters() if value is made[0].weights[0])
    mean = torch.stack([copy.average[0] for copy in made]).mean(dim=0)
    assert torch.equal(after[name], mean)
    assert not torch.equal(after[name], before[name])
    assert torch.equal(after["trunk.layers.0.conv.weight"], before["trunk.layers.0.conv.weight"])  # shared with the shipped network


def test_copies_are_one_until_they_part(shipped: TextureNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[module._Member] = []
    follow = module._Member.follow

    def followed(self: module._Member, other: module._Member) -> None:
        follow(self, other)
        made.extend((other, self))
        ours, theirs = self._state(), other._state()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    monkeypatch.setattr(module._Member, "follow", followed)
    adapt(shipped, examples(), 1e9, CPU, most_steps=5, members=2)
    assert len(made) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_copies_learn_at_the_same_time_as_one_graph(shipped: TextureNetwork) -> None:
    made = examples()
    learned = adapt(shipped, made, 60.0, torch.device("cuda"), most_steps=60)
    with torch.no_grad():
        logits = learned(torch.from_numpy(made.images).expand(-1, 3, -1, -1))["image"]
    assert logits[GOOD:].min() > logits[:GOOD].max()


@pytest.mark.parametrize("side", [3, 7, 17])
def test_the_widest_and_the_mean_of_a_place_are_those_of_the_pools(side: int) -> None:
    images = torch.rand(2, 1, 40, 50, generator=torch.Generator().manual_seed(side))
    assert torch.equal(_widest(images, side), torch.nn.functional.max_pool2d(images, side, 1, side // 2))
    assert torch.allclose(_mean(images, side), torch.nn.functional.avg_pool2d(images, side, 1, side // 2), atol=1e-6)
