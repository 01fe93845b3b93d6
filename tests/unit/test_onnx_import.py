"""ONNX files that others wrote: sizes that are not known, weights beside the graph, operators old and unknown, rounding."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import shared_runtime as rt
from shared_runtime.backends.base import backends
from shared_runtime.graph.passes.base import plain_session
from shared_runtime.graph.versions import too_new
from shared_runtime.importers import base
from shared_runtime.importers.base import Imported, write_folder
from shared_runtime.repository.store import ModelRepository
from shared_runtime.variants import VariantStore
from tests.networks import run, save


def test_operators_that_no_engine_runs_any_more_are_converted(tmp_path: Path, repository: ModelRepository) -> None:
    """Opset 6: Add says that it spreads its shorter input."""
    node = helper.make_node("Add", ["x", "b"], ["y"], broadcast=1)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3, 4]) for name in ("x", "y")]
    offset = helper.make_tensor_value_info("b", TensorProto.FLOAT, [4])
    b = np.arange(4, dtype=np.float32)
    graph = helper.make_graph([node], "old", [ends[0], offset], ends[1:], [numpy_helper.from_array(b, "b")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 6)], ir_version=3), tmp_path / "old.onnx")
    rt.import_model(tmp_path / "old.onnx", "old", repository=repository)
    own = hashlib.sha256((tmp_path / "old.onnx").read_bytes()).hexdigest()
    assert rt.load(tmp_path / "old.onnx", sha256=own).signature.inputs[0].shape == (2, 3, 4)
    with pytest.raises(rt.ModelIntegrityError):
        rt.load(tmp_path / "old.onnx", sha256="0" * 64)
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    for model in (rt.load(tmp_path / "old.onnx"), rt.load("old", repository=repository)):
        np.testing.assert_allclose(run(model, {"x": x}, tmp_path)["y"], x + b, rtol=1e-6)
    assert "opset 6" in model.card["import"]["from"]


def newer(tmp_path: Path, node: onnx.NodeProto, opset: int | None = None, ir: int | None = None) -> Path:
    """A graph of `node` over (batch, 6); by default of the newest versions that the installed onnx writes."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 6]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "newer", ends[:1], ends[1:]))
    model.ir_version = ir or model.ir_version
    model.opset_import[0].version = opset or model.opset_import[0].version
    onnx.save(model, tmp_path / "newer.onnx")
    return tmp_path / "newer.onnx"


@pytest.mark.parametrize("kind", ["Relu", "Celu"])
def test_newer_operators_and_formats_than_the_engine_knows_are_taken(kind: str, tmp_path: Path, repository: ModelRepository) -> None:
    """onnx itself is ahead of the engines: what it writes by default they refuse to load. Celu got a new definition in between."""
    path = newer(tmp_path, helper.make_node(kind, ["x"], ["y"]))
    assert too_new(onnx.load(path)), "the installed onnx writes nothing newer than what the engine knows: leave this test out"
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    wanted = ReferenceEvaluator(str(path)).run(None, {"x": x})[0]
    rt.import_model(path, "newer", repository=repository)
    for model in (rt.load(path), rt.load("newer", repository=repository)):
        np.testing.assert_allclose(run(model, {"x": x}, tmp_path)["y"], wanted, rtol=1e-6)
    assert f"opset {onnx.defs.onnx_opset_version()}" in model.card["import"]["from"]
    assert rt.load(path).sha256 == rt.load(path).sha256, "its variants would not be found again"


def test_an_operator_that_the_engine_does_not_have_yet_is_named(tmp_path: Path) -> None:
    path = newer(tmp_path, helper.make_node("SwiGLU", ["x", "x"], ["y"]))
    with pytest.raises(rt.UnsupportedModelError, match=r"newer than what the engines here know .*SwiGLU"):
        rt.load(path)


def test_a_graph_in_memory_is_taken_like_its_file(tmp_path: Path) -> None:
    path = newer(tmp_path, helper.make_node("Neg", ["x"], ["y"]), opset=17, ir=9)
    x = np.ones((2, 6), np.float32)
    model = rt.load(onnx.load(path), example=x)
    np.testing.assert_array_equal(run(model, {"x": x}, tmp_path)["y"], -x)
    assert model.example is not None


