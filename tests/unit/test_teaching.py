"""Teaching a recipe: from good parts and defects to a recipe that judges the line."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from apps.common.settings import Settings
from apps.industrial.acquisition.generated import write_dataset
from apps.industrial.anomaly.statistics import GoodParts
from apps.industrial.bootstrap import open_industrial
from apps.industrial.classification.probe import Probe
from apps.industrial.errors import InputError, RecipeNotFoundError
from apps.industrial.evaluation.dataset import Sample, good_samples, labelled_samples
from apps.industrial.features import MAP
from apps.industrial.images import decode_image, png
from apps.industrial.inspection.inspector import Inspector, relative
from apps.industrial.inspection.recipe import Recipe
from apps.industrial.learning import held_back
from apps.industrial.messages import FRAMES, FrameMessage
from apps.industrial.service import IndustrialService
from apps.industrial.store import Part
from apps.industrial.synthesis.textures import good_part
from apps.industrial.teaching import _spread, advice, learned_weight
from apps.industrial.training.adapt import Examples
from apps.industrial.worker import run_worker
from pipelines import PermanentError


def test_pictures_of_parts_that_passed_are_deleted_after_their_days(settings: Settings, tmp_path: Path) -> None:
    write_dataset(tmp_path, "cast", good=20, each=1)
    service, log = open_industrial(settings)
    good = good_samples(tmp_path / "train" / "good")
    service.teach("cast", good)
    pictures = [sample.path.read_bytes() for sample in good[:4]]
    sent = [service.submit(picture, "cast", event_time="2026-01-01T00:00:00Z") for picture in pictures]
    service.submit(pictures[0], "cast")
    run_worker(service, log, threading.Event(), until_idle=True)

    def parts() -> list[Part]:
        return [part for frame in sent if (part := service.store.find(frame)) is not None]

    assert [part.verdict.verdict for part in parts()] == ["pass"] * 4
    files = [Path(service.blobs._path(part.verdict.blob)) for part in parts()]
    service.judge(sent[3], "good", "operator")
    assert service.tidy(30) == 0, "they were stored just now, whatever their time says"
    for file in files:
        os.utime(file, (0, 0))
    service.submit(pictures[1], "cast")
    with pytest.raises(InputError, match=r"0\.1 to 36500"):
        run_worker(service, log, threading.Event(), until_idle=True, keep_days=0.01)
    stop = threading.Event()
    worker = threading.Thread(target=lambda: run_worker(service, log, stop, keep_days=30))
    worker.start()
    deadline = time.monotonic() + 60
    while files[2].exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    stop.set()
    worker.join()
    assert [file.exists() for file in files] == [True, True, False, True], "shared, sent again, not needed, looked at"
    assert [part.verdict.blob != "" for part in parts()] == [True, True, False, True]
    assert service.tidy(30) == 0
    assert len(service.learned_from_line("cast", tmp_path)[0]) == 1
    service.close()
    log.close()


def test_metrics_tell_only_so_many_stations_apart(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.industrial.service.MOST_STATIONS", 2)
    service, log = open_industrial(settings)
    assert [service._counted_as(name) for name in ("a", "b", "c", "a", "d", "b")] == ["a", "b", "others", "a", "others", "b"]
    service.close()
    log.close()


def test_a_recipe_is_taught_and_judges_the_line(settings: Settings, tmp_path: Path) -> None:
    write_dataset(tmp_path, "cast", good=30, each=2)
    service, log = open_industrial(settings)
    taught = service.teach("cast", good_samples(tmp_path / "train" / "good"))
    assert taught.recipe.facts.good == 30
    assert taught.recipe.regions is None, "it takes more parts to learn regions"
    with pytest.raises(RecipeNotFoundError, match="did you mean 'cast'"):
        service.recipes.folder("casd")
    sent = {service.submit(sample.path.read_bytes(), "cast"): sample.kind for sample in labelled_samples(tmp_path)}
    broken = service.submit(b"not an image", "cast")
    FRAMES.send(log, FrameMessage("lost", "2026-01-01T00:00:00Z", "s", "nothing", "sha256:" + "0" * 64), "test")
    black = service.submit(png(np.zeros((256, 256), np.uint8)), "cast")
    counts = run_worker(service, log, threading.Event(), until_idle=True).counts
    assert counts.dead == 2
    assert service.store.find(broken) is None
    dark = service.store.find(black)
    assert dark is not None
    assert dark.verdict.verdict == "review"
    assert "black" in dark.verdict.reasons[0]
    parts = {frame: service.store.find(frame) for frame in sent}
    chips = [p.verdict.verdict for f, p in parts.items() if p is not None and sent[f] == "chip"]
    assert set(chips) <= {"review", "fail"}
    frame = next(iter(sent))
    before = service.store.counts().total
    service.process(FrameMessage(frame, "2026-01-01T00:00:00Z", "s", "cast", "sha256:" + "0" * 64))
    assert service.store.counts().total == before, "a frame is judged once"
    recipe = service.recipes.load("cast")
    facts = msgspec.structs.replace(recipe.facts, network="0" * 64)
    with pytest.raises(InputError, match=r"was taught with another network \(0000.*teach it again"):
        Inspector(replace(recipe, facts=facts), service.inspector("cast").session)
    service.judge(frame, "defect", "tester", "seen")
    assert [p.verdict.frame_id for p in service.store.judged("cast")] == [frame]
    service.close()
    log.close()


def test_of_very_many_good_images_some_are_learned_from(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [Sample(Path(f"{number}.png"), "good", decided=number in (7, 8)) for number in range(101)]
    chosen = [int(sample.path.stem) for sample in _spread(given, 22)]
    assert len(chosen) == 22
    assert {0, 7, 8, 100} <= set(chosen)
    assert chosen == sorted(chosen)
    assert np.diff([number for number in chosen if number not in (7, 8)]).max() <= 8, "spread evenly"
    assert _spread(given[:22], 22) == given[:22]
    assert [int(sample.path.stem) for sample in _spread([replace(one, decided=True) for one in given], 3)] == [98, 99, 100]
    late = [replace(one, decided=number > 20) for number, one in enumerate(given)]
    assert [int(sample.path.stem) for sample in _spread(late, 4)] == [0, 20, 99, 100], "half of them as they were given"
    monkeypatch.setattr("apps.industrial.teaching.MOST_GOOD", 30)
    service, log = open_industrial(settings)
    write_dataset(tmp_path, "cast", good=40, each=1)
    taught = service.teach("cast", good_samples(tmp_path / "train" / "good"))
    assert taught.recipe.facts.good == 30
    assert taught.recipe.facts.warnings[0] == "40 good images were given; 30 of them, spread evenly, were learned from"
    service.close()
    log.close()


def test_a_recipe_of_many_parts_knows_regions(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.industrial.anomaly.regions.EACH", 2)
    write_dataset(tmp_path, "cast", good=50, each=1)
    service, log = open_industrial(settings)
    steps: list[str] = []
    taught = service.teach("cast", good_samples(tmp_path / "train" / "good"), report=lambda step, share: steps.append(step))
    assert "patching" in steps
    assert taught.recipe.regions is not None
    stored = service.recipes.load("cast")
    image = labelled_samples(tmp_path)[0].read()
    session = service.inspector("cast").session
    before, after = (Inspector(recipe, session).inspect(image) for recipe in (taught.recipe, stored))
    np.testing.assert_allclose(before.map, after.map, atol=1e-4)
    plain = Inspector(replace(stored, regions=None), session).inspect(image)
    assert plain.score == pytest.approx(after.score, abs=1e-4)
    assert np.abs(plain.map - after.map).max() > 0.01
    service.close()
    log.close()


def test_a_probe_tells_defects_from_good_parts_and_is_stored() -> None:
    rng = np.random.default_rng(0)
    good, unseen = (rng.normal(size=(n, 12)).astype(np.float32) for n in (60, 20))
    bad = rng.normal(size=(9, 12)).astype(np.float32) + np.eye(12, dtype=np.float32)[3] * 4
    probe = Probe.fit(good, bad, unseen)
    assert np.median(probe.scores(unseen)) == pytest.approx(0, abs=1e-5)
    assert probe.scores(bad).min() > probe.scores(unseen).mean()
    stored = Probe.from_arrays(probe.arrays())
    assert stored is not None
    np.testing.assert_array_equal(stored.scores(bad), probe.scores(bad))
    assert Probe.from_arrays({}) is None
    base = np.zeros(9, np.float32)
    np.testing.assert_allclose(probe.joined(base, bad), 0.2 * probe.scores(bad), rtol=1e-5)
    alone = Probe.fit(good[:7], bad, good[7:8])
    assert np.abs(alone.scores(bad)).max() < 50, "one good part that is held back has no spread"
    few = Probe.fit(good, bad[:1], unseen)
    np.testing.assert_allclose(few.joined(base, bad), 0.04 * few.scores(bad), rtol=1e-5)


def test_more_outlined_defects_have_more_say() -> None:
    assert learned_weight(0) == 0
    weights = [learned_weight(n) for n in (5, 20, 50, 300)]
    assert weights == sorted(weights)
    assert weights[-1] < 1
    assert learned_weight(0, 40) < learned_weight(40)
    assert "ten more held about" in advice(200, 0)
    assert "brought little" in advice(200, 500)
    assert "from 50 good parts on (48 now)" in advice(48, 0)
    assert "from 50 good parts on" not in advice(50, 0)


def test_a_recipe_of_a_deep_camera_judges_what_it_sends(settings: Settings, tmp_path: Path) -> None:
    """Twelve bits in files of sixteen: taught and judged by one white; what is black stays black, and a copy teaches nothing new."""
    folder = tmp_path / "good"
    folder.mkdir()
    generator = np.random.default_rng(0)
    parts = [good_part("cast", generator).astype(np.uint16) * 8 for _ in range(13)]
    for place, part in enumerate([*parts[:12], parts[0]]):
        cv2.imwrite(str(folder / f"{place:02}.png"), part)
    service, log = open_industrial(settings)
    taught = service.teach("cast", good_samples(folder))
    assert taught.recipe.facts.white == service.recipes.facts("cast").white == 4095
    assert taught.recipe.facts.good == 12
    assert taught.skipped == [("12.png", "the same picture as 00.png")]
    noise = generator.integers(0, 60, parts[0].shape).astype(np.uint16)
    sent = [service.submit(cv2.imencode(".png", image)[1].tobytes(), "cast") for image in (parts[12], noise)]
    other = service.blobs.put(cv2.imencode(".png", parts[11])[1].tobytes())
    FRAMES.send(log, FrameMessage("../../line 7", "2026-01-01T00:00:00Z", "s", "cast", other), "a sender with numbers of its own")
    run_worker(service, log, threading.Event(), until_idle=True)
    usual, dark = (service.store.find(frame) for frame in sent)
    assert usual is not None
    assert dark is not None
    assert dark.verdict.verdict == "review"
    assert "black" in dark.verdict.reasons[0]
    assert not [reason for reason in usual.verdict.reasons if "frame" in reason]
    service.judge(sent[0], "good", "tester", "")
    service.judge("../../line 7", "good", "tester", "")
    (tmp_path / "line").mkdir()
    good, _ = service.learned_from_line("cast", tmp_path / "line")
    np.testing.assert_array_equal(good[0].read(), decode_image(cv2.imencode(".png", parts[12])[1].tobytes(), white=4095))
    assert {sample.path.parent for sample in good} == {tmp_path / "line"}
    assert len(good) == 2
    service.close()
    log.close()


def test_what_is_no_number_is_never_a_pass(cast: tuple[IndustrialService, Recipe], tmp_path: Path) -> None:
    service, recipe = cast
    broken = GoodParts.from_arrays({key: np.full_like(value, np.nan) for key, value in recipe.good.arrays().items()})
    inspector = Inspector(Recipe(recipe.facts, broken, None, None, None, None), service.inspector("cast").session)
    result = inspector.inspect(labelled_samples(tmp_path)[0].read())
    assert result.verdict == "review"
    assert "gave no number" in result.reasons[0]
    assert np.isfinite(result.score)
    assert np.isfinite(result.map).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"event_time": "yesterday"}, "event_time is 'yesterday'; expected RFC 3339"),
        ({"event_time": "2026-01-01T00:00:00"}, "expected RFC 3339"),
        ({"frame_id": ""}, "frame_id has 0 characters"),
        ({"serial": "x" * 201}, "serial has 201 characters"),
        ({"lot": "L\0"}, "without the character NUL"),
    ],
)
def test_a_frame_that_no_database_keeps_is_a_dead_letter_at_once(settings: Settings, change: dict[str, str], words: str) -> None:
    service, log = open_industrial(settings)
    frame = FrameMessage("f1", "2026-01-01T00:00:00Z", "s", "cast", "sha256:" + "0" * 64)
    with pytest.raises(PermanentError, match=words):
        service.process(msgspec.structs.replace(frame, **change))
    service.close()
    log.close()


def test_a_defect_without_an_outline_is_learned_where_it_stands_out(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path, "brushed", good=20, each=2)
    defects = labelled_samples(tmp_path, defects_only=True)
    outlines = [sample.cells(sample.read().shape) for sample in defects]
    labels = [Sample(sample.path, sample.kind) if number else sample for number, sample in enumerate(defects)]
    learned: list[np.ndarray] = []

    def watched(good: object, bad: object, cells: list[np.ndarray]) -> Examples:
        learned.extend(cells)
        raise InputError("seen")

    monkeypatch.setattr("apps.industrial.training.adapt.Examples.of", watched)
    service, log = open_industrial(settings)
    with pytest.raises(InputError, match="seen"):
        service.teach("brushed", good_samples(tmp_path / "train" / "good"), labels, device="cpu")
    service.close()
    log.close()
    np.testing.assert_array_equal(learned[0], outlines[0])
    assert all(cells.shape == (MAP, MAP) and set(np.unique(cells)) == {0, 1} for cells in learned[1:])
    found = [bool((cells * cv2.dilate(outline, np.ones((5, 5)))).any()) for cells, outline in zip(learned[1:], outlines[1:], strict=True)]
    assert np.mean(found) > 0.6
    assert np.mean([cells.mean() for cells in learned[1:]]) < 0.15


def test_a_mask_that_does_not_fit_is_refused_before_anything_is_learned(settings: Settings, tmp_path: Path) -> None:
    write_dataset(tmp_path, "wood", good=10, each=1)
    service, log = open_industrial(settings)
    sample = next(s for s in labelled_samples(tmp_path, defects_only=True) if s.mask)
    cv2.imwrite(str(sample.mask), np.zeros((100, 256), np.uint8))
    steps: list[str] = []
    with pytest.raises(InputError, match=r"none of 1 defective images can be used; left out: .*has shape \[100, 256\]"):
        service.teach("wood", good_samples(tmp_path / "train" / "good"), [sample], report=lambda step, share: steps.append(step))
    assert set(steps) == {"reading"}
    log.close()


def test_too_few_good_parts_are_refused(settings: Settings, tmp_path: Path) -> None:
    write_dataset(tmp_path, "wood", good=3, each=1)
    service, log = open_industrial(settings)
    with pytest.raises(InputError, match="expected at least 8"):
        service.teach("wood", [Sample(p, "good") for p in sorted((tmp_path / "train" / "good").iterdir())])
    log.close()


def test_memory_does_not_grow_with_the_pixels_of_the_camera(settings: Settings, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "good").mkdir()
    width, height = 3200, 2400
    for place in range(20):
        part = cv2.resize(good_part("cast", generator), (width, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(tmp_path / "good" / f"{place:02}.jpg"), part)
    samples = good_samples(tmp_path / "good")
    service, log = open_industrial(settings)
    peaks = []
    for few in (8, 8, 20):  # the first loads modules
        tracemalloc.start()
        taught = service.teach("cast", samples[:few])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert taught.recipe.facts.good == 20
    assert taught.recipe.facts.aspect[0] == pytest.approx(width / height)
    assert peaks[2] - peaks[1] < 6 * width * height, "twelve more pictures were not held"
    service.close()
    log.close()


@pytest.mark.parametrize("parts", range(8, 800, 7))
def test_of_few_parts_more_are_held_back(parts: int) -> None:
    held = held_back(parts)
    assert len(held) == parts
    assert min(10, parts // 2) <= held.sum() <= parts / 2
    assert parts < 50 or 0.15 < held.mean() <= 0.25


def test_frames_of_another_size_go_to_review(settings: Settings, tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    (tmp_path / "good").mkdir()
    for place in range(30):
        cv2.imwrite(str(tmp_path / "good" / f"{place:02}.png"), cv2.resize(good_part("cast", generator), (240, 200)))
    service, log = open_industrial(settings)
    service.teach("cast", good_samples(tmp_path / "good"))
    part = cv2.imread(str(tmp_path / "good" / "07.png"), cv2.IMREAD_GRAYSCALE)
    inspector = service.inspector("cast")
    for factor in (0.5, 0.85, 1.2, 4):
        result = inspector.inspect(cv2.resize(part, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA))
        assert result.verdict == "review"
        assert "the recipe's parts about 240 x 200: set the camera" in result.reasons[0]
    assert inspector.inspect(part[:-8]).verdict == inspector.inspect(part).verdict == "pass"
    service.close()
    log.close()


def test_defects_of_another_size_are_warned_of(settings: Settings, tmp_path: Path) -> None:
    write_dataset(tmp_path, "cast", good=10, each=1)
    samples = labelled_samples(tmp_path, defects_only=True)[:3]
    cv2.imwrite(str(samples[0].path), cv2.resize(samples[0].read(), None, fx=2, fy=2))
    defects = [Sample(sample.path, sample.kind) for sample in samples]
    service, log = open_industrial(settings)
    warnings = service.teach("cast", good_samples(tmp_path / "train" / "good"), defects, seconds=1, device="cpu").recipe.facts.warnings
    assert any("1 of 3 defective images have another size" in warning for warning in warnings)
    service.close()
    log.close()


def test_defects_of_another_camera_are_warned_of(settings: Settings, tmp_path: Path) -> None:
    write_dataset(tmp_path, "cast", good=10, each=1)
    samples = labelled_samples(tmp_path, defects_only=True)[:3]
    for place, sample in enumerate(samples):
        image = sample.read()
        cv2.imwrite(str(sample.path), np.dstack([image, image, image // 2]) if place else image[:, :128])
    defects = [Sample(sample.path, sample.kind) for sample in samples]
    service, log = open_industrial(settings)
    warnings = service.teach("cast", good_samples(tmp_path / "train" / "good"), defects, seconds=1, device="cpu").recipe.facts.warnings
    assert any("2 of 3 defective images are colour, the good ones grey" in warning for warning in warnings)
    assert any("1 of 3 defective images have another shape" in warning for warning in warnings)
    service.close()
    log.close()


@pytest.mark.parametrize("threshold", [-3.0, -0.01, 1e-6, 0.4, 1.0, 5.0])
def test_a_map_is_one_at_its_threshold_and_grows_with_the_doubt(threshold: float) -> None:
    """A network that learned defects may find every place of a good part less suspect than the part: its threshold is below 0 then."""
    raw = np.array([threshold - 2, threshold, threshold + 2], np.float32)
    below, at, above = relative(raw, threshold)
    assert at == pytest.approx(1)
    assert below < 0.7
    assert above > 1.3
    if threshold >= 1:
        np.testing.assert_allclose(relative(raw, threshold), raw / threshold)
