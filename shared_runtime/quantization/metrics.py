"""Metrics for the guard: `metric(outputs, targets) -> float`, higher is better, over lists of output dicts and targets.

Each takes the model's first output of scores (floating point) unless it is made for another by name: `named("logits", top1)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from shared_runtime.errors import MetricError
from shared_runtime.signature import Tensors

Array = np.ndarray[Any, Any]
Metric = Callable[[Sequence[Tensors], Sequence[Any]], float]

FEW = 64
MOST_CLASSES, TIE = 4096, 1e-3


def correlation(outputs: Sequence[Tensors], targets: Sequence[Tensors]) -> float:
    """Agreement in value with the float model: Pearson's correlation, the worst output. An output of FEW values or more an
    item is correlated item by item and averaged; a smaller one (a score, a logit) over all items together. Of labels (whole
    numbers or words) it is the share that is the same."""
    return min(_output_correlation([o[name] for o in outputs], [t[name] for t in targets]) for name in targets[0])


def _output_correlation(mine: Sequence[Array], theirs: Sequence[Array]) -> float:
    if theirs[0].dtype.kind != "f":
        return float(np.mean(np.concatenate([(a == b).ravel() for a, b in zip(mine, theirs, strict=True)])))
    if min(value.size for value in theirs) >= FEW:
        return float(np.mean([_correlation(a, b) for a, b in zip(mine, theirs, strict=True)]))
    return _correlation(np.concatenate([a.ravel() for a in mine]), np.concatenate([b.ravel() for b in theirs]))


def agreement(outputs: Sequence[Tensors], targets: Sequence[Tensors]) -> float:
    """Agreement with the float model where there are no labels: the lower of `correlation` and, for outputs that
    hold classes (2 to 4096 of them), the share of places where the same class is highest, or one that the float model rates
    as high but for TIE of the output's range. Classes are on axis 1; of three axes on the one that sums to 1, or the shorter."""
    worst = correlation(outputs, targets)
    for name, first in targets[0].items():
        if (axis := _class_axis(first)) is not None:
            same = [_same_class(o[name], t[name], axis) for o, t in zip(outputs, targets, strict=True)]
            worst = min(worst, float(np.mean(same)))
    return worst


def _class_axis(value: Array) -> int | None:
    """Which axis holds classes: a sequence may have them last, and so do pictures that were exported from TensorFlow."""
    if value.ndim < 2 or value.dtype.kind != "f":
        return None
    axes = [axis for axis in dict.fromkeys((1, value.ndim - 1)) if 2 <= value.shape[axis] <= MOST_CLASSES]
    for axis in axes:
        if value.min(initial=0.0) >= 0 and np.allclose(value.sum(axis), 1, atol=1e-3):
            return axis
    if value.ndim == 3 and axes:
        return min(axes, key=lambda axis: value.shape[axis])
    return 1 if 1 in axes else None


def _same_class(mine: Array, theirs: Array, axis: int) -> float:
    chosen = np.take_along_axis(theirs, mine.argmax(axis, keepdims=True), axis)
    return float(np.mean(theirs.max(axis, keepdims=True) - chosen <= TIE * np.ptp(theirs)))


def top1(outputs: Sequence[Tensors], targets: Sequence[Any]) -> float:
    """Share of rows whose highest class (axis 1 of the first output of scores) is the target's; one score a row is a class above a half."""
    hits = [_classes(o) == np.asarray(t).ravel() for o, t in zip(outputs, targets, strict=True)]
    return float(np.mean(np.concatenate(hits)))


def dice(outputs: Sequence[Tensors], targets: Sequence[Any]) -> float:
    """Mean Dice of the foreground classes; targets are label maps (N, ...) for outputs (N, classes, ...)."""
    scores = []
    for output, target in zip(outputs, targets, strict=True):
        scores_of = _first(output)
        labels, wanted = scores_of.argmax(1), np.asarray(target).reshape(len(scores_of), *scores_of.shape[2:])
        for label in range(1, scores_of.shape[1]):
            a, b = labels == label, wanted == label
            if a.any() or b.any():
                scores.append(2 * np.sum(a & b) / (np.sum(a) + np.sum(b)))
    return float(np.mean(scores)) if scores else 1.0


def average_precision(outputs: Sequence[Tensors], targets: Sequence[Any]) -> float:
    """Average precision of the first output (the last class's score where it has several)."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(_flat(targets), _scores(outputs)))


def auroc(outputs: Sequence[Tensors], targets: Sequence[Any]) -> float:
    """Area under the ROC curve of the first output (the last class's score where it has several)."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(_flat(targets), _scores(outputs)))


def named(output: str, metric: Metric) -> Metric:
    """`metric` on one output by name."""

    def of_one(outputs: Sequence[Tensors], targets: Sequence[Any]) -> float:
        return metric([{output: item[output]} for item in outputs], targets)

    of_one.__name__ = f"{getattr(metric, '__name__', 'metric')}:{output}"
    return of_one


METRICS: Mapping[str, Metric] = {
    "agreement": agreement,
    "correlation": correlation,
    "top1": top1,
    "dice": dice,
    "average_precision": average_precision,
    "auroc": auroc,
}
ALIASES = {"ap": "average_precision", "accuracy": "top1", "top-1": "top1", "top_1": "top1", "roc_auc": "auroc", "auc": "auroc"}
UNLABELLED: tuple[Metric, ...] = (agreement, correlation)
"""Metrics that compare with the float model, and need no labels."""


def metric_of(metric: Metric | str | None) -> Metric:
    """A metric by its name or usual other name, or as it is; `agreement` for None. Raises MetricError."""
    if metric is None:
        return agreement
    if isinstance(metric, str):
        name = metric.strip().lower()
        if (found := METRICS.get(ALIASES.get(name, name))) is None:
            raise MetricError(f"unknown metric {metric!r}; expected one of {', '.join(METRICS)}, or a function of (outputs, targets)")
        return found
    if not callable(metric):
        raise MetricError(f"metric is a {type(metric).__name__}; expected a function of (outputs, targets), or one of {', '.join(METRICS)}")
    return metric


def _first(output: Tensors) -> np.ndarray[Any, Any]:
    """The first output of scores: a classifier may give its labels before them."""
    return next((value for value in output.values() if value.dtype.kind == "f"), next(iter(output.values())))


def _classes(output: Tensors) -> np.ndarray[Any, Any]:
    found = _first(output)
    if found.dtype.kind != "f":
        return found.ravel()
    return found.argmax(1).ravel() if found.ndim > 1 and found.shape[1] > 1 else np.asarray(found.ravel() > 0.5)


def _scores(outputs: Sequence[Tensors]) -> np.ndarray[Any, Any]:
    rows = [_first(o).reshape(len(_first(o)), -1)[:, -1] for o in outputs]
    return np.concatenate(rows)


def _flat(targets: Sequence[Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([np.asarray(target).ravel() for target in targets])


def _correlation(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    if not np.isfinite(x).all():
        return 0.0
    if x.size > 1 and np.ptp(y) > 0:
        x, y = x - x.mean(), y - y.mean()
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    if scale == 0.0:
        return 1.0 if np.array_equal(x, y) else 0.0
    if x.size < 3:  # too few values to correlate: their relative difference
        scale = max(float(np.linalg.norm(b.astype(np.float64))), 1e-12)
        return max(0.0, 1.0 - float(np.linalg.norm(a.astype(np.float64) - b)) / scale)
    return float(x @ y / scale)
