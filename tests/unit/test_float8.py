"""FP8 on the torch backend: products that the hardware takes run as one call each, and say what the dequantized graph says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import shared_runtime as rt
from shared_runtime.errors import UnsupportedModelError
from shared_runtime.quantization.gpu import Float8, Float16
from shared_runtime.quantization.samples import SampleStore, read_calibration
from tests.networks import save

torch = pytest.importorskip("torch")
generator = np.random.default_rng(0)
PRODUCT = "Float8MatMul"


def matrix(*shape: int) -> np.ndarray:
    return (generator.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


@pytest.fixture
def layers(tmp_path: Path) -> rt.Model:
    """A product with a bias after it, a Gemm with its own, one whose sides the hardware does not take."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["xa"], "first"),
        helper.make_node("Add", ["xa", "ab"], ["h"], "bias"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "b", "bb"], ["g"], "second", transB=1),
        helper.make_node("MatMul", ["g", "c"], ["gc"], "odd"),
        helper.make_node("Softmax", ["gc"], ["y"], "softmax", axis=1),
    ]
    weights = {"a": matrix(32, 64), "ab": matrix(64), "b": matrix(48, 64), "bb": matrix(48), "c": matrix(48, 5)}
    return rt.load(save(tmp_path / "layers.onnx", nodes, weights, {"x": ["batch", 32]}, {"y": ["batch", 5]}))


@pytest.fixture
def seen(layers: rt.Model) -> SampleStore:
    return calibration(layers)


def calibration(model: rt.Model) -> SampleStore:
    samples = [{"x": generator.standard_normal((4, 32)).astype(np.float32)} for _ in range(16)]
    return read_calibration(samples, model.signature, model.name)


def kinds(executable: Any) -> list[str]:
    return [step.kind for step in executable._program.steps]


def products_near_half_precision(model: rt.Model) -> int:
    """How many products run in FP8, where the outputs are near those of FP16."""
    seen, inputs = calibration(model), {"x": generator.standard_normal((9, 32)).astype(np.float32)}
    executable, exact = Float8(model, seen, "cpu").compile(frozenset(), 1), Float16(model, seen, "cpu").compile(frozenset(), 1)
    reduced, expected = (np.ravel(one.run(inputs)["y"]) for one in (executable, exact))
    assert np.corrcoef(reduced, expected)[0, 1] > 0.99
    return kinds(executable).count(PRODUCT)


def test_products_run_in_float8_and_the_rest_in_half_precision(layers: rt.Model, seen: SampleStore) -> None:
    form = Float8(layers, seen, "cpu")
    assert form.layers == ("first", "second")
    executable, plain = form.compile(frozenset(), 1), Float16(layers, seen, "cpu").compile(frozenset(), 1)
    assert kinds(executable).count(PRODUCT) == 2
    assert kinds(executable).count("MatMul") == 1
    assert not {"Add", "DequantizeLinear"} & set(kinds(executable))
    inputs = {"x": generator.standard_normal((9, 32)).astype(np.float32)}
    exact, reduced = plain.run(inputs)["y"], executable.run(inputs)["y"]
    assert 1e-4 < np.abs(reduced - exact).max() < 0.05  # e4m3 has three bits of mantissa
    assert np.corrcoef(reduced.ravel(), exact.ravel())[0, 1] > 0.99
    executable.specialise(inputs)
    np.testing.assert_allclose(executable.run(inputs)["y"], reduced, atol=1e-6)


def test_the_call_says_what_the_standard_graph_says(layers: rt.Model, seen: SampleStore) -> None:
    form = Float8(layers, seen, "cpu")
    inputs = {"x": generator.standard_normal((9, 32)).astype(np.float32)}
    proto = form.proto(frozenset())
    onnx.checker.check_model(proto, full_check=True)
    values = {item.name: numpy_helper.to_array(item).astype(np.float32) for item in proto.graph.initializer}
    stored = [item for item in proto.graph.initializer if item.data_type == TensorProto.FLOAT8E4M3FN and item.dims]
    assert {item.name.removesuffix("_half_float8") for item in stored} == {"a", "b"}
    scales = [value for name, value in values.items() if name.endswith("_scale")]
    assert all(np.log2(scale) % 1 == 0 for scale in scales)

    def narrowed(x: np.ndarray, source: str) -> np.ndarray:
        kept = torch.from_numpy(x / values[f"{source}_scale"]).clamp(-448, 448).to(torch.float8_e4m3fn)
        return kept.float().numpy() * values[f"{source}_scale"]

    a, b = (values[f"{name}_half_float8"] * values[f"{name}_half_scale"] for name in ("a", "b"))
    first = narrowed(inputs["x"].astype(np.float16).astype(np.float32), "x_half") @ a + values["ab_half"]
    second = narrowed(np.maximum(first.astype(np.float16).astype(np.float32), 0), "r") @ b.T + values["bb_half"]
    logits = second @ values["c_half"]
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    got = form.compile(frozenset(), 1).run(inputs)["y"]
    # Sums are rounded to half precision on the way: now and then a value falls on the next FP8 step.
    assert np.abs(got - expected).max() < 5e-3
    assert np.median(np.abs(got - expected)) < 5e-4


def test_a_reverted_layer_stays_in_half_precision(layers: rt.Model, seen: SampleStore) -> None:
    executable = Float8(layers, seen, "cpu").compile(frozenset({"second"}), 1)
    assert kinds(executable).count(PRODUCT) == 1
    assert kinds(executable).count("Gemm") == 1


def test_a_layer_that_would_overflow_is_not_offered(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"], "first"), helper.make_node("MatMul", ["h", "b"], ["y"], "second")]
    weights = {"a": matrix(32, 32) * 60000, "b": matrix(32, 16) / 60000}
    model = rt.load(save(tmp_path / "hot.onnx", nodes, weights, {"x": ["batch", 32]}, {"y": ["batch", 16]}))
    seen = calibration(model)
    with pytest.raises(UnsupportedModelError, match="multiples of 16"):
        Float8(model, seen, "cpu")


def test_a_weight_that_is_used_both_ways_lies_one_way(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "a"], ["h"], "plain"),
        helper.make_node("Gemm", ["h", "a"], ["y"], "turned", transB=1),
    ]
    model = rt.load(save(tmp_path / "twice.onnx", nodes, {"a": matrix(32, 32)}, {"x": ["batch", 32]}, {"y": ["batch", 32]}))
    assert products_near_half_precision(model) == 1


def test_what_a_product_reads_may_be_read_by_another_kind_of_product(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], "plain"),
        helper.make_node("Gemm", ["x", "b"], ["g"], "halved", alpha=0.5),
        helper.make_node("Add", ["h", "g"], ["y"], "sum"),
    ]
    weights = {"a": matrix(32, 48), "b": matrix(32, 48)}
    model = rt.load(save(tmp_path / "mixed.onnx", nodes, weights, {"x": ["batch", 32]}, {"y": ["batch", 48]}))
    assert products_near_half_precision(model) == 1
