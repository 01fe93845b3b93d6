"""The guard's search: which layers go back to float, in how few measurements, whatever way their harms combine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

import shared_runtime as rt
from shared_runtime.quantization.forms import BETWEEN
from shared_runtime.quantization.guard import Guard
from shared_runtime.quantization.judge import Judge
from shared_runtime.quantization.samples import SampleStore, read_calibration
from tests.forms import Adding, FakeForm

LAYERS = tuple(f"layer {place}" for place in range(90))
Combine = Callable[[Iterable[float]], float]


class Spoiling(FakeForm):
    """A form whose reduced layers spoil the output: by the sum of their harms, or by the greatest alone."""

    def __init__(self, layers: Sequence[str], harm: dict[str, float], combine: Combine, always: float = 0.0) -> None:
        super().__init__(layers)
        self.compiled = 0
        self._harm, self._combine, self._always = harm, combine, always

    def compile(self, reverted: frozenset[str], threads: int) -> Any:
        self.compiled += 1
        return Adding(self._always + self._combine([self._harm.get(name, 0.0) for name in self.layers if name not in reverted] or [0.0]))


def searched(form: Spoiling, room: float, seconds: float = 30, metric: Any = None) -> Any:
    signature = rt.Signature(*((rt.TensorSpec(name, ("batch", 2), "float32"),) for name in "xy"))
    generator = np.random.default_rng(0)
    samples = read_calibration([{"x": generator.standard_normal((1, 2)).astype(np.float32)} for _ in range(12)], signature, "fake")
    reference = [{"y": inputs["x"]} for inputs in samples]

    def closeness(outputs: Any, targets: Any) -> float:
        return -max(float(np.abs(o["y"] - t["y"]).max()) for o, t in zip(outputs, targets, strict=True))

    judge = Judge(reference, samples, reference, metric or closeness, room)
    return Guard(form, judge, Adding(0.0), 1, seconds).search()


@pytest.mark.parametrize("combine", [sum, max])
@pytest.mark.parametrize("between", [0.0, 50.0])
def test_the_few_that_spoil_the_output_are_found_among_many(combine: Combine, between: float) -> None:
    """By their greatest harm alone: putting one of them back shows nothing while another is reduced."""
    harm = {"layer 3": 5.0, "layer 41": 6.0, "layer 88": 5.5, BETWEEN: between}
    form = Spoiling((*LAYERS, BETWEEN), harm, combine)
    found = searched(form, 0.1)
    assert found.passed
    assert found.layers == {name for name, value in harm.items() if value}
    assert form.compiled < len(LAYERS)
    assert [item.value for item in found.reverted] == sorted((item.value for item in found.reverted), reverse=True)


def test_harm_that_all_share_goes_back_in_part() -> None:
    form = Spoiling(LAYERS, dict.fromkeys(LAYERS, 0.01), sum)
    found = searched(form, 0.455)
    assert found.passed
    assert len(found.reverted) == 45


def test_what_a_form_loses_with_every_layer_in_float_is_no_harm_of_layers() -> None:
    form = Spoiling(LAYERS, {"layer 7": 1.0}, sum, always=20.0)
    found = searched(form, 20.1)
    assert found.passed
    assert found.layers == {"layer 7"}


def test_without_time_the_search_ends_with_a_refusal() -> None:
    form = Spoiling(LAYERS, dict.fromkeys(LAYERS, 1.0), sum)
    found = searched(form, 0.1, seconds=0)
    assert not found.passed
    assert form.compiled <= 4


def test_a_metric_that_fails_on_a_few_items_leaves_the_ranking_to_the_outputs() -> None:
    def needs_all(outputs: Any, targets: Any) -> float:
        if len(outputs) < 12:
            raise ValueError("one class only")
        return -max(float(np.abs(o["y"] - t["y"]).max()) for o, t in zip(outputs, targets, strict=True))

    form = Spoiling(LAYERS, {"layer 60": 3.0}, sum)
    found = searched(form, 0.1, metric=needs_all)
    assert found.layers == {"layer 60"}


def numbers() -> tuple[SampleStore, list[dict[str, np.ndarray]]]:
    """Twenty items and what a float model says of them: the same."""
    signature = rt.Signature(*((rt.TensorSpec(name, ("batch", 2), "float32"),) for name in "xy"))
    samples = read_calibration([{"x": np.full((1, 2), place, np.float32)} for place in range(20)], signature, "fake")
    return samples, [{"y": inputs["x"]} for inputs in samples]


def nearness(outputs: Any, targets: Any) -> float:
    return 1 - float(np.mean([np.abs(o["y"] - t["y"]).mean() for o, t in zip(outputs, targets, strict=True)]))


def test_a_certain_judge_holds_the_interval_to_the_limit_too() -> None:
    """Half of the items lose 0.08 and half nothing: 0.04 on average, by chance more."""
    samples, reference = numbers()
    spoiled = [{"y": item["y"] - np.float32(0.08 * (place % 2))} for place, item in enumerate(reference)]

    def verdict(outputs: Any, **options: Any) -> Any:
        return Judge(reference, samples, reference, nearness, 0.05, **options).judge(outputs)

    assert not verdict(spoiled).why
    why = verdict(spoiled, certain=True).why
    assert "95 % confidence" in why
    assert f"{verdict(spoiled).interval[1]:.4g}" in why
    assert not verdict(reference, certain=True).why


def test_a_brief_verdict_spares_the_interval_of_what_fails_anyway() -> None:
    samples, reference = numbers()
    spoiled = [{"y": item["y"] - np.float32(0.3)} for item in reference]
    asked = 0

    def counted(outputs: Any, targets: Any) -> float:
        nonlocal asked
        asked += 1
        return nearness(outputs, targets)

    judge = Judge(reference, samples, reference, counted, 0.05)
    asked = 0
    brief = judge.judge(spoiled, brief=True)
    assert (asked, brief.why) == (1, judge.judge(spoiled).why)
    assert judge.judge(reference, brief=True).interval == judge.judge(reference).interval == (0, 0)


@pytest.mark.parametrize("labels", ["right", "counted from 1", "one class"])
def test_a_metric_that_does_not_see_the_outputs_is_warned_of(labels: str, caplog: pytest.LogCaptureFixture) -> None:
    signature = rt.Signature(*((rt.TensorSpec(name, ("batch", 4), "float32"),) for name in "xy"))
    generator = np.random.default_rng(0)
    scores = generator.standard_normal((64, 4)).astype(np.float32)
    scores = scores + 10 * np.eye(4, dtype=np.float32)[0] if labels == "one class" else scores
    samples = read_calibration([{"x": row[None]} for row in scores], signature, "fake")
    reference = [{"y": row[None]} for row in scores]
    targets = scores.argmax(1)
    targets = (targets + 1) % 4 if labels == "counted from 1" else targets
    judge = Judge(reference, samples, list(targets), rt.metrics.top1, 0.01, seed=2)
    assert judge.before == (0.0 if labels == "counted from 1" else 1.0)
    assert ("guards little" in caplog.text) is (labels != "right")
