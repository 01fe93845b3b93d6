"""Accuracy of scores and maps: AUROC of images and pixels, overlap a region (PRO), recall at a rate of false rejects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import roc_auc_score, roc_curve

Array = NDArray[np.float32]
PRO_LIMIT = 0.3


def auroc(defective: Sequence[bool] | NDArray[np.bool_], scores: Sequence[float] | Array) -> float | None:
    """Area under the ROC curve; None where one of the two classes is missing."""
    truth = np.asarray(defective, bool)
    return float(roc_auc_score(truth, scores)) if truth.any() and not truth.all() else None


def recall_at(defective: Sequence[bool] | NDArray[np.bool_], scores: Sequence[float] | Array, rate: float) -> float | None:
    """Share of defective images found where at most `rate` of the good ones are rejected."""
    truth = np.asarray(defective, bool)
    if not truth.any() or truth.all():
        return None
    false, true, _ = roc_curve(truth, scores)
    return float(true[false <= rate + 1e-12].max())


def per_region_overlap(masks: NDArray[np.bool_], maps: Array, limit: float = PRO_LIMIT, levels: int = 200) -> float | None:
    """PRO: mean overlap with each connected region over false positive rates up to `limit`, as a share of `limit`.

    Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 129 (2021). `masks`, `maps`: (N, H, W).
    """
    if not masks.any() or masks.all():
        return None
    good = np.sort(maps[~masks])
    regions: list[Array] = []
    for mask, values in zip(masks, maps, strict=True):
        labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [np.sort(values[labelled == k]) for k in range(1, count + 1)]
    rates = np.linspace(0, limit, levels)
    cuts = good[np.clip((len(good) * (1 - rates)).astype(int), 0, len(good) - 1)]
    overlap = np.mean([1 - np.searchsorted(region, cuts, "right") / len(region) for region in regions], axis=0)
    return float(np.trapezoid(overlap, rates) / limit)


def interval(
    defective: Sequence[bool], scores: Sequence[float], groups: Sequence[str] | None = None, draws: int = 500
) -> list[float] | None:
    """95 % bootstrap interval of the AUROC; whole `groups` (images of one part) are drawn where they are known."""
    truth, values = np.asarray(defective, bool), np.asarray(scores, float)
    if auroc(truth, values) is None:
        return None
    names = np.asarray(groups if groups is not None else np.arange(len(truth)).astype(str))
    members = [np.flatnonzero(names == name) for name in np.unique(names)]
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        rows = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        value = auroc(truth[rows], values[rows])
        if value is not None:
            found.append(value)
    return [round(float(v), 4) for v in np.percentile(found, (2.5, 97.5))]
