"""The planner's checks: what an engine computes for one row it has to compute for many, and for sizes that it was told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

import shared_runtime as rt
from shared_runtime.certificate import Certificate, DataDigest
from shared_runtime.signature import Tensors
from shared_runtime.variants import Variant, VariantFacts
from tests.engines import Engine, plan_with
from tests.networks import save


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """y = 2 x + 1 over (batch, 3)."""
    nodes = [helper.make_node("Mul", ["x", "two"], ["m"]), helper.make_node("Add", ["m", "one"], ["y"])]
    weights = {"two": np.float32([2]), "one": np.float32([1])}
    return save(tmp_path / "linear.onnx", nodes, weights, {"x": ["batch", 3]}, {"y": ["batch", 3]})


def test_one_that_is_wrong_for_many_rows_loses(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Engine):
        def run(self, inputs: Tensors) -> Tensors:
            outputs = super().run(inputs)
            outputs["y"][30:] = 0
            return outputs

    wrong = Wrong("wrong", 0, 1)
    plan = plan_with(monkeypatch, linear, [Engine("onnxruntime", 0, 60), wrong])
    assert plan.backend == "onnxruntime"
    assert next(c.lost for c in plan.candidates if c.backend == "wrong").startswith("32 rows differ from the reference by ")
    assert wrong.closed


def test_rows_that_depend_on_each_other_are_no_fault(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mixing(Engine):
        def run(self, inputs: Tensors) -> Tensors:
            return {"y": super().run(inputs)["y"] + np.float32(len(inputs["x"]))}

    assert plan_with(monkeypatch, linear, [Mixing("onnxruntime", 0, 60), Mixing("quick", 0, 1)]).backend == "quick"


def test_one_row_is_not_left_to_one_thread_of_several(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream may look fastest for one row while others keep the second core busy."""

    class Streaming(Engine):
        def modes(self, device: str) -> tuple[str, ...]:
            return ("", "streams")

        def compile(self, model: rt.Model, device: str, threads: int, variant: Any = None, mode: str = "") -> Engine:
            return Engine(self.name, 0, 10 if mode else 30)

    monkeypatch.setattr("shared_runtime.planning.contenders.LARGE", 1)
    plan = plan_with(monkeypatch, linear, [Engine("onnxruntime", 0, 90), Streaming("engine", 0, 0)], threads=2)
    whole, streams = (plan.candidates[plan.ladder[place].candidate] for place in (0, -1))
    assert (whole.backend, whole.mode, streams.mode) == ("engine", "", "streams")
    assert whole.median_ms is not None
    assert streams.median_ms is not None
    assert streams.median_ms < whole.median_ms


class Reduced(Engine):
    """An engine that is `offset` off in INT8, and `prepared` off once it was told the sizes of its inputs."""

    def __init__(self, offset: float, prepared: float) -> None:
        super().__init__("quick", offset, 1)
        self._prepared = prepared

    def compile(self, model: rt.Model, device: str, threads: int, variant: Any = None, mode: str = "") -> Engine:
        return Reduced(self.offset, self._prepared) if variant is not None else Engine("quick", 0, 90)

    def specialise(self, inputs: Tensors) -> None:
        self.offset = self._prepared


def reduced(model: Path, probe_error: float) -> rt.Model:
    """The model with a certified INT8 form of the engine `quick`."""
    loaded, digest = rt.load(model), DataDigest(1, 1, "")
    certificate = Certificate(
        model=loaded.name,
        sha256=loaded.sha256,
        variant="int8-quick",
        precision="int8",
        files={},
        metric="agreement",
        before=1,
        after=1,
        drop=0,
        drop_interval=(0, 0),
        max_drop=0.005,
        slices={},
        calibration=digest,
        validation=digest,
        probe_error=probe_error,
    )
    return replace(loaded, known={"int8-quick": Variant(VariantFacts("int8-quick", "int8", "quick", "cpu"), model.parent, certificate)})


@pytest.mark.parametrize("certified", [0.01, 0.3])
@pytest.mark.parametrize(("offset", "prepared", "taken"), [(0.01, 0.01, True), (0.3, 0.3, True), (0.01, 1.5, False)])
def test_a_form_that_is_wrong_once_it_knows_the_sizes_loses(
    certified: float, offset: float, prepared: float, taken: bool, linear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one that is further off on these inputs than on the certificate's, whether it knows their sizes or not."""
    plan = plan_with(monkeypatch, reduced(linear, certified), [Engine("onnxruntime", 0, 60), Reduced(offset, prepared)])
    assert (plan.variant == "int8-quick") == taken
    lost = next(c.lost for c in plan.candidates if c.variant == "int8-quick")
    assert lost == "" if taken else "differ from the reference" in lost
