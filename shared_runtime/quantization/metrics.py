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
UNSURE = 0.05
"""So far beyond 0 and 1 a reduced form may give probabilities."""


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
    """Share of rows whose class is the target's: the label where the model gives one first, else the highest score on axis 1 of the first
    output of scores; of one score a row the class is 1 above a half, or above 0 where scores are logits. Targets are class indices, the
    model's own labels, or one-hot. Raises MetricError for targets that are none of these."""
    limit = _limit([_first(output) for output in outputs])
    hits = [_hits(output, _array(target), limit) for output, target in zip(outputs, targets, strict=True)]
    return float(np.mean(np.concatenate(hits)))


def _hits(output: Tensors, target: Array, limit: float) -> Array:
    label, scores = next(iter(output.values())), _first(output)
    words = target.dtype.kind in "US"
    if label.dtype.kind != "f" and label.size == target.size and words == (label.dtype.kind in "OUS"):
        return np.asarray((label.astype(str) if words else label).ravel() == target.ravel())
    classes, wanted = _width(scores), _indices(target, scores).ravel()
    last = max(classes, 2) - 1
    if words or (wanted.size and not 0 <= wanted.min() <= wanted.max() <= last):
        raise MetricError(
            f"a target is {str(target.ravel()[:5])[:80]}; expected classes from 0 to {last}, as the output of scores has them"
        )
    return np.asarray((scores.argmax(1).ravel() if classes > 1 else scores.ravel() > limit) == wanted)


def dice(outputs: Sequence[Tensors], targets: Sequence[Any]) -> float:
    """Mean Dice of the foreground classes; targets are label maps (N, ...) for outputs (N, classes, ...) or label maps, or one-hot. Of
    one channel the foreground is what is above a half, or above 0 where scores are logits."""
    scores, found = [], [_first(output) for output in outputs]
    limit = _limit(found)
    for values, target in zip(found, map(_array, targets), strict=True):
        classes, labels = _width(values), values
        if values.dtype.kind == "f":
            labels = values.argmax(1) if classes > 1 else (values[:, 0] > limit).astype(int)
            wanted = _indices(target, values).reshape(labels.shape)
        else:  # the graph ends with the label map
            wanted = target.reshape(labels.shape)
            classes = int(max(labels.max(initial=0), wanted.max(initial=0))) + 1
        for label in range(1, max(classes, 2)):
            a, b = labels == label, wanted == label
            if a.any() or b.any():
                scores.append(2 * np.sum(a & b) / (np.sum(a) + np.sum(b)))
    return float(np.mean(scores)) if scores else 1.0


def average_precision(outputs: Sequence[Tensors], targets: Sequence[Any]) -> float:
    """Average precision of the first output (the last class's score where it has several); of three classes or more the mean over each
    against the others."""
    from sklearn.metrics import average_precision_score

    return _each_class(average_precision_score, outputs, targets)


def auroc(outputs: Sequence[Tensors], targets: Sequence[Any]) -> float:
    """Area under the ROC curve of the first output (the last class's score where it has several); of three classes or more the mean over
    each against the others."""
    from sklearn.metrics import roc_auc_score

    return _each_class(roc_auc_score, outputs, targets)


def _each_class(metric: Callable[[Any, Any], float], outputs: Sequence[Tensors], targets: Sequence[Any]) -> float:
    found = [_first(output) for output in outputs]
    wanted = np.concatenate([_indices(_array(target), scores).ravel() for target, scores in zip(targets, found, strict=True)])
    if found[0].ndim != 2 or found[0].shape[1] < 3:
        return float(metric(wanted, np.concatenate([scores.reshape(len(scores), -1)[:, -1] for scores in found])))
    scores = np.concatenate(found)
    each = [metric(wanted == label, scores[:, label]) for label in range(scores.shape[1]) if 0 < np.sum(wanted == label) < len(wanted)]
    return float(np.mean(each)) if each else float("nan")


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


def _array(target: Any) -> Array:
    """A target as an array of numbers or words. Raises MetricError where there is none."""
    array = np.asarray(target)
    if array.dtype.kind == "O" and all(isinstance(value, (str, int, float)) for value in array.ravel()):
        array = np.asarray(array.tolist())
    if array.dtype.kind not in "biufUS":
        raise MetricError(f"a target is {str(target)[:80]}; expected class indices or labels")
    return array


def _width(scores: Array) -> int:
    """Classes of an output of scores, on axis 1."""
    return int(scores.shape[1]) if scores.ndim > 1 else 1


def _indices(target: Array, scores: Array) -> Array:
    """A target as class indices: one-hot ones have the shape of the scores."""
    return np.asarray(target.argmax(1)) if target.shape == scores.shape and _width(scores) > 1 else target


def _limit(scores: Sequence[Array]) -> float:
    """What a single score is above for its class: 0.5 of probabilities, 0 of logits."""
    return 0.5 if all(values.size == 0 or -UNSURE <= values.min() <= values.max() <= 1 + UNSURE for values in scores) else 0.0


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
