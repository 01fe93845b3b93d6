"""Several samples in one run: what a form does one by one it has to do on batches as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import shared_runtime as rt
from shared_runtime.errors import UnsupportedModelError
from shared_runtime.quantization.judge import Judge
from shared_runtime.quantization.samples import SampleStore, read_calibration
from shared_runtime.quantization.together import Together, in_groups, judge_together

SIGNATURE = rt.Signature((rt.TensorSpec("x", ("batch", "length"), "float32"),), (rt.TensorSpec("y", ("batch", "length"), "float32"),))
Compute = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


class Computing:
    """An executable of one function."""

    def __init__(self, compute: Compute) -> None:
        self._compute, self.rows = compute, []

    def run(self, inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
        self.rows.append(len(inputs["x"]))
        return {"y": self._compute(inputs["x"])}


def float_model(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return 2 * x


def samples(count: int, lengths: tuple[int, ...] = (3,)) -> SampleStore:
    generator = np.random.default_rng(0)
    made = [{"x": generator.standard_normal((1, lengths[i % len(lengths)])).astype(np.float32)} for i in range(count)]
    return read_calibration(made, SIGNATURE, "fake")


def together(
    form: Compute,
    store: SampleStore,
    model: Compute = float_model,
    metric: Any = rt.metrics.correlation,
    signature: rt.Signature = SIGNATURE,
) -> Together:
    reference = [{"y": model(inputs["x"])} for inputs in store]
    judge = Judge(reference, store, reference, metric, 0.01)
    return judge_together(Computing(form), Computing(model), judge, signature)  # type: ignore[arg-type]


def wrong(where: Callable[[int], np.ndarray[Any, Any]]) -> Compute:
    def compute(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        y = float_model(x)
        y[where(len(x))] = 7.0
        return y

    return compute


def test_a_form_that_does_the_same_passes() -> None:
    found = together(lambda x: np.float32(2.01) * x, samples(12))
    assert (found.samples, found.why) == (40, "")
    assert found.drop == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("count", [2, 12, 100])
def test_wrong_from_the_33rd_row_on(count: int) -> None:
    """Also where the validation set is smaller than that."""
    found = together(wrong(lambda rows: np.arange(rows) >= 32), samples(count))
    assert found.why.startswith("40 samples in one run are ")


@pytest.mark.parametrize("lengths", [(3,), (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)])
def test_samples_of_as_many_sizes_as_there_are(lengths: tuple[int, ...]) -> None:
    assert together(wrong(lambda rows: np.arange(rows) >= 32), samples(len(lengths), lengths)).why.startswith("40 samples in one run are ")


def test_numbers_that_depend_on_earlier_runs() -> None:
    seen = [0]

    def worn(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        seen.append(max(seen[-1], len(x)))
        return float_model(x) * np.float32(0.5 if len(x) < seen[-1] else 1)

    assert together(worn, samples(12)).why == "the same samples differ by 0.5 one by one after 40 in one run"


@pytest.mark.parametrize("rows", [2, 8])
def test_wrong_for_a_few_rows(rows: int) -> None:
    assert together(wrong(lambda given: np.full(given, given == rows)), samples(30)).why.startswith(f"{rows} samples in one run are ")


def test_a_scale_over_all_rows_is_the_metrics_matter() -> None:
    """Dynamic quantization rounds small rows by the largest: near in all, and ranks nothing any more."""
    generator, store = np.random.default_rng(0), SampleStore("validation")
    for place in range(40):
        store.add({"x": (generator.standard_normal((1, 3)) * (100 if place == 39 else 0.1)).astype(np.float32)}, SIGNATURE, "fake")

    def rounded(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        step = np.abs(x).max() / 127
        return float_model(np.round(x / step) * step)

    def order(outputs: Any, targets: Any) -> float:
        return float(np.mean([np.array_equal(np.argsort(o["y"]), np.argsort(t["y"])) for o, t in zip(outputs, targets, strict=True)]))

    found = together(rounded, store, metric=order)
    assert found.why.startswith("40 samples in one run: order drops by ")
    assert found.drop is not None
    assert found.drop > 0.5


def test_rows_that_depend_on_each_other_are_compared_with_float_on_the_same_rows() -> None:
    def centred(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return x - x.mean(axis=0)

    found = together(lambda x: np.float32(1.01) * (centred(x) + x), samples(12), lambda x: centred(x) + x)
    assert (found.samples, found.drop, found.why) == (40, None, "")


def test_what_can_not_be_laid_together_is_left() -> None:
    def one_row(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if len(x) > 1:
            raise UnsupportedModelError("the graph holds a number of rows")
        return x

    apart = rt.Signature(SIGNATURE.inputs, (rt.TensorSpec("y", ("length", "batch"), "float32"),))
    assert together(float_model, samples(12), signature=apart) == Together()
    assert together(one_row, samples(12), one_row) == Together()


def test_a_form_that_runs_row_by_row_alone_does_not_pass() -> None:
    def one_row(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if len(x) > 1:
            raise UnsupportedModelError("one row is all that it takes")
        return 2 * x

    assert "one row is all that it takes" in together(one_row, samples(12)).why


def test_samples_of_several_sizes_and_rows_come_apart_again() -> None:
    store = SampleStore("validation")
    for rows, length in ((1, 3), (2, 3), (3, 3), (1, 5), (2, 5), (1, 3)):
        store.add({"x": np.random.default_rng(length * rows).standard_normal((rows, length)).astype(np.float32)}, SIGNATURE, "fake")
    executable = Computing(float_model)
    outputs = in_groups(store, 2, executable.run)
    assert executable.rows == [3, 3, 3, 1]
    for inputs, output in zip(store, outputs, strict=True):
        np.testing.assert_array_equal(output["y"], float_model(inputs["x"]))
    assert together(lambda x: np.float32(2.01) * x, store).why == ""
