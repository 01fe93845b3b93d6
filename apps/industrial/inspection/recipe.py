"""A recipe: what the station knows about one part. A folder with `recipe.json`, `statistics.npz`, the images that it was taught from
and, where it learned from labelled defects, a model of its own."""

from __future__ import annotations

import difflib
import hashlib
import io
import math
import re
import shutil
import uuid
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from apps.industrial.anomaly.calibration import USUAL, Calibration, Rates, calibrate
from apps.industrial.anomaly.regions import Regions
from apps.industrial.anomaly.statistics import GoodParts
from apps.industrial.classification.kinds import KindClassifier
from apps.industrial.classification.probe import Probe
from apps.industrial.errors import InputError, RecipeNotFoundError
from apps.industrial.inspection.taught_images import TaughtImage, packed, unpacked
from shared_runtime.errors import NOT_JSON
from shared_runtime.folders import replace_folder, settled

RECIPE_FILE, STATISTICS_FILE, IMAGES_FILE, MODEL_FOLDER = "recipe.json", "statistics.npz", "images.zip", "model"
SCORES = "calibration_scores"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a recipe was made of. `aspect`: width over height of its good parts, and how far they differ (deviation of the logarithms)."""

    name: str
    taught: str
    good: int
    defects: int
    calibration: Calibration
    rates: Rates = USUAL
    """What the thresholds were set for."""
    map_threshold: float
    sharpness: float
    aspect: tuple[float, float]
    side: tuple[float, float] | None = None
    """Pixels a side of its good parts, as `side_of`, and how far they differ; None in recipes of earlier versions."""
    colour: bool
    white: float | None = None
    """What is white in images of more than 8 bits; None where there were none."""
    network: str = ""
    """SHA-256 of the network whose features the statistics are of."""
    learned_weight: float
    """Share of the learned network's say in the score; 0 where only good parts are known."""
    learned_scale: tuple[float, float] = (0.0, 1.0)
    """Median and spread of the network's logits on good parts; `map_scale` of its map's."""
    map_scale: tuple[float, float] = (0.0, 1.0)
    kinds: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    statistics_sha256: str = ""
    version: int = 3


@dataclass(frozen=True)
class Recipe:
    """A recipe in memory.

    `regions`: None where too few good parts were known; `probe`: None without defects, and of recipes of version 2; `model`: the folder
    of its own model, or None for the shipped one. Of a recipe that was just taught: `scores` (N,) of the good parts that its thresholds
    come from, and `images`, what it was taught from.
    """

    facts: Facts
    good: GoodParts
    regions: Regions | None
    probe: Probe | None
    kinds: KindClassifier | None
    model: Path | None
    scores: Sequence[float] = ()
    images: Sequence[TaughtImage] = ()


def checked_name(name: str) -> str:
    """`name`, where it may name a recipe. Raises InputError: it must not lead out of the recipes' folder."""
    if not NAME.fullmatch(name):
        raise InputError(f"recipe name {name[:80]!r} can't be used; expected up to 63 letters, digits, '-' and '_', no '.' or '/'")
    return name


def unusual(value: float, usual: tuple[float, float]) -> bool:
    """Whether a shape or a size is another than that of the good parts, which have the `usual` one, as `Facts.aspect` and `Facts.side`."""
    return abs(math.log(value / usual[0])) > max(0.1, 4 * usual[1])


def side_of(width: int, height: int) -> float:
    """Pixels a side of a square with as many pixels."""
    return math.sqrt(width * height)


def _written(facts: Facts) -> bytes:
    return msgspec.json.format(msgspec.json.encode(facts), indent=2)


