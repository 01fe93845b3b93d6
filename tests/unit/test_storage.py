"""Constants of layers in float: stored in INT8 or half precision, unpacked when an engine loads them, and nothing else changes."""

from __future__ import annotations

import gzip
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import shared_runtime as rt
from shared_runtime.backends.base import backends
from shared_runtime.certificate import Reversion
from shared_runtime.numeric import relative_difference
from shared_runtime.optimize import simplified
from shared_runtime.quantization.forms import BETWEEN
from shared_runtime.quantization.guard import Guard
from shared_runtime.quantization.judge import Judge
from shared_runtime.quantization.onnxruntime_int8 import DynamicInt8, StaticInt8
from shared_runtime.quantization.samples import read_calibration
from shared_runtime.quantization.storage import halve, holds_in_half, int8_and_scale, pack, weights, weighty
from tests.forms import Adding, FakeForm
from tests.networks import save

GENERATOR = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRISCOPE_HOME", str(tmp_path / "home"))


def normal(*shape: int) -> np.ndarray:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def graph() -> onnx.ModelProto:
    """Rows of a table through an LSTM, a product and an addition of numbers that half precision can't hold."""
    nodes = [
        helper.make_node("Gather", ["table", "words"], ["rows"], name="embed"),
        helper.make_node("Transpose", ["rows"], ["steps"], perm=[1, 0, 2], name="turn"),
        helper.make_node("LSTM", ["steps", "w", "r", "b"], ["", "last"], hidden_size=16, name="recur"),
        helper.make_node("Squeeze", ["last", "zero"], ["state"], name="flat"),
        helper.make_node("Gemm", ["state", "g", "bias"], ["product"], transB=1, name="project"),
        helper.make_node("Add", ["product", "large"], ["sum"], name="shift"),
        helper.make_node("QuantizeLinear", ["sum", "step", "none"], ["byte"], axis=1, name="q"),
        helper.make_node("DequantizeLinear", ["byte", "step", "none"], ["y"], axis=1, name="dq"),
    ]
    large = np.full(70, -1e6, np.float32)
    constants = {
        "table": normal(50, 8),
        "w": normal(1, 64, 8),
        "r": normal(1, 64, 16),
        "b": normal(1, 128),
        "zero": np.array([0], np.int64),
        "g": normal(70, 16),
        "bias": normal(70),
        "large": large,
        "step": np.full(70, 1e4, np.float32),
        "none": np.zeros(70, np.int8),
    }
    inputs = [helper.make_tensor_value_info("words", TensorProto.INT64, ["n", 5])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 70]) for name in ("y", "product")]
    made = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(v, k) for k, v in constants.items()])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def graph_without_quantizers() -> onnx.ModelProto:
    proto = graph()
    del proto.graph.node[-2:], proto.graph.output[0]
    return proto


def run(proto: onnx.ModelProto, inputs: dict[str, np.ndarray], optimized: Path | None = None) -> list[np.ndarray]:
    options = ort.SessionOptions()
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, inputs)


@pytest.mark.parametrize(("shape", "channels"), [((8, 4, 3, 3), (0,)), ((4, 8, 3, 3), (1,)), ((4, 2, 6, 3, 3), (0, 1)), ((30, 20), (1,))])
def test_int8_has_a_scale_a_channel(shape: tuple[int, ...], channels: tuple[int, ...]) -> None:
    values = normal(*shape) * np.geomspace(0.1, 10, shape[channels[-1]]).reshape(
        [-1 if a == channels[-1] else 1 for a in range(len(shape))]
    )
    stored, scale = int8_and_scale(values.astype(np.float32), channels)
    assert stored.dtype == np.int8
    assert stored.shape == shape
    assert scale.shape == tuple(n if axis in channels else 1 for axis, n in enumerate(shape))
    assert (np.abs(stored * scale - values) <= 1.01 * scale).all()
    np.testing.assert_array_equal(scale, scale.astype(np.float16))


def test_scales_that_half_precision_would_blur_are_whole() -> None:
    values = normal(4, 300) * np.float32(1e-6)
    stored, scale = int8_and_scale(values, (0,))
    assert (np.abs(stored * scale - values) <= 1.01 * scale).all()
    assert np.abs(scale / (np.abs(values).max(1, keepdims=True) / 127) - 1).max() < 1e-6