def test_inputs_that_random_numbers_are_no_example_of(tmp_path: Path, repository: ModelRepository) -> None:
    """Where an input says how large the output is, most numbers fit nothing."""
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 1]), helper.make_tensor_value_info("shape", TensorProto.INT64, [2])]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "columns"])
    graph = helper.make_graph([helper.make_node("Expand", ["x", "shape"], ["y"])], "expand", ends, [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "expand.onnx")
    example = {"x": np.arange(3, dtype=np.float32)[:, None], "shape": np.array([3, 5])}
    with pytest.raises(rt.UnsupportedModelError, match=r"fails on random inputs .*give some as example="):
        rt.import_model(tmp_path / "expand.onnx", "expand", repository=repository)
    rt.import_model(tmp_path / "expand.onnx", "expand", example=example, repository=repository)
    with rt.Session(rt.load("expand", repository=repository), plans=tmp_path / "plans", probe=example) as session:
        assert session.run(example)["y"].shape == (3, 5)


def test_a_node_that_the_engine_s_optimiser_breaks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes between are only wrong while nobody asks for them, as with a fusion that goes wrong."""
    weights = [numpy_helper.from_array(np.eye(3, dtype=np.float32), name) for name in ("w1", "w2")]
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["a"], "first"), helper.make_node("MatMul", ["a", "w2"], ["y"], "second")]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "two", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "two.onnx")
    plain = base.plain_session

    class Broken:
        def __init__(self, session: Any) -> None:
            self._session = session

        def run(self, names: Any, inputs: Any) -> Any:
            asked = names or [output.name for output in self._session.get_outputs()]
            return [
                value if len(asked) > 1 or name == "a" else value + 1
                for name, value in zip(asked, self._session.run(names, inputs), strict=True)
            ]

        def get_outputs(self) -> Any:
            return self._session.get_outputs()

    monkeypatch.setattr(base, "plain_session", lambda model, optimised=False: Broken(plain(model)) if optimised else plain(model))
    with pytest.raises(rt.ImportMismatchError, match=r"first layer to differ is MatMul 'second'"):
        rt.import_model(tmp_path / "two.onnx", "two", repository=ModelRepository((tmp_path / "models",)))


def test_named_dynamic_dimensions_survive(tmp_path: Path, repository: ModelRepository) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "relu.onnx")
    rt.import_model(tmp_path / "relu.onnx", "relu", repository=repository)
    assert rt.load("relu", repository=repository).signature.outputs[0].shape == ("batch", 3, "height", "width")


def external(folder: Path, location: str) -> Path:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4], np.ones(4, np.float32).tobytes(), raw=True)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [weight],
    )
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())
    return path


def test_external_weights_are_read_from_beside_the_graph_and_hashed(tmp_path: Path, repository: ModelRepository) -> None:
    path = external(tmp_path, "weights.bin")
    with pytest.raises(rt.ModelIntegrityError, match="not beside the graph"):
        rt.load(path)
    (tmp_path / "weights.bin").write_bytes(np.full(4, 3, np.float32).tobytes())
    model = rt.load(path)
    rt.import_model(path, "one-file", repository=repository)
    (tmp_path / "weights.bin").write_bytes(np.full(4, 4, np.float32).tobytes())
    with pytest.raises(rt.ModelIntegrityError, match="changed or damaged"):
        rt.load(path, sha256=model.sha256)
    output = run(rt.load("one-file", repository=repository), {"x": np.ones((1, 4), np.float32)}, tmp_path)
    np.testing.assert_array_equal(output["y"], [[3, 3, 3, 3]])


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname"])
def test_external_weights_outside_of_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    (tmp_path / "in").mkdir()
    with pytest.raises(rt.ModelIntegrityError, match="outside of the model's folder"):
        rt.load(external(tmp_path / "in", location))


def test_an_unknown_operator_is_named(tmp_path: Path, repository: ModelRepository) -> None:
    graph = helper.make_graph(
        [helper.make_node("Frobnicate", ["x"], ["y"], name="odd")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
    )
    path = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    for attempt in (lambda: rt.load(path), lambda: rt.import_model(path, "odd", repository=repository)):
        with pytest.raises(rt.UnsupportedModelError, match="'Frobnicate'"):
            attempt()
    assert repository.names() == []


IMPORT_MANY = """
import sys
from pathlib import Path

import shared_runtime as rt
from shared_runtime.repository.store import ModelRepository
from shared_runtime.variants import VariantStore

for _ in range(5):
    rt.import_model(Path(sys.argv[1]), "shared", repository=ModelRepository((Path(sys.argv[2]),)))
"""


def test_two_processes_that_import_the_same_name_do_not_harm_each_other(tmp_path: Path, repository: ModelRepository) -> None:
    (tmp_path / "weights.bin").write_bytes(np.full(4, 3, np.float32).tobytes())
    source = external(tmp_path, "weights.bin")
    command = [sys.executable, "-c", IMPORT_MANY, str(source), str(repository.roots[0])]
    workers = [subprocess.Popen(command) for _ in range(2)]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    assert rt.load("shared", repository=repository).name == "shared"
    assert [path.name for path in repository.roots[0].iterdir()] == ["shared"]


def test_sizes_that_an_exporter_did_not_know(tmp_path: Path, repository: ModelRepository) -> None:
    """-1 and "?" are sizes that vary, each by itself: a picture need not be square."""
    path = save(tmp_path / "relu.onnx", [helper.make_node("Relu", ["x"], ["y"])], {}, {"x": [-1, 3, "?", "?"]}, {"y": [-1, 3, "?", "?"]})
    rt.import_model(path, "relu", repository=repository)
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 9)).astype(np.float32)
    for model in (rt.load(path), rt.load("relu", repository=repository)):
        assert model.signature.inputs[0].shape == ("batch", 3, "x_2", "x_3")
        np.testing.assert_array_equal(run(model, {"x": x}, tmp_path)["y"], np.maximum(x, 0))


def test_rows_that_an_exporter_calls_otherwise_in_an_output(tmp_path: Path) -> None:
    """TensorFlow's converter numbers sizes that are not known: rows can be shared out as where both are called alike."""
    relu, mean = helper.make_node("Relu", ["x"], ["y"]), helper.make_node("ReduceMean", ["x"], ["y"], axes=[0], keepdims=1)
    for node, shared in ((relu, True), (mean, False)):
        model = rt.load(save(tmp_path / f"{node.op_type}.onnx", [node], {}, {"x": ["unk__1", 4]}, {"y": ["unk__2", 4]}))
        with rt.Session(model, plans=tmp_path / "plans", threads=2) as session:
            lost = {c.lost for c in session.plan.candidates if c.backend == "openvino" and c.mode == "streams"}
        assert any("depend on one another" in why for why in lost) != shared


def test_a_sequence_that_must_be_longer_than_the_usual_one(tmp_path: Path, repository: ModelRepository) -> None:
    """A filter of 100 steps fits no 8; the length that it fits is kept, and plans are made with it."""
    kernel = {"w": np.random.default_rng(0).standard_normal((2, 1, 100)).astype(np.float32)}
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    path = save(tmp_path / "filter.onnx", [node], kernel, {"x": ["b", 1, "t"]}, {"y": ["b", 2, "s"]})
    rt.import_model(path, "filter", repository=repository)
    model = rt.load("filter", repository=repository)
    assert model.random()["x"].shape == (1, 1, 128)
    assert run(model, model.random(3), tmp_path)["y"].shape == (3, 2, 29)


@pytest.mark.parametrize("output", ["Sigmoid", "Identity"])
def test_a_network_that_magnifies_rounding_is_taken_and_a_wrong_one_is_not(output: str, tmp_path: Path) -> None:
    """Differences of large sums: added in another order, numbers change in the third digit and probabilities below 1e-6 in the first."""
    generator = np.random.default_rng(0)
    w = generator.standard_normal((256, 256)).astype(np.float32)
    v = (w + 1e-4 * generator.standard_normal(w.shape)).astype(np.float32)
    offset = -14.0 if output == "Sigmoid" else 0.0
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["x", "v"], ["b"])]
    nodes += [helper.make_node("Sub", ["a", "b"], ["c"]), helper.make_node("Mul", ["c", "scale"], ["d"])]
    nodes += [helper.make_node("Add", ["d", "offset"], ["e"]), helper.make_node(output, ["e"], ["y"])]
    weights = {"w": w, "v": v, "scale": np.float32(1e2), "offset": np.float32(offset)}
    proto = onnx.load(save(tmp_path / "magnifying.onnx", nodes, weights, {"x": ["batch", 256]}, {"y": ["batch", 256]}))

    def backwards(inputs: dict[str, np.ndarray], factor: float = 1.0) -> dict[str, np.ndarray]:
        a, b = (np.add.accumulate((inputs["x"][:, :, None] * matrix)[:, ::-1], axis=1)[:, -1] for matrix in (w, v))
        y = np.float32(1e2) * (a - b) + np.float32(offset)
        return {"y": factor * (1 / (1 + np.exp(-y)) if output == "Sigmoid" else y)}

    write_folder(Imported(proto, backwards, "numpy"), tmp_path / "models" / "right", "right")
    assert rt.load(tmp_path / "models" / "right").card["import"]["difference"] > base.TOLERANCE
    for factor in (0.5, 1.5):
        with pytest.raises(rt.ImportMismatchError):
            write_folder(Imported(proto, lambda inputs, f=factor: backwards(inputs, f), "numpy"), tmp_path / "models" / "wrong", "wrong")


