"""Teaches a recipe: from good parts alone, or from good parts and a few labelled defects."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from apps.industrial.anomaly import regions
from apps.industrial.anomaly.calibration import USUAL, Rates, calibrate
from apps.industrial.anomaly.statistics import outliers
from apps.industrial.classification.kinds import KindClassifier
from apps.industrial.errors import InputError
from apps.industrial.evaluation.dataset import Sample
from apps.industrial.features import shrunk
from apps.industrial.images import deepest, sharpness, unusable
from apps.industrial.inspection.inspector import combined, learned_scores, lifted, scale_of
from apps.industrial.inspection.recipe import MODEL_FOLDER, Facts, Recipe, side_of, unusual
from apps.industrial.inspection.taught_images import TaughtImage
from apps.industrial.learning import OpenSession, Report, from_defects, from_good, place_to_learn
from pipelines.messages import now_rfc3339
from shared_runtime.host import host

FEWEST, ENOUGH = 8, 30
MOST_GOOD = 1000
"""Good images that are learned from; of more, so many spread evenly over them: memory grows with their number."""
KIND_SAMPLES = 3
Given = TypeVar("Given", bound="Sample | TaughtImage")
MAP_QUANTILE = 0.995
FOUND_BY_DEFECTS = ((0, 60.0), (5, 74.5), (20, 80.9), (50, 89.6), (258, 91.0))


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
    open_session: OpenSession,
    *,
    before: Sequence[TaughtImage] = (),
    white_before: float | None = None,
    rates: Rates = USUAL,
    seconds: float | None = None,
    device: str = "auto",
    report: Report = lambda step, share: None,
) -> Taught:
    """Teach recipe `name`. `open_session` gives a session of a model folder, or of the shipped network for None.

    `before`: what it was taught from earlier and learns again, with its `white_before` of images of more than 8 bits; what is given anew
    as well, perhaps with another label, counts as it is given. `seconds`: how long the network may learn from defects. Of more than
    MOST_GOOD good images, so many are learned from. `rates`: where its thresholds lie. Raises InputError where too few are usable.
    """
    start = time.monotonic()
    given = _gathered(good, defects, before, white_before, report)
    kept, bad = given.good, given.bad
    images = [one.image for one in kept]
    if len(kept) < FEWEST:
        why = f"; left out: {given.skipped[0][0]}: {given.skipped[0][1]}" if given.skipped else ""
        raise InputError(f"{len(kept)} good images can be used, expected at least {FEWEST}, better {ENOUGH} or more{why}")
    if defects and not bad:
        left_out, why = given.bad_skipped[0]
        raise InputError(f"none of {len(defects)} defective images can be used; left out: {left_out}: {why}")
    place = place_to_learn(device) if bad else ""
    times = {"read": time.monotonic() - start}
    if bad:
        bad_images, outlines = [one.image for one in bad], [one.outline for one in bad]
        found = from_defects(images, bad_images, outlines, open_session, place, seconds, start, times, report)
    else:
        found = from_good(images, open_session, times, report)
    begin, outlined = time.monotonic(), sum(one.outline is not None for one in bad)
    weight, scale = learned_weight(outlined, len(bad) - outlined), scale_of(learned_scores(found.judged))
    map_scale = scale if bad else scale_of(found.judged["map"])
    peaks = combined(lifted(found.maps, found.scores), found.judged["map"], weight, map_scale).max(axis=(1, 2))
    scores = combined(found.scores, learned_scores(found.judged), weight, scale)
    if found.probe:
        scores = found.probe.joined(scores, found.judged["whole"])
    of_good: list[float] = scores.tolist()
    apart = [kept[i].name for i in outliers(of_good)] if not bad else []
    kinds = _kinds(bad, found.bad_seen)
    facts = Facts(
        name=name,
        taught=now_rfc3339(),
        good=len(images),
        defects=len(bad),
        calibration=calibrate(of_good, rates),
        rates=rates,
        map_threshold=float(np.quantile(peaks, MAP_QUANTILE)) + 1e-6,
        sharpness=float(np.median([one.sharpness for one in kept])),
        aspect=_usual([one.aspect for one in kept]),
        side=_usual([one.side for one in kept]),
        colour=sum(image.ndim == 3 for image in images) * 2 > len(images),
        white=given.white,
        network=found.network,
        learned_weight=weight,
        learned_scale=scale,
        map_scale=map_scale,
        kinds=kinds.names if kinds else (),
        warnings=tuple(_warnings(given.number, kept, bad, apart)),
    )
    times["judge"] = times.get("judge", 0.0) + time.monotonic() - begin
    times["total"] = time.monotonic() - start
    model = None if found.folder is None else Path(found.folder.name) / MODEL_FOLDER
    recipe = Recipe(facts, found.parts, found.regions, found.probe, kinds, model, of_good, [*kept, *bad])
    return Taught(recipe, apart, given.skipped + given.bad_skipped, times, found.folder)


@dataclass(frozen=True)
class _Gathered:
    """What is taught from. `number`: how many good images there were to choose from; `skipped`: names with the reason; `white`: as
    `Facts.white`."""

    good: list[TaughtImage]
    bad: list[TaughtImage]
    number: int
    skipped: list[tuple[str, str]]
    bad_skipped: list[tuple[str, str]]
    white: float | None


def _gathered(
    good: Sequence[Sample], defects: Sequence[Sample], before: Sequence[TaughtImage], white_before: float | None, report: Report
) -> _Gathered:
    """What is given anew, read, and what of `before` is not among it."""
    every: list[Sample | TaughtImage] = [*(one for one in before if not one.defective), *good]
    chosen = _spread(every, MOST_GOOD)
    fresh = [one for one in chosen if isinstance(one, Sample)]
    white = deepest(sample.path for sample in fresh) or white_before
    kept, skipped = _read(fresh, white, report)
    bad, bad_skipped = _read(defects, white, lambda step, share: None)
    anew = {one.digest for one in (*kept, *bad)}
    kept = [*(one for one in chosen if isinstance(one, TaughtImage) and one.digest not in anew), *kept]
    bad = [*(one for one in before if one.defective and one.digest not in anew), *bad]
    defective = {one.digest: one.name for one in bad}
    skipped += [(one.name, f"the same picture as the defective {defective[one.digest]}") for one in kept if one.digest in defective]
    return _Gathered([one for one in kept if one.digest not in defective], bad, len(every), skipped, bad_skipped, white)


def _spread(samples: Sequence[Given], most: int) -> Sequence[Given]:
    """At most so many, in order: those that an operator found good, the last half of it where there are more, and others spread evenly."""
    if len(samples) <= most:
        return samples
    others = [place for place, sample in enumerate(samples) if not sample.decided]
    decided = [place for place, sample in enumerate(samples) if sample.decided][-max(most // 2, most - len(others)) :]
    chosen = np.linspace(0, len(others) - 1, min(len(others), most - len(decided))).round().astype(int)
    return [samples[place] for place in sorted([*decided, *(others[i] for i in chosen)])]


def _warnings(given: int, kept: Sequence[TaughtImage], bad: Sequence[TaughtImage], apart: Sequence[str]) -> Iterator[str]:
    if given > MOST_GOOD:
        yield f"{given} good images were given; {len(kept)} of them, spread evenly, were learned from"
    if len(kept) < ENOUGH:
        yield f"only {len(kept)} good parts: thresholds are coarse, add more (from {ENOUGH} on they can be trusted)"
    if apart:
        yield f"{len(apart)} good image(s) stand apart from the others: look at them, or teach without them"
    mixed = Counter(one.image.ndim for one in kept)
    if len(mixed) > 1:
        yield f"{mixed[2]} grey and {mixed[3]} colour images are mixed: teach with one kind"
    usual = mixed.most_common(1)[0][0]
    if foreign := sum(one.image.ndim != usual for one in bad):
        have, are = ("grey", "colour") if usual == 3 else ("colour", "grey")
        yield f"{foreign} of {len(bad)} defective images are {have}, the good ones {are}: frames like them go to REVIEW; use one camera"
    shape, size = _usual([one.aspect for one in kept]), _usual([one.side for one in kept])
    if foreign := sum(unusual(one.aspect, shape) for one in bad):
        yield (
            f"{foreign} of {len(bad)} defective images have another shape than the good ones (width / height {shape[0]:.2f}): "
            "frames like them go to REVIEW; use one camera"
        )
    elif foreign := sum(unusual(one.side, size) for one in bad):
        yield (
            f"{foreign} of {len(bad)} defective images have another size than the good ones (about {size[0]:.0f} pixels a side): "
            "frames like them go to REVIEW; use one camera"
        )


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
    known = {0: "no labelled defect is known", 1: "1 labelled defect is known"}.get(defects, f"{defects} labelled defects are known")
    if more < 1:
        return f"{known}; on the parts that this was measured on, ten more brought little: add those that were judged wrongly"
    return (
        f"{known}; on the parts that this was measured on (magnetic tiles), ten more held about {more:.0f} more of 100 defective parts "
        "at 5 % false rejects. Yours may differ"
    )


def learned_weight(outlined: int, labels: int = 0) -> float:
    """How much the learned network has to say beside the statistics of good parts, by the defects it learned from.

    Near the best weights at 5, 20, 50 and 260 outlined defects of magnetic tiles: more defects, more say. A label
    without an outline counts as a quarter of one.
    """
    number = outlined + labels / 4
    if not number:
        return 0.0
    return float(np.clip(0.35 + 0.25 * np.log10(number / 5), 0.35, 0.7))


def _read(samples: Sequence[Sample], white: float | None, report: Report) -> tuple[list[TaughtImage], list[tuple[str, str]]]:
    """Images that can be used, and names of the others with the reason. Of equal pictures one is used: a part that was held back would
    else have been taught all the same."""
    kept, skipped = [], []
    seen: dict[str, str] = {}
    with ThreadPoolExecutor(host().cores) as pool:
        for number, (sample, one) in enumerate(zip(samples, pool.map(lambda sample: _usable(sample, white), samples), strict=True)):
            if isinstance(one, str):
                skipped.append((sample.name, one))
            elif one.digest in seen:
                skipped.append((sample.name, f"the same picture as {seen[one.digest]}"))
            else:
                seen[one.digest] = sample.name
                kept.append(one)
            report("reading", (number + 1) / len(samples))
    return kept, skipped


def _usable(sample: Sample, white: float | None) -> TaughtImage | str:
    """What is kept of an image, or why it can't be used."""
    try:
        image = sample.read(white)
        outline = sample.cells(image.shape)  # a mask that does not fit is known before anything is learned
    except InputError as error:
        return str(error)
    if why := unusable(image):
        return why
    digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
    height, width = image.shape[:2]
    shape = (sharpness(image), width / height, side_of(width, height))
    return TaughtImage(sample.name, sample.kind, shrunk(image), outline, *shape, digest, sample.defective, sample.decided)


def _usual(values: Sequence[float]) -> tuple[float, float]:
    """The median of shapes or sizes, and how far their logarithms differ."""
    logs = np.log(values)
    return float(np.exp(np.median(logs))), float(logs.std())


def _kinds(samples: Sequence[TaughtImage], seen: dict[str, np.ndarray]) -> KindClassifier | None:
    """A classifier of the kinds that have samples enough; None where there are not two."""
    counts = Counter(sample.kind for sample in samples)
    known = [i for i, sample in enumerate(samples) if counts[sample.kind] >= KIND_SAMPLES]
    if len({samples[i].kind for i in known}) < 2:
        return None
    return KindClassifier.fit(seen["embedding"][known], [samples[i].kind for i in known])
