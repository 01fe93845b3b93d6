"""What every backend must do, on the shipped network and on small graphs."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import shared_runtime as rt
from shared_runtime.backends.base import HardwareBackend, backends, specialise
from shared_runtime.backends.onnxruntime import compile_file
from shared_runtime.backends.openvino import read_network
from shared_runtime.errors import UnsupportedModelError
from shared_runtime.variants import Variant, VariantFacts
from tests.conftest import absent
from tests.networks import save

NAMES = ["onnxruntime", "openvino", "torch"]


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> HardwareBackend:
    found = backends()[request.param]
    state = found.availability("cpu")
    if not state.available:
        pytest.skip(f"{found.name} lacks {state.lacks}")
    return found


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory: pytest.TempPathFactory) -> rt.Model:
    """Operators of a small network: padded convolution, pooling, transposed convolution, norm, softmax; dynamic shapes."""
    generator = np.random.default_rng(1)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        values = generator.standard_normal(shape).astype(np.float32) * 0.3
        return helper.make_tensor(name, TensorProto.FLOAT, shape, values.ravel())

    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], kernel_shape=[3, 3], pads=[1, 0, 1, 2], strides=[1, 1]),
        helper.make_node("InstanceNormalization", ["c1", "s", "o"], ["n1"]),
        helper.make_node("LeakyRelu", ["n1"], ["r1"], alpha=0.1),
        helper.make_node("MaxPool", ["r1"], ["p1"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("ConvTranspose", ["p1", "w2"], ["t1"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Concat", ["t1", "t1"], ["k"], axis=1),
        helper.make_node("GlobalAveragePool", ["k"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"], axis=1),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["l"], transB=1),
        helper.make_node("Softmax", ["l"], ["y"], axis=1),
    ]
    weights = [
        weight("w1", 4, 2, 3, 3),
        weight("b1", 4),
        weight("s", 4),
        weight("o", 4),
        weight("w2", 4, 3, 2, 2),
        weight("w3", 5, 6),
        weight("b3", 5),
    ]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, "height", "width"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
        weights,
    )
    path = tmp_path_factory.mktemp("graphs") / "convolutions.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return rt.load(path)


def reference(model: rt.Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ONNX's own reference implementation, in numpy."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(model.graph))
    return dict(zip([spec.name for spec in model.signature.outputs], evaluator.run(None, inputs), strict=True))


def test_a_backend_says_what_it_needs_and_whether_it_is_there(backend: HardwareBackend) -> None:
    assert isinstance(backend, HardwareBackend)
    assert backend.requires
    assert backend.availability("cpu").version
    cuda = backend.availability("cuda") if "cuda" in backend.devices else None
    assert cuda is None or bool(cuda.version) != bool(cuda.lacks)


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (3, 2, 12, 10), (0, 2, 8, 8)])
def test_dynamic_shapes_and_zero_rows(backend: HardwareBackend, convolutions: rt.Model, shape: tuple[int, ...]) -> None:
    executable = backend.compile(convolutions, "cpu", 1)
    x = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    y = executable.run(x)["y"]
    assert y.shape == (shape[0], 5)
    if shape[0]:
        np.testing.assert_allclose(y, reference(convolutions, x)["y"], atol=2e-6)
    executable.close()


def test_the_shipped_network_in_float32_as_asked(backend: HardwareBackend) -> None:
    model = rt.load("hippocampus-t1")
    executable = backend.compile(model, "cpu", 2)
    assert executable.device == "cpu"
    assert executable.precision == "float32"
    x = model.signature.random(rows=1, seed=3)
    expected = backends()["onnxruntime"].compile(model, "cpu", 2).run(x)["logits"]
    outputs = executable.run(x)["logits"]
    assert np.linalg.norm(outputs - expected) / np.linalg.norm(expected) < 1e-5
    executable.close()


@pytest.mark.parametrize("name", ["fraud-sequence", "texture-features"])
def test_recurrent_and_resizing_networks(backend: HardwareBackend, name: str) -> None:
    model = rt.load(name)
    executable = backend.compile(model, "cpu", 2)
    for rows in (1, 3, 0):
        x = model.signature.random(rows=rows, seed=4)
        expected = backends()["onnxruntime"].compile(model, "cpu", 2).run(x)
        for output, value in executable.run(x).items():
            assert value.shape == expected[output].shape
            assert np.linalg.norm(value - expected[output]) <= 1e-4 * max(1e-6, np.linalg.norm(expected[output]))
    executable.close()


@pytest.mark.parametrize("name", ["onnxruntime", "trees", "xgboost"])
def test_boosted_trees_with_any_number_of_rows(name: str) -> None:
    model = rt.load("fraud-boosting")
    if lacks := backends()[name].availability("cpu").lacks:
        absent(f"{name} lacks {lacks}")
    executable = backends()[name].compile(model, "cpu", 2)
    kept = executable.run(model.signature.random(3))["probability"]
    copy = kept.copy()
    for rows in (0, 1, 2000):
        x = model.signature.random(rows, seed=5)
        expected = backends()["onnxruntime"].compile(model, "cpu", 1).run(x)["probability"]
        y = executable.run(x)["probability"]
        assert y.shape == (rows, 1)
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_array_equal(kept, copy)
    executable.close()


def test_a_backend_prepared_for_a_shape_takes_the_others_too(backend: HardwareBackend, convolutions: rt.Model) -> None:
    executable = backend.compile(convolutions, "cpu", 1)
    for prepared in (1, 4):
        specialise(executable, convolutions.signature.random(prepared))
    for rows in (0, 1, 2, 4, 9):
        x = convolutions.signature.random(rows, seed=rows)
        np.testing.assert_allclose(executable.run(x)["y"], backends()["onnxruntime"].compile(convolutions, "cpu", 1).run(x)["y"], atol=2e-6)
    executable.close()


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("rows", ["batch", 4])
def test_outputs_whose_shape_depends_on_values(name: str, rows: str | int, tmp_path: Path) -> None:
    """The places of what is above zero, and a mean over axes that are an input, as detectors and old exports have them."""
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["above"]),
        helper.make_node("NonZero", ["above"], ["places"]),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "places",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 3]), helper.make_tensor_value_info("axes", TensorProto.INT64, [1])],
        [
            helper.make_tensor_value_info("places", TensorProto.INT64, [2, "found"]),
            helper.make_tensor_value_info("mean", TensorProto.FLOAT, [None, None]),
        ],
        [helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])],
    )
    path = tmp_path / "places.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    model = rt.load(path)
    executable = backends()[name].compile(model, "cpu", 1)
    specialise(executable, {"x": np.ones((4, 3), np.float32), "axes": np.array([0])})
    for count, axis in ((12, 0), (5, 1), (0, 0), (12, 1)):
        given = {"x": np.where(np.arange(12) < count, 2.0, -1.0).astype(np.float32).reshape(4, 3), "axes": np.array([axis])}
        found, wanted = executable.run(given), reference(model, given)
        np.testing.assert_array_equal(found["places"], wanted["places"])
        np.testing.assert_allclose(found["mean"], wanted["mean"], atol=1e-6)
    executable.close()


def test_every_mode_computes_the_same_and_an_unknown_one_is_refused(backend: HardwareBackend, convolutions: rt.Model) -> None:
    x = convolutions.signature.random(2, seed=8)
    for mode in backend.modes("cpu"):
        executable = backend.compile(convolutions, "cpu", 1, None, mode)
        specialise(executable, x)
        np.testing.assert_allclose(executable.run(x)["y"], reference(convolutions, x)["y"], atol=2e-6)
        executable.close()
    with pytest.raises(rt.BackendUnavailableError, match="no mode"):
        backend.compile(convolutions, "cpu", 1, None, "warp")


def test_a_variant_of_another_engine_is_refused(backend: HardwareBackend, convolutions: rt.Model, tmp_path: Path) -> None:
    foreign = Variant(VariantFacts("int8-other", "int8", "other", "cpu", "model.bin"), tmp_path)
    with pytest.raises(rt.UnsupportedModelError, match="made for other"):
        backend.compile(convolutions, "cpu", 1, foreign)


def test_threads_may_share_an_executable(backend: HardwareBackend, convolutions: rt.Model) -> None:
    executable = backend.compile(convolutions, "cpu", 1)
    inputs = [convolutions.signature.random(1, seed=seed) for seed in range(40)]
    specialise(executable, inputs[0])
    expected = [executable.run(x)["y"] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: executable.run(x)["y"], inputs))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    executable.close()


def test_outputs_are_not_overwritten_by_the_next_run(backend: HardwareBackend, convolutions: rt.Model) -> None:
    executable = backend.compile(convolutions, "cpu", 1)
    first = executable.run(convolutions.signature.random(2, seed=1))["y"]
    kept = first.copy()
    executable.run(convolutions.signature.random(2, seed=2))
    np.testing.assert_array_equal(first, kept)
    executable.close()


def test_an_unknown_operator_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    graph = helper.make_graph(
        [helper.make_node("Det", ["x"], ["y"])],
        "det",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch"])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "det.onnx")
    with pytest.raises(rt.UnsupportedModelError, match="Det"):
        backends()["torch"].compile(rt.load(tmp_path / "det.onnx"), "cpu", 1)


def test_inputs_that_onnxruntime_chokes_on_are_an_error_with_their_shapes(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "fixed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "width"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2, 5])],
        [helper.make_tensor("shape", TensorProto.INT64, [3], [-1, 2, 5])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "fixed.onnx")
    executable = backends()["onnxruntime"].compile(rt.load(tmp_path / "fixed.onnx"), "cpu", 1)
    assert executable.run({"x": np.zeros((3, 10), np.float32)})["y"].shape == (3, 2, 5)
    with pytest.raises(rt.UnsupportedModelError, match=r"\[1, 7\]"):
        executable.run({"x": np.zeros((1, 7), np.float32)})


def test_streams_share_out_the_rows(convolutions: rt.Model) -> None:
    backend = backends()["openvino"]
    if not backend.availability("cpu").available:
        pytest.skip(f"openvino lacks {backend.availability('cpu').lacks}")
    assert "streams" in backend.modes("cpu")
    executable = backend.compile(convolutions, "cpu", 3, mode="streams")
    generator = np.random.default_rng(5)
    try:
        specialise(executable, {"x": generator.standard_normal((7, 2, 12, 10)).astype(np.float32)})
        requests = [{"x": generator.standard_normal((rows, 2, 12, 10)).astype(np.float32)} for rows in (7, 1, 2, 3, 0, 11)]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(executable.run, requests))
        for request, answer in zip(requests, answers, strict=True):
            expected = reference(convolutions, request)["y"] if len(request["x"]) else np.zeros((0, 5), np.float32)
            np.testing.assert_allclose(answer["y"], expected, atol=1e-5)
    finally:
        executable.close()


@pytest.mark.parametrize("kind", ["ReduceMean", "fixed"])
def test_rows_that_depend_on_one_another_are_not_shared_out(kind: str, tmp_path: Path) -> None:
    """The mean over the batch is another one for each part; a fixed number of rows can't be parted."""
    backend = backends()["openvino"]
    if not backend.availability("cpu").available:
        pytest.skip(f"openvino lacks {backend.availability('cpu').lacks}")
    rows = "batch" if kind == "ReduceMean" else 4
    nodes = [helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1), helper.make_node("Sub", ["x", "m"], ["y"])]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, 3]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:])
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    with pytest.raises(rt.UnsupportedModelError, match="rows of 'g'"):
        specialise(backend.compile(rt.load(path), "cpu", 2, mode="streams"), {"x": np.ones((4, 3), np.float32)})


