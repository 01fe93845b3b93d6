"""Teaches from `train/good` of a data set (and labelled defects, where given), judges `test`, and says how well."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from apps.industrial.errors import InputError
from apps.industrial.evaluation.dataset import Sample
from apps.industrial.evaluation.metrics import auroc, interval, per_region_overlap, recall_at
from apps.industrial.features import MAP
from apps.industrial.inspection.inspector import Inspector


@dataclass(frozen=True)
class Judged:
    """One image of the test set with what the inspector said."""

    sample: Sample
    score: float
    verdict: str
    seconds: float
    map: np.ndarray | None
    mask: np.ndarray | None
    kind: str = ""


def judge(
    inspector: Inspector,
    samples: Sequence[Sample],
    watch: Callable[[Sequence[Sample]], Any] = lambda s: s,
    refused: list[tuple[str, str]] | None = None,
) -> list[Judged]:
    """Inspect each image on its own, as a line does. Those that can't be read, or whose mask does not fit, come to `refused`,
    with the reason; without it they raise InputError."""
    found = []
    for sample in watch(samples):
        try:
            image = sample.read(inspector.recipe.facts.white)
            cells = sample.cells(image.shape)
        except InputError as error:
            if refused is None:
                raise
            refused.append((sample.path.name, str(error)))
            continue
        begin = time.perf_counter()
        result = inspector.inspect(image)
        seconds = time.perf_counter() - begin
        found.append(Judged(sample, result.score, result.verdict, seconds, result.map, cells, result.kind))
    return found


def metrics(judged: Sequence[Judged]) -> dict[str, Any]:
    """The documented metrics, with intervals, a part a kind, and counts of verdicts. Those of pixels and PRO are of the map's own cells
    (MAP, MAP): a cell is defective where half of it is, or where the defect covers most of it."""
    truth = [j.sample.defective for j in judged]
    scores = [j.score for j in judged]
    outlined = [j for j in judged if j.mask is not None and j.map is not None]
    masks, maps = _grid(outlined)
    result: dict[str, Any] = {
        "image_auroc": _rounded(auroc(truth, scores)),
        "image_auroc_interval": interval(truth, scores),
        "pixel_auroc": _rounded(auroc(masks.ravel()[::4], maps.ravel()[::4])) if len(masks) else None,
        "pro": _rounded(per_region_overlap(masks, maps)) if len(masks) else None,
        "recall_at_fpr_1pct": _rounded(recall_at(truth, scores, 0.01)),
        "recall_at_fpr_5pct": _rounded(recall_at(truth, scores, 0.05)),
        "ms_per_image": round(1e3 * float(np.median([j.seconds for j in judged])), 3),
    }
    kinds = sorted({j.sample.kind for j in judged if j.sample.defective})
    good = [j.score for j in judged if not j.sample.defective]
    result["image_auroc_by_kind"] = {}
    for kind in kinds:
        of_kind = [j.score for j in judged if j.sample.kind == kind]
        result["image_auroc_by_kind"][kind] = _rounded(auroc([False] * len(good) + [True] * len(of_kind), good + of_kind))
    result["verdicts"] = {
        label: {v: sum(j.verdict == v for j in judged if j.sample.defective is bad) for v in ("pass", "review", "fail")}
        for label, bad in (("good", False), ("defective", True))
    }
    return result


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def _grid(judged: Sequence[Judged]) -> tuple[np.ndarray, np.ndarray]:
    side = MAP
    masks = np.zeros((len(judged), side, side), bool)
    maps = np.zeros((len(judged), side, side), np.float32)
    for i, j in enumerate(judged):
        assert j.mask is not None
        masks[i] = j.mask >= min(0.5, float(j.mask.max()) * 0.99) if j.mask.max() > 0 else False
        maps[i] = cv2.resize(np.asarray(j.map), (side, side))
    return masks, maps
