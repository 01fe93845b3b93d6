"""Ranges over a calibration set: masks without end, first samples that are nearly blank, and what is quantized then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import shared_runtime as rt
from shared_runtime.backends.base import backends
from shared_runtime.quantization.onnxruntime_int8 import StaticInt8
from shared_runtime.quantization.ranges import METHODS, measure_ranges
from shared_runtime.quantization.samples import SampleStore, hold_out, read_calibration
from tests.networks import save

GENERATOR = np.random.default_rng(0)


def attention(path: Path, masked: float) -> rt.Model:
    """Scores of eight places, those where `keep` is 0 set to `masked`, their softmax, and a product with values."""
    nodes = [
        helper.make_node("MatMul", ["x", "q"], ["queries"], name="queries"),
        helper.make_node("MatMul", ["x", "k"], ["keys"], name="keys"),
        helper.make_node("Transpose", ["keys"], ["turned"], perm=[0, 2, 1], name="turn"),
        helper.make_node("MatMul", ["queries", "turned"], ["scores"], name="scores"),
        helper.make_node("Cast", ["keep"], ["kept"], to=onnx.TensorProto.BOOL, name="cast"),
        helper.make_node("Where", ["kept", "zero", "none"], ["mask"], name="where"),
        helper.make_node("Add", ["scores", "mask"], ["masked"], name="add"),
        helper.make_node("Softmax", ["masked"], ["weights"], axis=-1, name="softmax"),
        helper.make_node("MatMul", ["weights", "x"], ["mixed"], name="mix"),
        helper.make_node("MatMul", ["mixed", "o"], ["y"], name="out"),
    ]
    weights = {name: (GENERATOR.standard_normal((16, 16)) / 4).astype(np.float32) for name in "qko"}
    weights |= {"zero": np.zeros(1, np.float32), "none": np.array([masked], np.float32)}
    save(path, nodes, weights, {"x": ["batch", 8, 16], "keep": ["batch", 1, 8]}, {"y": ["batch", 8, 16]})
    return rt.load(path)


def tokens(count: int) -> list[dict[str, np.ndarray]]:
    lengths = GENERATOR.integers(2, 8, count)
    return [
        {
            "x": GENERATOR.standard_normal((1, 8, 16)).astype(np.float32),
            "keep": (np.arange(8)[None, None] < length).astype(np.float32),
        }
        for length in lengths
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masked", [-np.inf, float(np.finfo(np.float32).min), -1e9])
def test_attention_with_a_mask_is_quantized_around_it(masked: float, method: str, tmp_path: Path) -> None:
    model, samples = attention(tmp_path / "net.onnx", masked), tokens(24)
    form = StaticInt8(model, read_calibration(samples, model.signature, "net"), method)
    assert {"queries", "keys", "out"} <= set(form.layers)
    quantized = form.compile(frozenset(), 1)
    reference = backends()["onnxruntime"].compile(model, "cpu", 1)
    for sample in samples[:6]:
        expected, found = reference.run(sample)["y"], quantized.run(sample)["y"]
        assert np.isfinite(found).all()
        assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.95
    kinds = [node.op_type for node in form.proto(frozenset()).graph.node]
    assert kinds.count("DequantizeLinear") > 8, "the products are quantized"


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_a_nearly_blank_first_sample_costs_no_memory(method: str, tmp_path: Path) -> None:
    """ONNX Runtime's own collector asks for a thousand million bins here."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="first"), helper.make_node("Relu", ["h"], ["y"], name="relu")]
    save(tmp_path / "net.onnx", nodes, {"w": np.eye(64, dtype=np.float32)}, {"x": ["batch", 64]}, {"y": ["batch", 64]})
    model = rt.load(tmp_path / "net.onnx")
    bright = [{"x": GENERATOR.uniform(-1, 1, (1, 64)).astype(np.float32)} for _ in range(32)]
    dark = [{"x": 1e-7 * sample["x"]} for sample in bright[:4]]

    def width(samples: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        store: SampleStore = read_calibration(samples, model.signature, "net")
        return np.array(measure_ranges(model.graph, store, method, tmp_path).data["x"].range_value)

    np.testing.assert_allclose(width(dark + bright), width(bright), atol=0.1)


def test_a_dict_of_batches_is_a_calibration_set(tmp_path: Path) -> None:
    model, samples = attention(tmp_path / "net.onnx", -np.inf), tokens(20)
    batch = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
    store = read_calibration(batch, model.signature, "net")
    assert (len(store), store.rows) == (1, 20)
    kept, apart = hold_out(store, model.signature, "net")
    assert (len(kept), len(apart)) == (15, 5)