def test_a_small_output_is_held_to_its_own_size(tmp_path: Path) -> None:
    """Numbers below 1e-6 that are no rounding of larger ones: a difference of a part in a hundred is one."""
    path = save(
        tmp_path / "small.onnx", [helper.make_node("Mul", ["x", "w"], ["y"])], {"w": np.float32(1e-8)}, {"x": ["b", 4]}, {"y": ["b", 4]}
    )
    imported = Imported(onnx.load(path), lambda inputs: {"y": inputs["x"] * np.float32(1.01e-8)}, "numpy")
    with pytest.raises(rt.ImportMismatchError):
        write_folder(imported, tmp_path / "models" / "small", "small")


def test_a_loop_that_openvino_does_not_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reader ends the process on some graphs with a Scan: the plan says so, and another engine serves."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("state", "item", "next", "seen")]
    steps = [helper.make_node("Add", ["state", "item"], ["next"]), helper.make_node("Identity", ["next"], ["seen"])]
    loop = {"body": helper.make_graph(steps, "body", ends[:2], ends[2:]), "num_scan_inputs": 1}
    node, start = helper.make_node("Scan", ["start", "x"], ["last", "y"], **loop), {"start": np.zeros(3, np.float32)}
    path = save(tmp_path / "sums.onnx", [node], start, {"x": ["steps", 3]}, {"y": ["steps", 3]})
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    for survives in (True, False):
        if not survives:
            monkeypatch.setattr("shared_runtime.backends.openvino.READ", "import os; os.abort()")
            path.touch()
        with rt.Session(rt.load(path), plans=tmp_path / f"plans-{survives}") as session:
            np.testing.assert_allclose(session.run({"x": x})["y"], np.cumsum(x, 0), rtol=1e-5)
            reasons = [c.lost for c in session.plan.candidates if c.backend == "openvino"]
        assert any("would end this process by signal 6" in reason for reason in reasons) != survives