class RecipeBook:
    """The recipes below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """All recipes, sorted."""
        return sorted(p.parent.name for p in self.root.glob(f"*/{RECIPE_FILE}") if NAME.fullmatch(p.parent.name))

    def folder(self, name: str) -> Path:
        """The folder of a recipe. Raises RecipeNotFoundError, naming the nearest."""
        if checked_name(name) in self.names():
            return self.root / name
        near = difflib.get_close_matches(name, self.names(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self.names()) or 'none yet'}."
        raise RecipeNotFoundError(f"no recipe {name!r}; {hint} Teach one with 'triscope industrial teach --good DIR --recipe {name}'")

    def facts(self, name: str) -> Facts:
        """What a recipe was made of, without loading it."""
        return settled([self.root / checked_name(name)], lambda: self._facts(name))

    def load(self, name: str) -> Recipe:
        """A recipe, its statistics verified against their hash."""
        return settled([self.root / checked_name(name)], lambda: self._load(name))

    def images(self, name: str) -> list[TaughtImage]:
        """What a recipe was taught from; empty for recipes of earlier versions, which kept none."""
        return settled([self.root / checked_name(name)], lambda: self._images(name))

    def _images(self, name: str) -> list[TaughtImage]:
        path = self.folder(name) / IMAGES_FILE
        try:
            return unpacked(path.read_bytes()) if path.exists() else []
        except (OSError, InputError) as error:
            raise InputError(f"what recipe {name!r} was taught from can't be read: {error}; teach it from images") from error

    def scores(self, name: str) -> NDArray[np.float64]:
        """(N,) of the good parts that a recipe's thresholds come from; empty for recipes of earlier versions."""
        return settled([self.root / checked_name(name)], lambda: self._scores(name))

    def _scores(self, name: str) -> NDArray[np.float64]:
        try:
            with np.load(self.folder(name) / STATISTICS_FILE, allow_pickle=False) as stored:
                return np.asarray(stored[SCORES] if SCORES in stored.files else [], np.float64)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"the statistics of recipe {name!r} can't be read: {error}; teach it again") from error

    def _facts(self, name: str) -> Facts:
        try:
            return msgspec.json.decode((self.folder(name) / RECIPE_FILE).read_bytes(), type=Facts)
        except (OSError, *NOT_JSON) as error:
            raise InputError(f"recipe {name!r} can't be read: {error}; teach it again") from error

    def _load(self, name: str) -> Recipe:
        facts, folder = self._facts(name), self.folder(name)
        try:
            content = (folder / STATISTICS_FILE).read_bytes()
        except OSError as error:
            raise InputError(f"the statistics of recipe {name!r} can't be read: {error.strerror}; teach it again") from error
        if hashlib.sha256(content).hexdigest() != facts.statistics_sha256:
            raise InputError(f"the statistics of recipe {name!r} were changed or damaged; teach it again")
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        kinds = KindClassifier.from_arrays(arrays, facts.kinds) if facts.kinds else None
        model = folder / MODEL_FOLDER
        parts = GoodParts.from_arrays(arrays), Regions.from_arrays(arrays), Probe.from_arrays(arrays), kinds
        return Recipe(facts, *parts, model if model.is_dir() else None)

    def set_rates(self, name: str, rates: Rates) -> Facts:
        """Move the thresholds of a recipe to where such shares of its good parts lie above them. Raises InputError."""
        return settled([self.root / checked_name(name)], lambda: self._set_rates(name, rates))

    def _set_rates(self, name: str, rates: Rates) -> Facts:
        known, scores, folder = self.facts(name), self.scores(name), self.root / name
        if not len(scores):
            raise InputError(f"recipe {name!r} kept no scores of its good parts, as an earlier version taught it; teach it again")
        facts = msgspec.structs.replace(known, rates=rates, calibration=calibrate(scores.tolist(), rates))
        part = self._part(name)
        try:
            shutil.copytree(folder, part)
            (part / RECIPE_FILE).write_bytes(_written(facts))
            if self.facts(name) != known:
                raise InputError(f"recipe {name!r} was changed meanwhile; set its thresholds again")
            replace_folder(part, folder)
        except OSError as error:
            raise InputError(f"the thresholds of recipe {name!r} can't be written: {error}; they stay as they were") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return facts

    def save(self, recipe: Recipe) -> Path:
        """Write a recipe in place of one of the same name, whole or not at all."""
        name = checked_name(recipe.facts.name)
        self.root.mkdir(parents=True, exist_ok=True)
        part, target = self._part(name), self.root / name
        part.mkdir()
        try:
            self._write(recipe, part)
            replace_folder(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return target

    def _part(self, name: str) -> Path:
        """A folder that becomes the recipe's once it is whole."""
        return self.root / f".{name}.{uuid.uuid4().hex}"

    def _write(self, recipe: Recipe, part: Path) -> None:
        buffer = io.BytesIO()
        learned = [part.arrays() for part in (recipe.good, recipe.regions, recipe.probe, recipe.kinds) if part]
        arrays = {name: array for arrays in learned for name, array in arrays.items()}
        np.savez(buffer, allow_pickle=False, **arrays, **{SCORES: np.asarray(recipe.scores, np.float64)})
        (part / STATISTICS_FILE).write_bytes(buffer.getvalue())
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        facts = msgspec.structs.replace(recipe.facts, statistics_sha256=digest)
        (part / RECIPE_FILE).write_bytes(_written(facts))
        (part / IMAGES_FILE).write_bytes(packed(recipe.images))
        if recipe.model is not None:
            shutil.copytree(recipe.model, part / MODEL_FOLDER)
