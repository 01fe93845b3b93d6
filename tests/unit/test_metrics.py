"""The metrics of the guard: where classes lie, and what of them is a decision."""

from __future__ import annotations

import numpy as np
import pytest

import shared_runtime as rt
from shared_runtime.quantization.metrics import Metric, agreement, auroc, average_precision, dice, top1

GENERATOR = np.random.default_rng(0)


def judged(theirs: np.ndarray, mine: np.ndarray) -> float:
    return agreement([{"y": mine.astype(np.float32)}], [{"y": theirs.astype(np.float32)}])


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((8, 5), 1), ((2, 5, 300), 1), ((2, 300, 5), 2), ((2, 5, 20, 20), 1)],
    ids=["classes", "classes, places", "places, classes", "pictures"],
)
def test_swapped_classes_are_seen_on_their_axis(shape: tuple[int, ...], axis: int) -> None:
    scores = GENERATOR.standard_normal(shape)
    assert judged(scores, scores + 1e-6 * GENERATOR.standard_normal(shape)) > 0.999
    order = np.argsort(scores, axis)
    best, next_best = (np.take(order, place, axis) for place in (-1, -2))
    swapped = scores.copy()
    for a, b in ((best, next_best), (next_best, best)):
        value = np.take_along_axis(scores, np.expand_dims(b, axis), axis)
        np.put_along_axis(swapped, np.expand_dims(a, axis), value, axis)
    assert judged(scores, swapped) < 0.05


def test_probabilities_tell_their_axis() -> None:
    """A picture from TensorFlow has its classes last, also where it has more of them than rows."""
    logits = GENERATOR.standard_normal((1, 4, 64, 20))
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert judged(scores, np.roll(scores, 1, -1)) < 0.2


def test_classes_that_the_float_model_does_not_tell_apart_are_no_decision() -> None:
    """Frames of silence: every class is as unlikely as the others but for rounding."""
    scores = 1e-6 * GENERATOR.standard_normal((1, 50, 300))
    scores[:, 7, :100] = 1.0
    other = scores + 1e-6 * GENERATOR.standard_normal(scores.shape)
    assert judged(scores, other) > 0.999
    other[:, 8, :50] = 2.0
    assert judged(scores, other) < 0.9


SCORES = GENERATOR.standard_normal((12, 3)).astype(np.float32)
BEST = SCORES.argmax(1)


@pytest.mark.parametrize("targets", [BEST, BEST[:, None], BEST.astype(float), np.eye(3)[BEST], BEST.astype(object)])
def test_classes_as_they_are_written_down(targets: np.ndarray) -> None:
    assert top1([{"y": SCORES}], [targets]) == 1.0
    assert top1([{"y": np.roll(SCORES, 1, 1)}], [targets]) < 0.5


def test_labels_of_the_models_own_are_compared_with_its_labels() -> None:
    """A scikit-learn classifier gives its label first; its classes may be words, or begin at 1."""
    words = np.array(["crack", "fray", "hole"])[BEST]
    for label, target in ((words.astype(object), words), (words.astype(object), words.tolist()), (BEST + 1, BEST + 1)):
        assert top1([{"label": label, "probabilities": SCORES}], [target]) == 1.0
        assert top1([{"label": np.roll(label, 1), "probabilities": SCORES}], [target]) < 1.0
    assert top1([{"label": words.astype(object), "probabilities": SCORES}], [BEST]) == 1.0, "indices are of the scores"


@pytest.mark.parametrize("targets", [None, BEST + 1, BEST - 1, np.array(["a"] * 12), {"y": BEST}, [None] * 12, BEST + np.nan])
def test_targets_that_are_no_classes_of_the_output_are_said(targets: object) -> None:
    with pytest.raises(rt.MetricError, match="a target is"):
        top1([{"y": SCORES}], [targets])


@pytest.mark.parametrize("logits", [True, False])
def test_a_single_channel_has_a_foreground(logits: bool) -> None:
    mask = np.zeros((2, 8, 8), int)
    mask[:, 2:5, 3:6] = 1
    scores = np.where(mask, 4.0, -4.0)[:, None].astype(np.float32)
    scores = scores if logits else 1 / (1 + np.exp(-scores))
    assert dice([{"y": scores}], [mask]) == 1.0
    assert dice([{"y": scores}], [mask[:, None]]) == 1.0
    assert dice([{"y": np.roll(scores, 3, 2)}], [mask]) == 0.0
    assert dice([{"labels": 2 * mask[:, None]}], [2 * mask]) == 1.0, "a graph may end with the label map"
    assert dice([{"labels": np.roll(mask, 3, 1)}], [mask]) == 0.0
    assert top1([{"y": scores[:, 0, 3, 4]}], [np.ones(2)]) == 1.0
    assert top1([{"y": scores[:, 0, 0, :1]}], [np.ones(2)]) == 0.0


@pytest.mark.parametrize("metric", [auroc, average_precision])
def test_several_classes_are_each_set_against_the_others(metric: Metric) -> None:
    assert metric([{"y": SCORES[:5]}, {"y": SCORES[5:]}], [BEST[:5], BEST[5:]]) > 0.7
    sharp = np.eye(3, dtype=np.float32)[BEST]
    assert metric([{"y": sharp}], [BEST]) == 1.0
    assert metric([{"y": sharp}], [np.eye(3)[BEST]]) == 1.0
    two = BEST > 0
    assert metric([{"y": np.stack([1.0 - two, two], 1)}], [two]) == 1.0
    assert metric([{"y": sharp[BEST < 2]}], [BEST[BEST < 2]]) == 1.0, "a slice need not hold every class"