def test_a_model_whose_random_inputs_are_invalid_is_optimised_and_served(tmp_path: Path) -> None:
    """As a detector of speech: a scalar says which of its filters, and the rows of its state have no name of their own."""
    generator = np.random.default_rng(0)
    weights = {"w": generator.standard_normal((64, 64)).astype(np.float32), "rates": np.array(8), "bank": np.eye(3, 64, dtype=np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "state"], ["sum"]),
        helper.make_node("Sub", ["rate", "rates"], ["place"]),
        helper.make_node("Gather", ["bank", "place"], ["filter"]),
        helper.make_node("Add", ["sum", "filter"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 64]) for name in ("x", "state", "y")]
    rate = helper.make_tensor_value_info("rate", TensorProto.INT64, [])
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "speech", [*ends[:2], rate], ends[2:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "speech.onnx")

    def sample() -> dict[str, np.ndarray]:
        x, state = (generator.standard_normal((1, 64)).astype(np.float32) for _ in range(2))
        return {"x": x, "state": state, "rate": np.array(8)}

    store = VariantStore(tmp_path / "variants")
    model = rt.optimize(rt.load(tmp_path / "speech.onnx"), calibration=[sample() for _ in range(16)], budget_s=60, store=store)
    assert model.variants
    given = sample()
    np.testing.assert_allclose(run(model, given, tmp_path)["y"], given["x"] @ weights["w"] + given["state"] + weights["bank"][0], atol=0.5)
    found = rt.verify(model, model.variants[0])
    assert found["probe_error"] is None
    assert "give validation data" in found["why"]
    assert rt.verify(model, model.variants[0], validation=[(sample(), None) for _ in range(8)])["holds"]