def test_a_packed_graph_computes_the_same_and_is_unpacked_when_loaded(tmp_path: Path) -> None:
    proto, inputs = graph(), {"words": GENERATOR.integers(0, 50, (3, 5))}
    before = len(proto.SerializeToString())
    expected = run(proto, inputs)
    channels = {name: axis for node in proto.graph.node if node.name in weighty(proto) for name, axis in weights(node)}
    assert set(channels) == {"table", "w", "r", "g"}
    pack(proto, channels)
    halve(proto)
    onnx.checker.check_model(proto, full_check=True)
    assert len(proto.SerializeToString()) < 0.55 * before
    kinds = {item.name: item.data_type for item in proto.graph.initializer}
    assert kinds["large"] == kinds["step"] == TensorProto.FLOAT, "what half precision can't hold, and scales of other numbers, stay"
    assert kinds["bias_half"] == TensorProto.FLOAT16
    packed = run(proto, inputs, tmp_path / "loaded.onnx")
    np.testing.assert_allclose(packed[1], expected[1], atol=0.15)
    assert not {"Cast", "Mul"} & {node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node}


def test_what_is_not_finite_stays_as_it_is() -> None:
    proto = graph()
    for item in proto.graph.initializer:
        if item.name in ("g", "bias"):
            value = numpy_helper.to_array(item).copy()
            value.flat[3] = np.nan if item.name == "g" else np.inf
            item.CopyFrom(numpy_helper.from_array(value, item.name))
    pack(proto, {"g": 0})
    halve(proto)
    assert {"g", "bias"} <= {item.name for item in proto.graph.initializer}


@pytest.mark.parametrize("make", [StaticInt8, DynamicInt8])
def test_layers_that_a_form_does_not_compute_in_int8_are_stored_in_it(make: type, tmp_path: Path) -> None:
    onnx.save(graph_without_quantizers(), tmp_path / "net.onnx")
    words = [{"words": GENERATOR.integers(0, 50, (1, 5))} for _ in range(8)]
    model = rt.load(tmp_path / "net.onnx", example=words[0])
    base = simplified(model, tmp_path, print)
    form = make(base, read_calibration(words, model.signature, "net")) if make is StaticInt8 else make(base)
    assert "embed" in form.layers

    def stored(form: StaticInt8 | DynamicInt8, reverted: set[str]) -> dict[str, int]:
        return {i.name: i.data_type for i in form.proto(frozenset(reverted)).graph.initializer}

    assert stored(form, set()).get("table_packed", stored(form, set()).get("table_quantized")) == TensorProto.INT8
    assert stored(form, {"embed"})["table_half"] == TensorProto.FLOAT16
    assert stored(form.packed(frozenset({"embed", "project"})), {"embed", "project", BETWEEN})["table_packed"] == TensorProto.INT8
    with rt.Session(model, variant="float32", plans=tmp_path / "plans", threads=1) as session:
        expected = session.run(words[0])["product"]
    every = frozenset(form.layers)
    np.testing.assert_allclose(form.compile(every, 1).run(words[0])["product"], expected, atol=1e-2)
    np.testing.assert_allclose(form.packed(every).compile(every, 1).run(words[0])["product"], expected, atol=0.15)


def test_transposed_convolutions_in_groups_do_not_end_int8(tmp_path: Path) -> None:
    """ONNX Runtime's quantizer fails on them; the others are computed in INT8."""
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"], pads=[1, 1, 1, 1], name="down"),
        helper.make_node("ConvTranspose", ["h", "b", "bias"], ["y"], strides=[2, 2], group=4, name="up"),
    ]
    constants = {"a": normal(32, 3, 3, 3), "b": normal(32, 8, 2, 2), "bias": normal(32)}
    shapes = {"x": ["n", 3, 16, 16], "y": ["n", 32, 32, 32]}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    made = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(v, k) for k, v in constants.items()])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "up.onnx")
    model = rt.load(tmp_path / "up.onnx")
    data = [{"x": normal(1, 3, 16, 16)} for _ in range(8)]
    form = StaticInt8(simplified(model, tmp_path, print), read_calibration(data, model.signature, "up"))
    assert {item.name for item in form.proto(frozenset()).graph.initializer} >= {"a_quantized", "b_packed"}
    with rt.Session(model, variant="float32", plans=tmp_path / "plans", threads=1) as session:
        expected = session.run(data[0])["y"]
    assert relative_difference(form.compile(frozenset(), 1).run(data[0])["y"], expected) < 0.03


