"""Teaches a recipe: from good parts alone, or from good parts and a few labelled defects."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import shared_runtime as rt
from apps.industrial.anomaly import regions
from apps.industrial.anomaly.calibration import calibrate
from apps.industrial.anomaly.statistics import GoodParts, outliers
from apps.industrial.classification.kinds import KindClassifier
from apps.industrial.classification.probe import Probe
from apps.industrial.errors import InputError
from apps.industrial.evaluation.dataset import Sample
from apps.industrial.features import MAP, prepared
from apps.industrial.images import Pixels, sharpness, unusable
from apps.industrial.inspection.inspector import combined, features, learned_scores, lifted
from apps.industrial.inspection.recipe import Facts, Recipe
from pipelines.messages import now_rfc3339
from shared_runtime.host import host

logger = logging.getLogger(__name__)
FEWEST, ENOUGH = 8, 30
HELD_BACK = 5
"""Every fifth good part is held back from what the learned network sees, in blocks of neighbours."""
LEARN_SECONDS = 25.0
"""How long the network may learn from defects on a GPU; it seldom takes all of its time."""
WHOLE_SECONDS, LEAST_SECONDS = 250.0, 60.0
"""On a CPU it learns until so long after teaching began, LEAST_SECONDS at least: all of it ends within five minutes on two cores."""
SHIPPED_LAYERS = ("fine", "half")
"""Layers that regions are learned from beside a network of the recipe's own: what it says as the shipped one does."""
KIND_SAMPLES = 3
MAP_QUANTILE = 0.995
FOUND_BY_DEFECTS = ((0, 60.0), (5, 72.8), (20, 78.1), (50, 82.7), (258, 88.5))
Report = Callable[[str, float], None]


