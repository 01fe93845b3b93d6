"""Teaches a recipe: from good parts alone, or from good parts and a few labelled defects."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import shared_runtime as rt
from apps.industrial.anomaly.calibration import calibrate
from apps.industrial.anomaly.statistics import GoodParts, outliers
from apps.industrial.classification.kinds import KindClassifier
from apps.industrial.errors import InputError
from apps.industrial.evaluation.dataset import Sample
from apps.industrial.features import MAP, prepared
from apps.industrial.images import Pixels, sharpness, unusable
from apps.industrial.inspection.inspector import combined_maps, combined_scores, features, learned_scores
from apps.industrial.inspection.recipe import Facts, Recipe
from pipelines.messages import now_rfc3339

logger = logging.getLogger(__name__)
FEWEST, ENOUGH = 8, 30
HELD_BACK = 5
"""Every fifth good part is held back from what the learned network sees, in blocks of neighbours."""
LEARN_SECONDS = {"cpu": 240.0, "cuda": 45.0}
KIND_SAMPLES = 3
MAP_QUANTILE = 0.995
Report = Callable[[str, float], None]


@dataclass
class Taught:
    """A recipe and what was noticed on the way: good images that stand apart, images that were left out with the reason."""

    recipe: Recipe
    outliers: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    network_folder: tempfile.TemporaryDirectory[str] | None = None


def teach(
    name: str,
    good: Sequence[Sample],
    defects: Sequence[Sample],
    open_session: Callable[[Path | None], rt.Session],
    *,
    seconds: float | None = None,
    device: str = "auto",
    report: Report = lambda step, share: None,
) -> Taught:
    """Teach recipe `name`. `open_session` gives a session of a model folder, or of the shipped network for None.

    `seconds`: how long the network may learn from `defects`. Raises InputError where too few images are usable.
    """
    start = time.monotonic()
    images, kept, skipped = _read(good, report)
    if len(images) < FEWEST:
        why = f"; left out: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise InputError(f"{len(images)} good images can be used, expected at least {FEWEST}, better {ENOUGH} or more{why}")
    warnings = []
    if len(images) < ENOUGH:
        warnings.append(f"only {len(images)} good parts: thresholds are coarse, add more (from {ENOUGH} on they can be trusted)")
    taught = Taught(None, skipped=skipped)  # type: ignore[arg-type]
    model: Path | None = None
    bad_images, bad_samples = _read_defects(defects, taught)
    taught.seconds["read"] = time.monotonic() - start
    weight, scale, seen_rows = 0.0, (0.0, 1.0), np.zeros(len(images), bool)
    if bad_samples:
        begin = time.monotonic()
        held = np.array([i // max(1, len(images) // 25) % HELD_BACK == HELD_BACK - 1 for i in range(len(images))])
        seen_rows = ~held
        model = _learn(images, seen_rows, bad_images, bad_samples, open_session, seconds, device, taught, report)
        weight = learned_weight(len(bad_samples))
        taught.seconds["learn"] = time.monotonic() - begin
    begin = time.monotonic()
    with open_session(model) as session:
        seen = _with_progress(session, images, report)
        bad_seen = features(session, bad_images) if bad_samples else {}
    parts = GoodParts.fit(seen["fine"], seen["coarse"])
    if bad_samples:
        logits = learned_scores(seen)[~seen_rows]
        scale = (float(np.median(logits)), float(logits.std() + 0.5))
    kinds = _kinds(bad_samples, bad_seen)
    facts = Facts(
        name=name,
        taught=now_rfc3339(),
        good=len(images),
        defects=len(bad_samples),
        calibration=calibrate([0.0, 1.0]),
        map_threshold=1.0,
        sharpness=float(np.median([sharpness(image) for image in images])),
        aspect=_aspect(images),
        colour=sum(image.ndim == 3 for image in images) * 2 > len(images),
        learned_weight=weight,
        learned_scale=scale,
        kinds=kinds.names if kinds else (),
    )
    recipe = Recipe(facts, parts, kinds, model)
    scores, peaks = _held_back(recipe, seen, ~seen_rows if bad_samples else np.ones(len(images), bool))
    taught.outliers = [kept[i].path.name for i in outliers(scores)] if not bad_samples else []
    if taught.outliers:
        warnings.append(f"{len(taught.outliers)} good image(s) stand apart from the others: look at them, or teach without them")
    mixed = Counter(image.ndim for image in images)
    if len(mixed) > 1:
        warnings.append(f"{mixed[2]} grey and {mixed[3]} colour images are mixed: teach with one kind")
    facts = _with(
        facts, calibration=calibrate(scores), map_threshold=float(np.quantile(peaks, MAP_QUANTILE)) + 1e-6, warnings=tuple(warnings)
    )
    taught.recipe = Recipe(facts, parts, kinds, model)
    taught.seconds["fit"] = time.monotonic() - begin
    return taught


def _with(facts: Facts, **changes: object) -> Facts:
    import msgspec

    return msgspec.structs.replace(facts, **changes)


def learned_weight(defects: int) -> float:
    """How much the learned network has to say beside the statistics of good parts, by the number of defects it learned from.

    Near the best weights at 5, 20, 50 and 260 defects of magnetic tiles: more defects, more say.
    """
    return float(np.clip(0.35 + 0.42 * np.log10(max(1, defects) / 5), 0.35, 0.75))


def _read(samples: Sequence[Sample], report: Report) -> tuple[list[Pixels], list[Sample], list[tuple[str, str]]]:
    images, kept, skipped = [], [], []
    for number, sample in enumerate(samples):
        try:
            image = sample.read()
            why = unusable(image)
        except InputError as error:
            why = str(error)
        if why:
            skipped.append((sample.path.name, why))
        else:
            images.append(image)
            kept.append(sample)
        report("reading", (number + 1) / len(samples))
    return images, kept, skipped


def _read_defects(defects: Sequence[Sample], taught: Taught) -> tuple[list[Pixels], list[Sample]]:
    images, kept, skipped = _read(defects, lambda step, share: None)
    taught.skipped += skipped
    return images, kept


def _with_progress(session: rt.Session, images: Sequence[Pixels], report: Report) -> dict[str, np.ndarray]:
    parts = []
    for start in range(0, len(images), 16):
        parts.append(features(session, images[start : start + 16]))
        report("looking", min(1.0, (start + 16) / len(images)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _held_back(recipe: Recipe, seen: dict[str, np.ndarray], rows: np.ndarray) -> tuple[list[float], np.ndarray]:
    """Scores and map peaks of good parts that neither the statistics nor the learned network saw."""
    n = len(seen["fine"])
    scores, peaks = np.zeros(n), np.zeros(n)
    for part in np.array_split(np.arange(n), min(5, n)):
        rest = np.setdiff1d(np.arange(n), part)
        without = GoodParts._fit(seen["fine"][rest], seen["coarse"][rest])
        other = Recipe(recipe.facts, GoodParts(without.image, without.places, recipe.good.usual), None, recipe.model)
        some = {key: values[part] for key, values in seen.items()}
        scores[part] = combined_scores(other, some)
        peaks[part] = combined_maps(other, some).max(axis=(1, 2))
    return [float(s) for s in scores[rows]], peaks[rows]


def _aspect(images: Sequence[Pixels]) -> tuple[float, float]:
    logs = np.log([image.shape[1] / image.shape[0] for image in images])
    return float(np.exp(np.median(logs))), float(logs.std())


def _kinds(samples: Sequence[Sample], seen: dict[str, np.ndarray]) -> KindClassifier | None:
    """A classifier of the kinds that have samples enough; None where there are not two."""
    counts = Counter(sample.kind for sample in samples)
    known = [i for i, sample in enumerate(samples) if counts[sample.kind] >= KIND_SAMPLES]
    if len({samples[i].kind for i in known}) < 2:
        return None
    return KindClassifier.fit(seen["embedding"][known], [samples[i].kind for i in known])


def _learn(
    images: Sequence[Pixels],
    rows: np.ndarray,
    bad_images: Sequence[Pixels],
    bad: Sequence[Sample],
    open_session: Callable[[Path | None], rt.Session],
    seconds: float | None,
    device: str,
    taught: Taught,
    report: Report,
) -> Path:
    """Tune the shipped network on the examples; the folder of the new model."""
    try:
        import torch

        from apps.industrial.training.adapt import Examples, adapt
        from apps.industrial.training.export import network_from, write_model
    except ImportError as error:
        raise InputError(f"learning from labelled defects needs torch ({error}); install it with pip install 'triscope[train]'") from error
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for and torch sees no GPU; use --device cpu")
    place = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    good = [image for image, row in zip(images, rows, strict=True) if row]
    cells = [sample.cells(image.shape) for sample, image in zip(bad, bad_images, strict=True)]
    nothing = np.zeros((MAP, MAP), np.float32)
    examples = Examples(
        np.stack([prepared(image) for image in (*good, *bad_images)]),
        np.stack([*[nothing] * len(good), *[nothing if c is None else c for c in cells]]),
        np.array([*[True] * len(good), *[c is not None for c in cells]]),
        np.array([*[False] * len(good), *[True] * len(bad)]),
        np.array([*[0.5 / len(good)] * len(good), *[0.5 / len(bad)] * len(bad)], np.float32),
    )
    with open_session(None) as session:
        base = session.model
    network = adapt(
        network_from(base.graph),
        examples,
        seconds or LEARN_SECONDS[place],
        torch.device(place),
        report=lambda share: report("learning", share),
    )
    taught.network_folder = tempfile.TemporaryDirectory(prefix="triscope-recipe-")
    folder = Path(taught.network_folder.name) / "model"
    digest = write_model(
        network,
        folder,
        f"texture-features-{hashlib.sha256(str(time.time()).encode()).hexdigest()[:8]}",
        {"training": {"base": base.sha256, "good": len(good), "defects": len(bad), "seconds": seconds or LEARN_SECONDS[place]}},
    )
    logger.info("learned from defects", extra={"defects": len(bad), "device": place, "model": digest[:12]})
    return folder
