"""What a recipe keeps: whole while it is replaced, taught again from its images, its thresholds moved."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from apps.common.settings import Settings
from apps.industrial.acquisition.generated import write_dataset
from apps.industrial.anomaly.calibration import USUAL, Rates, calibrate
from apps.industrial.anomaly.statistics import GoodParts
from apps.industrial.bootstrap import open_industrial
from apps.industrial.errors import InputError
from apps.industrial.evaluation.dataset import good_samples, labelled_samples
from apps.industrial.inspection.recipe import IMAGES_FILE, Recipe
from apps.industrial.service import IndustrialService


def test_a_recipe_that_is_taught_anew_while_the_line_runs_is_always_there(cast: tuple[IndustrialService, Recipe]) -> None:
    """Between its two folders it has none for a moment, and what is read may be of either: no frame may be refused for that."""
    service, recipe = cast
    stop, saved = threading.Event(), [0]

    def save() -> None:
        while not stop.is_set():
            good = GoodParts.from_arrays({key: value + 0.0 for key, value in recipe.good.arrays().items()})
            saved[0] += 1
            facts = msgspec.structs.replace(recipe.facts, taught=f"2026-01-01T00:00:00.{saved[0]:06d}Z", sharpness=float(saved[0]))
            service.recipes.save(Recipe(facts, good, None, recipe.probe, recipe.kinds, None))

    thread = threading.Thread(target=save)
    thread.start()
    try:
        seen = {service.recipes.load("cast").facts.sharpness for _ in range(300)}
    finally:
        stop.set()
        thread.join()
    assert saved[0] > 20
    assert len(seen) > 5


def test_a_recipe_is_taught_again_with_what_came_later(settings: Settings, tmp_path: Path) -> None:
    """Without the images of then: they lie with the recipe. What is given anew counts as it is given."""
    write_dataset(tmp_path, "cast", good=14, each=1)
    service, log = open_industrial(settings)
    good = good_samples(tmp_path / "train" / "good")
    defects = labelled_samples(tmp_path, defects_only=True)
    first = service.teach("cast", good[:12], seconds=1, device="cpu").recipe
    shutil.move(good[0].path, good[0].path.with_suffix(".away"))
    kept = service.recipes.images("cast")
    assert [one.name for one in kept] == [sample.path.name for sample in good[:12]]
    for mine, theirs in zip(kept, first.images, strict=True):
        np.testing.assert_array_equal(mine.image, theirs.image)
        assert replace(mine, image=theirs.image, outline=None) == replace(theirs, outline=None)
    same = service.teach("cast", [], again=True).recipe
    assert (same.facts.good, same.facts.calibration, same.facts.map_threshold) == (12, first.facts.calibration, first.facts.map_threshold)
    service.teach("cast", good[12:], defects[:3], again=True, seconds=1, device="cpu")
    wrong = replace(good[12], kind="stain")
    last = service.teach("cast", [], [wrong, replace(defects[0], kind="scratch")], again=True, seconds=1, device="cpu").recipe
    assert (last.facts.good, last.facts.defects) == (13, 4)
    again = service.recipes.images("cast")
    assert sorted(one.kind for one in again if one.defective) == sorted(["stain", "scratch", defects[1].kind, defects[2].kind])
    outlines = {one.kind: one.outline for one in again if one.defective}
    wanted = defects[1].cells(defects[1].read().shape)
    np.testing.assert_allclose(outlines[defects[1].kind], wanted, atol=1 / 255)
    assert outlines["stain"] is None
    assert service.teach("cast", good[5:13]).recipe.facts.good == 8, "from these alone"
    both = service.teach("cast", good[1:], [replace(good[12], kind="stain")], seconds=1, device="cpu")
    assert (both.recipe.facts.good, both.recipe.facts.defects) == (12, 1)
    assert both.skipped == [(good[12].name, f"the same picture as the defective {good[12].name}")]
    service.close()
    log.close()


def test_thresholds_move_to_the_rates_that_are_set_and_stay_there(cast: tuple[IndustrialService, Recipe], tmp_path: Path) -> None:
    service, recipe = cast
    before = service.inspector("cast")
    assert recipe.facts.rates == USUAL
    assert service.recipes.scores("cast").tolist() == recipe.scores
    facts = service.set_rates("cast", Rates(0.4, 0.2), "tester")
    assert facts.calibration == calibrate(recipe.scores, Rates(0.4, 0.2))
    assert np.mean(np.array(recipe.scores) > facts.calibration.review.value) == pytest.approx(0.3)
    after = service.inspector("cast")
    assert after.recipe.facts == facts
    assert after.session is before.session
    image = labelled_samples(tmp_path)[0].read()
    assert after.inspect(image).score == before.inspect(image).score
    assert len(service.recipes.images("cast")) == 10
    good = good_samples(tmp_path / "train" / "good")
    assert service.teach("cast", good).recipe.facts.calibration == facts.calibration, "taught again, they stay"
    (service.recipes.root / "cast" / "recipe.json").write_text("{")
    assert service.teach("cast", good).recipe.facts.rates == USUAL, "a damaged recipe can be taught again"
    assert [path.name for path in service.recipes.root.iterdir()] == ["cast"]


def test_two_who_move_the_thresholds_at_once_leave_a_whole_recipe(cast: tuple[IndustrialService, Recipe]) -> None:
    service, _ = cast

    def move(first: int) -> list[Rates]:
        return [service.set_rates("cast", Rates((first + 2 * turn) / 100, 0.01), "tester").rates for turn in range(15)]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(move, (5, 6))
    assert service.recipes.facts("cast").rates in (first[-1], second[-1])
    assert service.inspector("cast").recipe.facts == service.recipes.facts("cast")
    assert len(service.recipes.images("cast")) == len(service.recipes.scores("cast")) == 10
    assert [path.name for path in service.recipes.root.iterdir()] == ["cast"]


@pytest.mark.parametrize("rates", [(0.01, 0.05), (0.05, 0.00005), (0.6, 0.01), (float("nan"), 0.01)])
def test_rates_that_make_no_sense_are_refused(rates: tuple[float, float]) -> None:
    with pytest.raises(InputError, match=r"can't be set; expected shares of 0.01 to 50 %"):
        Rates(*rates)


def test_a_recipe_that_kept_no_scores_has_its_thresholds_as_they_are(cast: tuple[IndustrialService, Recipe]) -> None:
    service, recipe = cast
    service.recipes.save(replace(recipe, scores=()))
    with pytest.raises(InputError, match="kept no scores of its good parts, as an earlier version taught it; teach it again"):
        service.set_rates("cast", Rates(), "tester")
    (service.recipes.root / "cast" / "statistics.npz").write_bytes(b"PK no more")
    with pytest.raises(InputError, match=r"can't be read: .*; teach it again"):
        service.set_rates("cast", Rates(), "tester")


def test_images_that_a_recipe_was_taught_from_are_refused_where_they_are_damaged(cast: tuple[IndustrialService, Recipe]) -> None:
    service, _ = cast
    path = service.recipes.root / "cast" / IMAGES_FILE
    whole = path.read_bytes()
    middle = len(whole) // 2
    for content in (b"", b"PK", whole[:middle], whole[:middle] + bytes(200) + whole[middle + 200 :]):
        path.write_bytes(content)
        with pytest.raises(
            InputError, match=r"what recipe 'cast' was taught from can't be read: the images are damaged: .*; teach it from"
        ):
            service.teach("cast", [], again=True)
    path.unlink()
    with pytest.raises(InputError, match="kept no images, as an earlier version taught it"):
        service.teach("cast", [], again=True)
    assert service.inspector("cast").recipe.facts.good == 10, "it judges all the same"


def test_a_recipe_that_can_not_be_written_leaves_nothing(cast: tuple[IndustrialService, Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    service, recipe = cast

    def full(images: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("apps.industrial.inspection.recipe.packed", full)
    with pytest.raises(OSError, match="No space"):
        service.recipes.save(recipe)
    assert [path.name for path in service.recipes.root.iterdir()] == ["cast"]