def test_onnxruntime_knows_the_sizes_of_a_prepared_shape_and_takes_a_graph_that_contradicts_its_own(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"], axis=0),
        helper.make_node("Squeeze", ["f"], ["flat"]),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Reshape", ["flat", "s"], ["r"]),
        helper.make_node("Add", ["r", "x"], ["y"]),
    ]
    both = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "n"]) for name in ("x", "y")]
    path = tmp_path / "square.onnx"
    graph = helper.make_graph(nodes, "square", both[:1], both[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    executable = compile_file("square", path, "cpu", 1, "float32")
    square, oblong = (np.arange(rows * 3, dtype=np.float32).reshape(rows, 3) for rows in (3, 2))
    for inputs in (square, oblong):
        specialise(executable, {"x": inputs})
        np.testing.assert_array_equal(executable.run({"x": inputs})["y"], 2 * inputs)
    assert executable._session_for({"x": square}).get_inputs()[0].shape == [3, 3]
    assert executable._session_for({"x": oblong}) is executable._session
    executable.close()


def test_what_an_engine_can_not_run_is_named_with_its_shapes(tmp_path: Path) -> None:
    """Sizes that only show at run time to be wrong."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "m"])],
        [helper.make_tensor("w", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])],
    )
    path = tmp_path / "sum.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    for name in ("onnxruntime", "torch"):
        executable = backends()[name].compile(rt.load(path), "cpu", 1)
        with pytest.raises(UnsupportedModelError, match=r"\[2, 5\]"):
            executable.run({"x": np.zeros((2, 5), np.float32)})
        executable.close()


def test_onnxruntime_does_not_load_weights_beside_the_graph_again_for_each_shape(convolutions: rt.Model, tmp_path: Path) -> None:
    inputs = {"x": np.zeros((1, 2, 8, 8), np.float32)}
    for outside in (False, True):
        path, proto = tmp_path / f"{outside}.onnx", onnx.load(str(convolutions.graph))
        for item in proto.graph.initializer:  # only raw bytes may lie outside
            item.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(item), item.name))
        onnx.save(proto, path, save_as_external_data=outside, location=f"{outside}.data", size_threshold=0)
        executable = compile_file("beside", path, "cpu", 1, "float32")
        assert (executable._session_for(inputs) is executable._session) == outside
        executable.close()


SIGNALLED = """
import os, signal, sys, time
import numpy as np
import shared_runtime as rt
from shared_runtime.backends.base import backends
arrived = []
signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))
model, backend = rt.load(sys.argv[2]), backends()[sys.argv[1]]
first, second = backend.compile(model, "cpu", 1), backend.compile(model, "cpu", 1)
for executable in (first, second):
    executable.run({"x": np.zeros((1, 2, 8, 8), np.float32)})