def test_an_empty_list_of_axes_is_no_request_of_zero_rows(tmp_path: Path) -> None:
    node = helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4]),
        helper.make_tensor_value_info("axes", TensorProto.INT64, ["k"]),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])
    graph = helper.make_graph([node], "sum", ends, [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "sum.onnx")
    x, none = np.ones((3, 4), np.float32), np.zeros(0, np.int64)
    for engine in ("onnxruntime", "torch"):
        executable = backends()[engine].compile(rt.load(tmp_path / "sum.onnx"), "cpu", 1)
        assert executable.run({"x": x, "axes": none})["y"].tolist() == [[12.0]]


def test_a_session_of_a_graph_that_takes_no_random_inputs(tmp_path: Path) -> None:
    """A window of sound that is longer than what random inputs have by default, and a place within it."""
    nodes = [
        helper.make_node("Unsqueeze", ["sound", "one"], ["row"]),
        helper.make_node("Conv", ["row", "filter"], ["bands"], strides=[8]),
        helper.make_node("ReduceMax", ["bands"], ["y"], axes=[2], keepdims=0),
    ]
    weights = {"one": np.array([1]), "filter": np.random.default_rng(0).standard_normal((4, 1, 400)).astype(np.float32)}
    path = save(tmp_path / "sound.onnx", nodes, weights, {"sound": ["batch", "length"]}, {"y": ["batch", 4]})
    inputs = {"sound": np.random.default_rng(1).standard_normal((3, 4000)).astype(np.float32)}
    expected = plain_session(path).run(None, inputs)[0]
    short = {"sound": np.zeros((1, 8), np.float32)}
    with rt.Session(rt.load(path), plans=tmp_path / "plans", budget_s=0.5) as session:
        for unfit in (session.prepare, lambda: session.run(short)):
            with pytest.raises(rt.BackendUnavailableError, match=r"give the session some as probe="):
                unfit()
        np.testing.assert_allclose(session.run(inputs)["y"], expected, rtol=1e-4)
        assert session.run({"sound": inputs["sound"][:0]})["y"].shape == (0, 4)
    with rt.Session(rt.load(path), plans=tmp_path / "plans") as session:  # from the plan that was kept
        np.testing.assert_allclose(session.run(inputs)["y"], expected, rtol=1e-4)
    model = rt.load(path, example=inputs["sound"])
    assert model.random()["sound"].shape == (1, 4000)
    with rt.Session(model, plans=tmp_path / "other", budget_s=0.5) as session:
        session.prepare()
        np.testing.assert_allclose(session.run(inputs)["y"], expected, rtol=1e-4)
    with pytest.raises(rt.InputError, match="no input 'noise'"):
        rt.load(path, example={"noise": inputs["sound"]})


@pytest.mark.parametrize("ir", [3, 1])
def test_weights_that_an_old_file_does_not_list_among_its_inputs(tmp_path: Path, ir: int) -> None:
    """The format asked for it up to version 3; exporters left them out and engines never minded."""
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", 8), ("y", 4))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=ir), tmp_path / "old.onnx")
    model = rt.load(tmp_path / "old.onnx")
    x = np.ones((2, 8), np.float32)
    with rt.Session(model, plans=tmp_path) as session:
        np.testing.assert_allclose(session.run({"x": x})["y"], x @ numpy_helper.to_array(weight), rtol=1e-5)


@pytest.mark.parametrize("place", [b"MatMul", b"weights", b"batch", b"hidden"])
def test_names_that_are_no_text_are_damage(tmp_path: Path, place: bytes) -> None:
    nodes = [helper.make_node("MatMul", ["x", "weights"], ["hidden"]), helper.make_node("Relu", ["hidden"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {"weights": np.eye(3, dtype=np.float32)}, {"x": ["batch", 3]}, {"y": ["batch", 3]})
    path.write_bytes(path.read_bytes().replace(place, place[:2] + b"\xd8" + place[3:]))
    with pytest.raises(rt.UnsupportedModelError, match="where a name is expected; the file is damaged"):
        rt.load(path)


def test_a_path_that_no_engine_opens_is_refused(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"m\xe4.onnx")
    shutil.copy(rt.load("texture-features").graph, file)
    with pytest.raises(rt.UnsupportedModelError, match="is no UTF-8, and no engine opens it; rename"):
        rt.load(file)
