"""What is left in float stays in float: beside quantized neighbours, with shared weights, and in the arithmetic of statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

import shared_runtime as rt
from shared_runtime.backends.onnxruntime import compile_file
from shared_runtime.graph.check import float_between_quantized
from shared_runtime.graph.lean import lean
from shared_runtime.graph.passes.base import plain_session
from shared_runtime.quantization.onnxruntime_int8 import StaticInt8
from shared_runtime.quantization.openvino_int8 import OpenVinoInt8
from shared_runtime.quantization.samples import read_calibration
from tests.networks import save

CHANNELS, SIDE = 8, 12


def _images(count: int) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [{"x": generator.uniform(-1, 1, (1, CHANNELS, SIDE, SIDE)).astype(np.float32)} for _ in range(count)]


def _uneven(outputs: int = CHANNELS) -> np.ndarray:
    """Weights of a convolution whose channels differ a thousandfold: one scale for all leaves nothing of the small ones."""
    generator = np.random.default_rng(1)
    weights = generator.standard_normal((outputs, CHANNELS, 3, 3)) * np.geomspace(1e-3, 1, outputs)[:, None, None, None]
    return weights.astype(np.float32)


def _convolutions(path: Path) -> Path:
    """Three in a row, the last two of the same weights."""
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], "one", pads=[1] * 4),
        helper.make_node("Conv", ["a", "shared"], ["b"], "two", pads=[1] * 4),
        helper.make_node("Conv", ["b", "shared"], ["y"], "three", pads=[1] * 4),
    ]
    weights = {"first": _uneven()[::-1].copy(), "shared": _uneven()}
    shape = ["batch", CHANNELS, SIDE, SIDE]
    return save(path, nodes, weights, {"x": shape}, {"y": shape})


def _run(session: ort.InferenceSession, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(session.run(["y"], inputs)[0])


def _float_between_quantized(path: Path) -> Path:
    """A convolution with float weights from one quantized tensor to another."""
    quantizers = {"scale": np.float32(1 / 64), "zero": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("Conv", ["xd", "w"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("QuantizeLinear", ["c", "scale", "zero"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "scale", "zero"], ["y"]),
    ]
    shape = ["batch", CHANNELS, SIDE, SIDE]
    return save(path, nodes, {**quantizers, "w": _uneven()}, {"x": shape}, {"y": shape})


def test_a_float_layer_between_quantized_tensors_is_computed_in_float(tmp_path: Path) -> None:
    """ONNX Runtime as installed rounds its weights to INT8 with one scale for all channels."""
    path = _float_between_quantized(tmp_path / "q.onnx")
    assert float_between_quantized(path)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = _run(ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]), _images(1)[0])
    installed = _run(ort.InferenceSession(path, providers=["CPUExecutionProvider"]), _images(1)[0])
    executable = compile_file("q", path, "cpu", 1, "int8")
    ours = executable.run(_images(1)[0])["y"]
    executable.close()
    assert np.mean(ours != expected) < 0.01
    assert np.mean(installed != expected) > 0.02  # else this test would show nothing
    np.testing.assert_array_equal(_run(plain_session(path, optimised=True), _images(1)[0]), ours)  # what imports are compared by


def test_graphs_without_such_a_layer_are_not_suspected(tmp_path: Path) -> None:
    assert not float_between_quantized(_convolutions(tmp_path / "float.onnx"))
    model = rt.load(_convolutions(tmp_path / "net.onnx"))
    form = StaticInt8(model, read_calibration(_images(4), model.signature, "net"))
    onnx.save(form.proto(frozenset()), tmp_path / "all.onnx")
    onnx.save(form.proto(frozenset({"two"})), tmp_path / "two.onnx")
    assert not float_between_quantized(tmp_path / "all.onnx")
    assert float_between_quantized(tmp_path / "two.onnx")


def test_a_layer_put_back_has_its_own_weights_though_another_shares_them(tmp_path: Path) -> None:
    model = rt.load(_convolutions(tmp_path / "net.onnx"))
    form = StaticInt8(model, read_calibration(_images(4), model.signature, "net"))
    proto = form.proto(frozenset({"three"}))
    makers = {output: node for node in proto.graph.node for output in node.output}
    nodes = {node.name: node for node in proto.graph.node}
    assert makers[nodes["two"].input[1]].op_type == "DequantizeLinear"
    source = makers[nodes["three"].input[1]]
    assert source.op_type == "Cast"
    constant = next(item for item in proto.graph.initializer if item.name == source.input[0])
    np.testing.assert_allclose(numpy_helper.to_array(constant).astype(np.float32), _uneven(), rtol=1e-3, atol=1e-6)


def test_a_saved_graph_holds_equal_constants_once(tmp_path: Path) -> None:
    model = rt.load(_convolutions(tmp_path / "net.onnx"))
    form = StaticInt8(model, read_calibration(_images(4), model.signature, "net"))
    proto = form.proto(frozenset())

    def count() -> int:
        return sum(len(item.dims) == 4 for item in proto.graph.initializer)

    before = _run(ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]), _images(1)[0])
    assert count() == 3
    lean(proto)
    assert count() == 2
    np.testing.assert_array_equal(
        before, _run(ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]), _images(1)[0])
    )


def test_statistics_are_not_reduced(tmp_path: Path) -> None:
    """A spread is the small difference of two large means: in eight bits it is noise, or the root of a negative number."""
    pytest.importorskip("nncf")
    axes = {"axes": np.array([2, 3], np.int64), "two": np.float32(2), "none": np.float32(0)}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("ReduceMean", ["c", "axes"], ["mean"], "mean", keepdims=0),
        helper.make_node("Pow", ["c", "two"], ["square"], "square"),
        helper.make_node("ReduceMean", ["square", "axes"], ["squares"], "squares", keepdims=0),
        helper.make_node("Pow", ["mean", "two"], ["squared"], "squared"),
        helper.make_node("Sub", ["squares", "squared"], ["variance"], "variance"),
        helper.make_node("Max", ["variance", "none"], ["positive"], "positive"),
        helper.make_node("Sqrt", ["positive"], ["y"], "root"),
    ]
    generator = np.random.default_rng(2)
    weights = {"w": (0.01 * generator.standard_normal((16, CHANNELS, 3, 3))).astype(np.float32), "b": np.full(16, 3, np.float32)}
    shape = ["batch", CHANNELS, SIDE, SIDE]
    model = rt.load(save(tmp_path / "net.onnx", nodes, {**axes, **weights}, {"x": shape}, {"y": ["batch", 16]}, opset=18))
    form = OpenVinoInt8(model, read_calibration(_images(8), model.signature, "net"))
    assert "conv" in form.layers[0]
    executable = form.compile(frozenset(), 1)
    reference = ort.InferenceSession(str(model.graph), providers=["CPUExecutionProvider"])
    for inputs in _images(3):
        expected = _run(reference, inputs)
        np.testing.assert_allclose(executable.run(inputs)["y"], expected, rtol=0.1)
        assert 0.01 < expected.mean() < 0.5
    executable.close()


def test_a_softmax_that_is_sharper_than_any_it_was_calibrated_on(tmp_path: Path) -> None:
    """ONNX Runtime's in INT8 wraps around where a share is above those of the calibration set."""
    generator, width = np.random.default_rng(0), 16
    weights = {name: (generator.standard_normal((width, width)) / 4).astype(np.float32) for name in ("wq", "wk", "wv", "wo")}
    nodes = [
        *(helper.make_node("MatMul", ["x", f"w{name}"], [name], f"layer {name}") for name in "qkv"),
        helper.make_node("Transpose", ["k"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "turned"], ["scores"], "scores"),
        helper.make_node("Softmax", ["scores"], ["shares"], "softmax", axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["seen"], "seen"),
        helper.make_node("MatMul", ["seen", "wo"], ["y"], "output"),
    ]
    model = rt.load(save(tmp_path / "attention.onnx", nodes, weights, {"x": ["batch", "length", width]}, {"y": ["batch", "length", width]}))
    data = [{"x": generator.standard_normal((1, 40, width)).astype(np.float32)} for _ in range(8)]
    form = StaticInt8(model, read_calibration(data, model.signature, model.name))
    proto = form.proto(frozenset())
    quantized = {name for node in proto.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    assert not any(node.input[0] in quantized for node in proto.graph.node if node.op_type == "Softmax")
    assert any(node.input[0] in quantized for node in proto.graph.node if node.name == "seen")
    executable = form.compile(frozenset(), 1)
    short = {"x": data[0]["x"][:, :1]}
    expected = plain_session(model.graph).run(None, short)[0]
    np.testing.assert_allclose(executable.run(short)["y"], plain_session(proto).run(None, short)[0], atol=0.1)
    assert np.linalg.norm(executable.run(short)["y"]) > 0.2 * np.linalg.norm(expected), "what all attention is on counts"