first.close()
second.close()
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.1)
print(arrived)
"""


def test_a_signal_finds_its_handler_after_executables_were_closed(backend: HardwareBackend, convolutions: rt.Model) -> None:
    """In the order of opening: OpenVINO alone leaves the thread a signal stack that is unmapped, and the signal kills the process."""
    command = [sys.executable, "-c", SIGNALLED, backend.name, str(convolutions.graph)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (answer.returncode, answer.stdout.strip()) == (0, "[2]"), answer.stderr


def test_openvino_fuses_the_bias_of_a_layer_that_runs_twice(tmp_path: Path) -> None:
    """Two scales of an image through the same weights: OpenVINO alone leaves each bias and each activation to a pass of its own."""
    from openvino import Core

    generator = np.random.default_rng(0)
    nodes = [helper.make_node("AveragePool", ["image"], ["small"], kernel_shape=[2, 2], strides=[2, 2])]
    for name, source in (("full", "image"), ("half", "small")):
        nodes += [helper.make_node("Conv", [source, "w", "b"], [f"{name}_c"]), helper.make_node("Relu", [f"{name}_c"], [name])]
    weights = {"w": generator.standard_normal((16, 8, 3, 3)).astype(np.float32), "b": generator.standard_normal(16).astype(np.float32)}
    outputs = {"full": ["batch", 16, 14, 14], "half": ["batch", 16, 6, 6]}
    model = rt.load(save(tmp_path / "scales.onnx", nodes, weights, {"image": ["batch", 8, 16, 16]}, outputs))
    sample = {"image": generator.standard_normal((1, 8, 16, 16)).astype(np.float32)}

    def passes(network: Any) -> int:
        network.reshape({"image": [1, 8, 16, 16]})
        operators = Core().compile_model(network, "CPU").get_runtime_model().get_ordered_ops()
        return sum(dict(op.get_rt_info())["layerType"].astype(str) in ("Eltwise", "Subgraph") for op in operators)

    assert passes(read_network(model.graph)) == 2, "OpenVINO fuses a bias of two layers itself: unshare_constants may go"
    executable = backends()["openvino"].compile(model, "cpu", 1)
    assert passes(executable._network.clone()) == 0
    expected = backends()["onnxruntime"].compile(model, "cpu", 1).run(sample)
    for name, found in executable.run(sample).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-4, atol=1e-4)


def test_openvino_says_what_it_lacks_and_not_where_in_its_source() -> None:
    expected = "OpenVINO can't load 'fraud-boosting': No conversion rule found for operations: ai.onnx.ml.TreeEnsembleClassifier"
    with pytest.raises(UnsupportedModelError) as caught:
        backends()["openvino"].compile(rt.load("fraud-boosting"), "cpu", 1)
    assert str(caught.value) == expected
