"""The metrics of the guard: where classes lie, and what of them is a decision."""

from __future__ import annotations

import numpy as np
import pytest

from shared_runtime.quantization.metrics import agreement

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