@pytest.mark.parametrize("kind", ["Conv", "InstanceNormalization"])
def test_a_shared_bias_whose_number_is_another_tensor_s_name(kind: str, tmp_path: Path) -> None:
    """ONNX Runtime's quantizer calls its copies bias0, bias1, ...: `bias1` is the second layer's output."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "v"], ["c"], name="begin"),
        helper.make_node(kind, ["c", "a", "bias"], ["bias0"], name="first"),
        helper.make_node("Neg", ["bias0"], ["h"], name="turn"),
        helper.make_node(kind, ["h", "b", "bias"], ["bias1"], name="second"),
        helper.make_node("Transpose", ["bias1"], ["y"], perm=[0, 2, 3, 1], name="last"),
    ]
    constants = {name: normal(16, 16, 1, 1) if kind == "Conv" else normal(16) for name in "ab"}
    constants |= {"w": normal(16, 3, 1, 1), "v": normal(16), "bias": normal(16)}
    model = rt.load(save(tmp_path / "bias.onnx", nodes, constants, {"x": ["n", 3, 16, 16]}, {"y": ["n", 16, 16, 16]}))
    data = [{"x": normal(1, 3, 16, 16)} for _ in range(8)]
    form = StaticInt8(simplified(model, tmp_path, print), read_calibration(data, model.signature, "bias"))
    with rt.Session(model, variant="float32", plans=tmp_path / "plans", threads=1) as session:
        expected = session.run(data[0])["y"]
    assert relative_difference(form.compile(frozenset(), 1).run(data[0])["y"], expected) < 0.1


def test_a_constant_that_a_node_reads_twice(tmp_path: Path) -> None:
    """Of a fresh BatchNorm torch's exporter stores weight and variance (ones) once, and bias and mean (zeros)."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="begin"),
        helper.make_node("Relu", ["c"], ["r"], name="between"),
        helper.make_node("BatchNormalization", ["r", "one", "zero", "zero", "one"], ["n1"], name="first"),
        helper.make_node("Transpose", ["n1"], ["t"], perm=[0, 1, 3, 2], name="turn"),
        helper.make_node("BatchNormalization", ["t", "one", "zero", "zero", "one"], ["y"], name="second"),
    ]
    constants = {"w": normal(16, 3, 1, 1), "one": np.ones(16, np.float32), "zero": np.zeros(16, np.float32)}
    model = rt.load(save(tmp_path / "norm.onnx", nodes, constants, {"x": ["n", 3, 16, 16]}, {"y": ["n", 16, 16, 16]}))
    data = [{"x": normal(1, 3, 16, 16)} for _ in range(8)]
    form = StaticInt8(model, read_calibration(data, model.signature, "norm"))
    names = [item.name for item in onnx.load(form._prepared).graph.initializer]
    assert len(set(names)) == len(names)
    reference = backends()["onnxruntime"].compile(model, "cpu", 1)
    assert relative_difference(form.compile(frozenset(), 1).run(data[0])["y"], reference.run(data[0])["y"]) < 0.05


def test_openvino_takes_layers_back_to_float_that_nncf_smoothed(tmp_path: Path) -> None:
    """Before, a product's own weights met an input that was still scaled for others."""
    openvino_int8 = pytest.importorskip("shared_runtime.quantization.openvino_int8")
    pytest.importorskip("nncf")
    model = rt.load("fraud-sequence")
    data = [
        {"sequence": np.abs(normal(1, 8, 26)) * np.geomspace(1, 100, 26, dtype=np.float32), "mask": np.ones((1, 8), np.float32)}
        for _ in range(12)
    ]
    form = openvino_int8.OpenVinoInt8(simplified(model, tmp_path, print), read_calibration(data, model.signature, "sequence"))
    with rt.Session(model, variant="float32", plans=tmp_path / "plans", threads=1) as session:
        expected = np.array([session.run(inputs)["logit"][0, ...].item() for inputs in data])

    def error(form: openvino_int8.OpenVinoInt8, reverted: frozenset[str]) -> float:
        executable = form.compile(reverted, 1)
        found = np.array([executable.run(inputs)["logit"].item() for inputs in data])
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    every = frozenset(form.layers)
    assert error(form, every) < 1e-3
    assert 1e-3 < error(form.packed(every), every) < 0.05
    for layer in form.layers:
        assert error(form, frozenset((layer,))) < 0.05
    sizes = {}
    for name, kept in (("packed", form.packed(every)), ("half", form)):
        (tmp_path / name).mkdir()
        kept.save(every, tmp_path / name)
        sizes[name] = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
    assert sizes["packed"] < 0.3 * model.graph.stat().st_size < sizes["half"] < 0.55 * model.graph.stat().st_size


