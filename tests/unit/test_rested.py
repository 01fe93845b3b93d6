"""Threads that sleep between runs are left to spin where waking them costs much."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

import shared_runtime as rt
from shared_runtime.planning import contenders, rested
from tests.networks import save


@pytest.mark.parametrize("gain", [1.1, 2.0])
def test_the_twin_that_spins_takes_over_where_it_is_worth_it(gain: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator is one that ONNX Runtime alone has, so that it is the one to win."""
    monkeypatch.setitem(contenders.TOO_LONG, "spinning", (1e-9, "never from the start"))
    monkeypatch.setattr(rested, "LONGEST_SECONDS", float("inf"))
    monkeypatch.setattr(rested, "_rested", lambda runs, inputs: [gain * 1e-3, 1e-3])
    weights = {"w": np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Det", ["h"], ["y"])]
    model = rt.load(save(tmp_path / "det.onnx", nodes, weights, {"x": ["n", 1024, 1024]}, {"y": ["n"]}))
    x = np.random.default_rng(1).standard_normal((1, 1024, 1024)).astype(np.float32) / 1e3
    with rt.Session(model, plans=tmp_path / "plans", threads=2, ladder=(1,), probe={"x": x}, objective="latency") as session:
        y = session.run({"x": x})["y"]
        first, *others = session.plan.candidates
        why = [c for c in others if "of rest it takes" in c.lost]
    assert np.isfinite(y).all()
    if first.threads == 1:
        pytest.skip("one thread was the faster here")
    assert first.mode == ("spinning" if gain > rested.WORTH else "")
    assert bool(why) == (gain > rested.WORTH)
    assert first.label not in [c.label for c in others]
