"""INT8 graphs that others quantized use all of a byte: processors without VNNI must not saturate on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import shared_runtime as rt
from shared_runtime.backends.base import backends
from shared_runtime.backends.onnxruntime import _options as onnxruntime_options
from shared_runtime.backends.openvino import compile_graph, read_network
from shared_runtime.backends.openvino_mends import fills_bytes
from shared_runtime.graph.check import EXACT_BYTES, session_source
from shared_runtime.host import host
from shared_runtime.model import ModelRepository
from shared_runtime.quantization.catalogue import PRECISIONS, forms_for
from shared_runtime.quantization.samples import read_calibration
from tests.networks import save

WIDTH, ROWS = 64, 8
SCALE = np.float32(1 / 255)
FORMS = ["bytes", "Gemm", "signed", "rounded floats", "unsigned weights", "linear", "integer"]
"""Weights in S8; those of a Gemm that leaves out zero points; signed activations; weights as floats that are rounded, or in U8; operators
on bytes and on integers."""


def quantized(form: str, folder: Path, top: int = 128) -> Path:
    """A matrix product whose neighbouring products do not fit in 16 bits where weights lie near `top` levels."""
    weight = np.random.default_rng(0).integers(top // 2, top, (WIDTH, WIDTH)).astype(np.int8)
    signed = np.int8(0) if form == "signed" else np.uint8(0)
    weights = {
        "scale": SCALE,
        "zero": np.array(signed),
        "weight": weight,
        "step": np.full(WIDTH, 1 / 127, np.float32),
        "none": np.zeros(WIDTH, np.int8),
        "out_scale": np.float32(0.25),
        "out_zero": np.array(signed),
    }
    node = helper.make_node
    nodes = [node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]), node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"])]
    product = node("Gemm" if form == "Gemm" else "MatMul", ["xd", "wd"], ["product"])
    outer = [
        node("QuantizeLinear", ["product", "out_scale", "out_zero"], ["yq"]),
        node("DequantizeLinear", ["yq", "out_scale", "out_zero"], ["y"]),
    ]
    if form == "rounded floats":
        weights["weight"] = weight.astype(np.float32) / 127
        nodes.append(node("QuantizeLinear", ["weight", "step", "none"], ["wq"], axis=1))
        nodes += [node("DequantizeLinear", ["wq", "step", "none"], ["wd"], axis=1), product, *outer]
    elif form == "unsigned weights":
        weights["weight"], weights["none"] = (weight.astype(np.int16) + 128).astype(np.uint8), np.full(WIDTH, 128, np.uint8)
        nodes += [node("DequantizeLinear", ["weight", "step", "none"], ["wd"], axis=1), product, *outer]
    elif form == "linear":
        names = ["xq", "scale", "zero", "weight", "step", "none", "out_scale", "out_zero"]
        nodes = [nodes[0], node("QLinearMatMul", names, ["yq"]), outer[1]]
    elif form == "integer":
        weights["none"] = np.zeros((), np.int8)
        nodes = [
            node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
            node("MatMulInteger", ["xq", "weight", "xz", "none"], ["sum"]),
            node("Cast", ["sum"], ["product"], to=TensorProto.FLOAT),
            node("Mul", ["product", "xs"], ["scaled"]),
            node("Mul", ["scaled", "step"], ["y"]),
        ]
    else:
        nodes += [node("DequantizeLinear", ["weight", "step", "none"][: 2 if form == "Gemm" else 3], ["wd"], axis=1), product, *outer]
    read = {name for each in nodes for name in each.input}
    constants = {name: np.asarray(value) for name, value in weights.items() if name in read}
    return save(folder / "product.onnx", nodes, constants, {"x": ["batch", WIDTH]}, {"y": ["batch", WIDTH]}, opset=19)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
def test_bytes_of_full_range_do_not_saturate(name: str, form: str, tmp_path: Path) -> None:
    backend = backends()[name]
    if not backend.availability("cpu").available:
        pytest.skip(f"{name} is not there")
    path = quantized(form, tmp_path)
    x = np.random.default_rng(1).uniform(0.5, 1, (ROWS, WIDTH)).astype(np.float32) - (0.5 if form == "signed" else 0)
    (expected,) = ReferenceEvaluator(onnx.load(path)).run(None, {"x": x})
    try:
        executable = backend.compile(rt.load(path), "cpu", 1)
    except rt.UnsupportedModelError as error:
        if name == "onnxruntime":
            raise
        pytest.skip(str(error))
    np.testing.assert_allclose(executable.run({"x": x})["y"], expected, rtol=1e-5, atol=0.26)


@pytest.mark.parametrize(("form", "top", "full"), [*((form, 128, True) for form in FORMS[:5]), ("bytes", 64, False)])
def test_openvino_is_told_of_weights_that_take_more_than_half_a_byte(form: str, top: int, full: bool, tmp_path: Path) -> None:
    assert fills_bytes(read_network(quantized(form, tmp_path, top))) is full


@pytest.mark.parametrize(
    ("vector", "saturates"), [(("avx2",), True), (("avx2", "avx512f"), True), (("avx2", "avx_vnni"), False), ((), False)]
)
def test_a_host_saturates_without_vnni(vector: tuple[str, ...], saturates: bool) -> None:
    assert replace(host(), vector=vector).saturates is saturates


@pytest.mark.parametrize(("top", "level"), [(128, "NO"), (64, None)])
def test_engines_are_told_of_a_processor_that_saturates(
    top: int, level: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = replace(host(), vector=("avx2", "fma"))
    monkeypatch.setattr("shared_runtime.backends.onnxruntime.host", lambda: old)
    monkeypatch.setattr("shared_runtime.backends.openvino.host", lambda: old)
    assert onnxruntime_options(1).get_session_config_entry(EXACT_BYTES) == "1"
    compiled = compile_graph("product", quantized("bytes", tmp_path, top), ["y"], 1, "float32", "int8")
    assert compiled._properties.get("LP_TRANSFORMS_MODE") == level


@pytest.mark.parametrize("whole", [False, True])
def test_zero_points_that_a_gemm_leaves_out_are_given_where_bytes_saturate(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = quantized("Gemm", tmp_path)
    source = onnx.load(path) if whole else path
    old, new = replace(host(), vector=("avx2",)), replace(host(), vector=("avx2", "avx_vnni"))
    monkeypatch.setattr("shared_runtime.graph.check.host", lambda: new)
    assert session_source(source) == (onnx.load(path).SerializeToString() if whole else str(path))
    monkeypatch.setattr("shared_runtime.graph.check.host", lambda: old)
    given = onnx.load_from_string(session_source(source))
    onnx.checker.check_model(given)
    assert all(len(node.input) == 3 for node in given.graph.node if node.op_type == "DequantizeLinear")
    assert onnx.load(path) == (source if whole else onnx.load(path)), "the graph that was given stays as it is"
    x = np.random.default_rng(1).uniform(0.5, 1, (ROWS, WIDTH)).astype(np.float32)
    expected, found = (ReferenceEvaluator(proto).run(None, {"x": x})[0] for proto in (onnx.load(path), given))
    np.testing.assert_array_equal(found, expected)


def test_weights_of_the_whole_range_are_tried_last_where_bytes_saturate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = replace(host(), vector=("avx2",))
    for module in ("catalogue", "onnxruntime_int8"):
        monkeypatch.setattr(f"shared_runtime.quantization.{module}.host", lambda: old)
    weight = {"w": np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    model = rt.load(save(tmp_path / "float.onnx", nodes, weight, {"x": ["batch", WIDTH]}, {"y": ["batch", WIDTH]}))
    data = read_calibration([model.signature.random(1, seed) for seed in range(8)], model.signature, "float")
    maker = next(maker for maker in forms_for(model, "cpu", PRECISIONS) if maker.name == "int8-onnxruntime")
    reach = []
    for form in maker.make(data):
        constants = [numpy_helper.to_array(item) for item in form.proto(frozenset()).graph.initializer]
        reach.append(max(int(np.abs(values.astype(int)).max()) for values in constants if values.dtype == np.int8))
    assert len(reach) == 3
    assert max(reach[:-1]) <= 64
    assert reach[-1] == 127


@pytest.mark.parametrize("form", FORMS)
def test_bytes_of_full_range_are_imported(form: str, tmp_path: Path) -> None:
    folder = rt.import_model(quantized(form, tmp_path), "bytes", repository=ModelRepository((tmp_path / "models",)))
    x = np.random.default_rng(1).uniform(0.5, 1, (ROWS, WIDTH)).astype(np.float32)
    (expected,) = ReferenceEvaluator(onnx.load(tmp_path / "product.onnx")).run(None, {"x": x})
    np.testing.assert_allclose(
        backends()["onnxruntime"].compile(rt.load(folder), "cpu", 1).run({"x": x})["y"], expected, rtol=1e-5, atol=0.26
    )