def test_every_int8_form_of_the_sequence_network_is_below_a_third(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    model = rt.load("fraud-sequence")
    data = [
        {"sequence": np.abs(normal(1, 8, 26)) * np.geomspace(1, 100, 26, dtype=np.float32), "mask": np.ones((1, 8), np.float32)}
        for _ in range(32)
    ]
    made = rt.optimize(model, calibration=data, metric=rt.metrics.correlation, precisions=("int8",), device="cpu", threads=1, budget_s=60)
    certificates = [made.certificate(name) for name in made.variants]
    assert {"int8-onnxruntime", "int8-weights", "int8-openvino"} <= {c.variant for c in certificates}
    for certificate in certificates:
        assert certificate.bytes <= 0.3 * certificate.float_bytes, certificate.variant
        assert set(certificate.packed) <= {r.layer for r in certificate.reverted if isinstance(r, Reversion)}
        assert rt.verify(made, certificate.variant, threads=1)["holds"]


class Harmful(FakeForm):
    """A form whose layers do known harm in INT8, and less with weights alone in it."""

    stored: frozenset[str] = frozenset()

    def __init__(self, whole: dict[str, float], weights: dict[str, float], kept: frozenset[str] = frozenset()) -> None:
        super().__init__(whole)
        self._whole, self._weights, self._kept = whole, weights, kept

    def packed(self, layers: frozenset[str]) -> Harmful:
        return Harmful(self._whole, self._weights, layers)

    def compile(self, reverted: frozenset[str], threads: int) -> Any:
        packed = reverted & self._kept
        reduced = [name for name in self.layers if name not in reverted]
        harm = sum(self._whole[name] for name in reduced) + sum(self._weights[name] for name in packed)
        return Adding(harm)


@pytest.mark.parametrize(("room", "expected"), [(1.0, {"a", "b", "c"}), (0.35, {"b", "c"}), (0.05, set())])
def test_the_guard_stores_as_many_weights_in_int8_as_pass(room: float, expected: set[str]) -> None:
    signature = rt.Signature(*((rt.TensorSpec(name, ("batch", 2), "float32"),) for name in "xy"))
    samples = read_calibration([{"x": normal(1, 2)} for _ in range(6)], signature, "fake")
    reference = [{"y": inputs["x"]} for inputs in samples]

    def closeness(outputs: Any, targets: Any) -> float:
        return -max(float(np.abs(o["y"] - t["y"]).max()) for o, t in zip(outputs, targets, strict=True))

    form = Harmful({"a": 9.0, "b": 8.0, "c": 7.0, "d": 0.01}, {"a": 0.5, "b": 0.15, "c": 0.15, "d": 0.0})
    judge = Judge(reference, samples, reference, closeness, 0.011 + room)
    found = Guard(form, judge, Adding(0.0), 1, 30).search()
    assert found.passed
    assert found.layers == {"a", "b", "c"}
    assert set(found.packed) == expected
    assert found.verdict.drop == pytest.approx(0.01 + sum({"a": 0.5, "b": 0.15, "c": 0.15}[name] for name in expected), abs=1e-5)


def test_descriptions_of_networks_that_earlier_versions_packed_are_read(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    from shared_runtime.backends.openvino import read_network, save_network

    save_network(openvino.Core().read_model(graph_without_quantizers().SerializeToString()), tmp_path / "model.xml.xz")
    text = lzma.decompress((tmp_path / "model.xml.xz").read_bytes())
    (tmp_path / "model.xml.gz").write_bytes(gzip.compress(text))
    names = [{port.any_name for port in read_network(tmp_path / f"model.xml.{kind}").outputs} for kind in ("gz", "xz")]
    assert names[0] == names[1] == {"product"}


def test_layers_that_are_only_stored_in_int8_are_not_slower_than_in_float() -> None:
    class Timed(Harmful):
        def layer_times(self, reverted: frozenset[str], threads: int) -> dict[str, float]:
            raise AssertionError("nothing is computed in INT8")

    signature = rt.Signature(*((rt.TensorSpec(name, ("batch", 2), "float32"),) for name in "xy"))
    samples = read_calibration([{"x": normal(1, 2)} for _ in range(3)], signature, "fake")
    reference = [{"y": inputs["x"]} for inputs in samples]
    form = Timed({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0})
    form.stored = frozenset(form.layers)
    found = Guard(form, Judge(reference, samples, reference, lambda o, t: 1.0, 0.01), Adding(0.0), 1, 30).search()
    assert found.passed
    assert not found.reverted


def test_a_channel_of_zeros_leaves_the_scales_of_the_others_in_half_precision() -> None:
    values = normal(8, 40)
    values[3] = 0
    stored, scale = int8_and_scale(values, (0,))
    assert not stored[3].any()
    assert holds_in_half(scale, each=True)


QUANTIZED = """
import sys
import numpy as np
import shared_runtime as rt
from pathlib import Path
from tests.networks import classifier
model = rt.load(classifier(Path(sys.argv[1]), False))
calibration = [model.signature.random(1, seed=i) for i in range(8)]
rt.optimize(model, calibration=calibration, metric=rt.metrics.correlation, max_drop=0.9, threads=1, precisions=["int8"], report=print)
print("nncf" in sys.modules, sys.modules.get("openvino_telemetry"))
"""


def test_nncf_reports_nothing_to_its_maker(tmp_path: Path) -> None:
    """In a process of its own: under pytest it never does. It would leave its mark in the home folder."""
    pytest.importorskip("nncf")
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "TRISCOPE_HOME": str(tmp_path / "triscope"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", QUANTIZED, str(tmp_path / "c.onnx")]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "True None"
    assert not (tmp_path / "intel").exists()