@dataclass
class Taught:
    """A recipe and what was noticed on the way: good images that stand apart, images that were left out with the reason.

    `seconds`: of reading, learning from defects, fitting the good parts (at the same time on a GPU), judging; in total.
    """

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
    bad_images, bad_samples, bad_skipped = _read(defects, lambda step, share: None)
    place = _place(device) if bad_samples else ""
    times = {"read": time.monotonic() - start}
    unseen = np.ones(len(images), bool)
    if bad_samples:
        unseen = np.array([i // max(1, len(images) // 25) % HELD_BACK == HELD_BACK - 1 for i in range(len(images))])
    folder: tempfile.TemporaryDirectory[str] | None = None
    with open_session(None) as session:
        shipped = session.model
        seen = judged = _with_progress(session, images, report)

        def from_good(report: Report) -> _FromGood:
            begin = time.monotonic()
            found = _from_good(session, images, seen, SHIPPED_LAYERS if bad_samples else tuple(regions.LAYERS), report)
            times["fit"] = time.monotonic() - begin
            return found

        def learn(report: Report) -> tempfile.TemporaryDirectory[str]:
            begin = time.monotonic()
            left = LEARN_SECONDS if place == "cuda" else max(LEAST_SECONDS, WHOLE_SECONDS - (begin - start))
            found = _learn(images, ~unseen, bad_images, bad_samples, shipped, left if seconds is None else seconds, place, report)
            times["learn"] = time.monotonic() - begin
            return found

        if not bad_samples:
            parts, scores, maps, found = from_good(report)
        elif place == "cuda" and host().cores >= regions.CORES_FOR_BOTH:
            folder, (parts, scores, maps, found) = _at_once(learn, from_good, report)
        else:
            parts, scores, maps, found = from_good(report)
            folder = learn(report)
    begin = time.monotonic()
    network, bad_seen, model = shipped.sha256, {}, None
    if folder is not None:
        model = Path(folder.name) / "model"
        with open_session(model) as session:
            network = session.model.sha256
            judged = _with_progress(session, [image for image, held in zip(images, unseen, strict=True) if held], report)
            bad_seen = features(session, bad_images)
    scores, maps = scores[unseen], maps[unseen]
    weight, scale = learned_weight(bad_samples), scale_of(learned_scores(judged))
    map_scale = scale if bad_samples else scale_of(judged["map"])
    peaks = combined(lifted(maps, scores), judged["map"], weight, map_scale).max(axis=(1, 2))
    scores = combined(scores, learned_scores(judged), weight, scale)
    probe = None
    if bad_samples:
        probe = Probe.fit(seen["whole"][~unseen], bad_seen["whole"], judged["whole"])
        scores = probe.joined(scores, judged["whole"])
    apart = [kept[i].path.name for i in outliers(scores.tolist())] if not bad_samples else []
    kinds = _kinds(bad_samples, bad_seen)
    facts = Facts(
        name=name,
        taught=now_rfc3339(),
        good=len(images),
        defects=len(bad_samples),
        calibration=calibrate([float(score) for score in scores]),
        map_threshold=float(np.quantile(peaks, MAP_QUANTILE)) + 1e-6,
        sharpness=float(np.median([sharpness(image) for image in images])),
        aspect=_aspect(images),
        colour=sum(image.ndim == 3 for image in images) * 2 > len(images),
        network=network,
        learned_weight=weight,
        learned_scale=scale,
        map_scale=map_scale,
        kinds=kinds.names if kinds else (),
        warnings=tuple(_warnings(images, apart)),
    )
    times |= {"judge": time.monotonic() - begin, "total": time.monotonic() - start}
    recipe = Recipe(facts, parts, found, probe, kinds, model)
    return Taught(recipe, apart, skipped + bad_skipped, times, folder)


def _warnings(images: Sequence[Pixels], apart: Sequence[str]) -> Iterator[str]:
    if len(images) < ENOUGH:
        yield f"only {len(images)} good parts: thresholds are coarse, add more (from {ENOUGH} on they can be trusted)"
    if apart:
        yield f"{len(apart)} good image(s) stand apart from the others: look at them, or teach without them"
    mixed = Counter(image.ndim for image in images)
    if len(mixed) > 1:
        yield f"{mixed[2]} grey and {mixed[3]} colour images are mixed: teach with one kind"


def scale_of(logits: np.ndarray) -> tuple[float, float]:
    """Median and spread of logits on good parts."""
    return float(np.median(logits)), float(logits.std() + 0.5)


def found_of_hundred(defects: int) -> float:
    """Of 100 defective parts, how many were held at 5 % false rejects after learning from so many, on magnetic tiles.

    As learned on two cores, from docs/benchmarks.md; between the measured numbers on a scale of logarithms.
    """
    numbers, found = zip(*FOUND_BY_DEFECTS, strict=True)
    return float(np.interp(np.log1p(defects), np.log1p(numbers), found))


def advice(good: int, defects: int) -> str:
    """What more good parts and ten more labelled defects would bring, for the operator."""
    if good < regions.FEWEST:
        more = f"from {regions.FEWEST} good parts on ({good} now) the defect map also learns what a foreign region looks like"
        return f"{more}; {_advice(defects)}"
    return _advice(defects)


def _advice(defects: int) -> str:
    more = found_of_hundred(defects + 10) - found_of_hundred(defects)
    known = f"{defects} labelled defects are known" if defects else "no labelled defect is known"
    if more < 1:
        return f"{known}; on the parts that this was measured on, ten more brought little: add those that were judged wrongly"
    return (
        f"{known}; on the parts that this was measured on (magnetic tiles), ten more held about {more:.0f} more of 100 defective parts "
        "at 5 % false rejects. Yours may differ"
    )


def learned_weight(defects: Sequence[Sample]) -> float:
    """How much the learned network has to say beside the statistics of good parts, by the defects it learned from.

    Near the best weights at 5, 20, 50 and 260 outlined defects of magnetic tiles: more defects, more say. A label
    without an outline counts as a quarter of one.
    """
    if not defects:
        return 0.0
    outlined = sum(sample.mask is not None or bool(sample.boxes) for sample in defects)
    number = outlined + (len(defects) - outlined) / 4
    return float(np.clip(0.35 + 0.25 * np.log10(number / 5), 0.35, 0.6))


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


def _with_progress(session: rt.Session, images: Sequence[Pixels], report: Report) -> dict[str, np.ndarray]:
    parts = []
    for start in range(0, len(images), 16):
        parts.append(features(session, images[start : start + 16]))
        report("looking", min(1.0, (start + 16) / len(images)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


_FromGood = tuple[GoodParts, np.ndarray, np.ndarray, regions.Regions | None]


def _from_good(
    session: rt.Session, images: Sequence[Pixels], seen: dict[str, np.ndarray], layers: Sequence[str], report: Report
) -> _FromGood:
    """What good images teach: their statistics with scores and maps of each by the others, and regions where there are enough."""
    parts, scores, maps = GoodParts.fit(seen["fine"], seen["whole"])
    if len(images) < regions.FEWEST:
        return parts, scores, maps, None

    def look(some: Sequence[Pixels]) -> dict[str, np.ndarray]:
        return features(session, some)

    found, places = regions.Regions.fit(images, seen, look, report=lambda share: report("patching", share), names=layers)
    return parts, scores, maps + places, found


def _at_once(
    learn: Callable[[Report], tempfile.TemporaryDirectory[str]], from_good: Callable[[Report], _FromGood], report: Report
) -> tuple[tempfile.TemporaryDirectory[str], _FromGood]:
    """`learn` on a GPU while `from_good` runs on the CPU; the former reports."""
    with ThreadPoolExecutor(1) as pool:
        other: list[Future[_FromGood]] = []

        def learning(step: str, share: float) -> None:
            # Its first report comes when the GPU's graphs are captured: no other thread may use the GPU before.
            if not other:
                other.append(pool.submit(from_good, lambda step, share: None))
            report(step, share)

        folder = learn(learning)
        return folder, other[0].result() if other else from_good(report)


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


def _place(device: str) -> str:
    """Where to learn: "cuda" or "cpu". Raises InputError without torch, and where a GPU was asked for and there is none."""
    try:
        import torch
    except ImportError as error:
        raise InputError(f"learning from labelled defects needs torch ({error}); install it with pip install 'triscope[train]'") from error
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for and torch sees no GPU; use --device cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def _learn(
    images: Sequence[Pixels],
    rows: np.ndarray,
    bad_images: Sequence[Pixels],
    bad: Sequence[Sample],
    base: rt.Model,
    seconds: float,
    place: str,
    report: Report,
) -> tempfile.TemporaryDirectory[str]:
    """Tune the network `base` on the examples; the folder with the new `model`."""
    import onnx
    import torch

    from apps.industrial.training.adapt import Examples, adapt
    from apps.industrial.training.export import network_from, taught, write_model

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
    shipped = onnx.load(base.graph)
    network = adapt(network_from(shipped), examples, seconds, torch.device(place), report=lambda share: report("learning", share))
    folder = tempfile.TemporaryDirectory(prefix="triscope-recipe-")
    digest = write_model(
        taught(shipped, network),
        Path(folder.name) / "model",
        f"texture-features-{hashlib.sha256(str(time.time()).encode()).hexdigest()[:8]}",
        {"training": {"base": base.sha256, "good": len(good), "defects": len(bad), "seconds": seconds}},
    )
    logger.info("learned from defects", extra={"defects": len(bad), "device": place, "model": digest[:12]})
    return folder
