"""Signatures, verified loading, planning and the session."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import shared_runtime as rt
from shared_runtime.backends import base
from shared_runtime.folders import replace_folder
from shared_runtime.host import peak_resident_mib
from shared_runtime.planning import contenders, planner
from shared_runtime.repository.store import ModelRepository
from shared_runtime.signature import Signature
from shared_runtime.variants import VariantStore
from tests.engines import Engine, plan_with


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    """y = 2 x + 1 over (batch, 3)."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "two"], ["m"]), helper.make_node("Add", ["m", "one"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor("two", TensorProto.FLOAT, [1], [2.0]), helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])],
    )
    path = tmp_path / "linear.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_load_run_and_batch_dimension(linear: Path) -> None:
    with rt.Session(rt.load(linear)) as session:
        for rows in (0, 1, 5):
            x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
            np.testing.assert_allclose(session.run({"x": x})["y"], 2 * x + 1)


def test_a_model_that_draws_random_numbers_is_refused_with_the_reason(tmp_path: Path) -> None:
    nodes = [helper.make_node("RandomNormalLike", ["x"], ["noise"], scale=0.1), helper.make_node("Add", ["x", "noise"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy"]
    graph = helper.make_graph(nodes, "noisy", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "noisy.onnx")
    with rt.Session(tmp_path / "noisy.onnx") as session, pytest.raises(rt.UnsupportedModelError, match="draws random numbers within"):
        session.run({"x": np.ones((2, 3), np.float32)})


def test_non_contiguous_and_safe_dtype_are_taken(linear: Path) -> None:
    with rt.Session(rt.load(linear)) as session:
        x = np.arange(12, dtype=np.float32).reshape(3, 4).T[:, ::1]
        np.testing.assert_allclose(session.run({"x": x})["y"], 2 * x + 1)
        np.testing.assert_allclose(session.run({"x": np.ones((2, 3), np.float16)})["y"], 3)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, ["needs input", "x float32 (batch, 3)"]),
        ({"z": np.zeros((1, 3), np.float32)}, ["no input 'z'", "['x']"]),
        ({"x": np.zeros((1, 4), np.float32)}, ["[1, 4]", "['batch', 3]"]),
        ({"x": np.zeros(3, np.float32)}, ["[3]", "['batch', 3]"]),
        ({"x": np.zeros((1, 3), np.float64)}, ["float64", "float32", "astype"]),
        (np.zeros((1, 3), np.float32), ["a ndarray", "arrays by input name: ['x']"]),
        ({"x": [[1.0, 2.0], [3.0]]}, ["'x' (list) is no array"]),
    ],
)
def test_wrong_input_names_what_was_seen_and_expected(linear: Path, inputs: Any, words: list[str]) -> None:
    with rt.Session(rt.load(linear)) as session, pytest.raises(rt.InputError) as caught:
        session.run(inputs)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_changed_file_is_not_loaded(linear: Path) -> None:
    digest = rt.load(linear).sha256
    rt.load(linear, sha256=digest)
    content = bytearray(linear.read_bytes())
    content[-1] ^= 1
    linear.write_bytes(content)
    with pytest.raises(rt.ModelIntegrityError, match=digest):
        rt.load(linear, sha256=digest)


def test_a_changed_model_folder_is_not_loaded(tmp_path: Path) -> None:
    source = ModelRepository.default().folder("hippocampus-t1")
    copy = tmp_path / "models" / "hippocampus-t1"
    copy.mkdir(parents=True)
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert rt.load(copy).name == "hippocampus-t1"
    with (copy / "model.onnx").open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"\x00\x01\x02")
    with pytest.raises(rt.ModelIntegrityError, match="changed or damaged"):
        rt.load(copy)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(rt.ModelNotFoundError, match="did you mean 'hippocampus-t1'"):
        rt.load("hipocampus-t1")
    with pytest.raises(rt.ModelNotFoundError, match=r"no model at .*missing\.onnx"):
        rt.load("missing.onnx")


def test_what_is_not_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(rt.UnsupportedModelError, match=r"\.pkl"):
        rt.load(tmp_path / "model.pkl")
    (tmp_path / "broken.onnx").write_bytes(b"not a protobuf at all")
    with pytest.raises(rt.UnsupportedModelError, match="not a readable ONNX model"):
        rt.load(tmp_path / "broken.onnx")
    with pytest.raises(rt.UnsupportedModelError, match="can't load a dict"):
        rt.load({"a": 1})


def test_a_missing_device_is_an_error_that_names_what_is_missing(linear: Path) -> None:
    if any(b.availability("cuda").available for b in base.backends().values() if "cuda" in b.devices):
        pytest.skip("this host has a GPU")
    with rt.Session(rt.load(linear), device="cuda") as session, pytest.raises(rt.BackendUnavailableError, match="lacks"):
        session.run({"x": np.zeros((1, 3), np.float32)})
    with pytest.raises(rt.BackendUnavailableError, match="unknown device 'tpu'"):
        rt.Session(rt.load(linear), device="tpu")


def test_one_that_was_let_go_can_still_be_chosen(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its engine is made ready again."""
    monkeypatch.setattr(contenders, "_let_go_hopeless", lambda found: [contender.let_go() for contender in found])
    engines = [Engine("onnxruntime", 0, 60), Engine("quick", 0, 1)]
    monkeypatch.setattr(planner, "backends", lambda: {engine.name: engine for engine in engines})
    monkeypatch.setattr(contenders, "backends", lambda: {engine.name: engine for engine in engines})
    plan, ladder = planner.plan_and_compile(rt.load(linear), "auto", 1, None)
    assert plan.backend == "quick"
    np.testing.assert_array_equal(ladder.run({"x": np.ones((2, 3), np.float32)})["y"], np.full((2, 3), 3.0))


def test_the_fastest_backend_is_kept_and_the_others_are_explained(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_with(monkeypatch, linear, [Engine("onnxruntime", 0, 60), Engine("quick", 0, 1)])
    assert plan.backend == "quick"
    lost = {c.backend: c.lost for c in plan.candidates}
    assert "times as slow" in lost["onnxruntime"]
    assert "quick" in plan.describe()


def test_a_fast_backend_with_other_numbers_loses(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_with(monkeypatch, linear, [Engine("onnxruntime", 0, 60), Engine("wrong", 0.5, 1)])
    assert plan.backend == "onnxruntime"
    assert "differ from the reference" in next(c.lost for c in plan.candidates if c.backend == "wrong")


def test_a_plan_is_cached_for_the_model_and_the_host(linear: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "plans"
    first = plan_with(monkeypatch, linear, [Engine("onnxruntime", 0, 1), Engine("other", 0, 60)], cache)
    second = plan_with(monkeypatch, linear, [Engine("onnxruntime", 0, 60), Engine("other", 0, 1)], cache)
    assert second == first
    for file in cache.iterdir():
        file.write_text("{ damaged")
    assert plan_with(monkeypatch, linear, [Engine("onnxruntime", 0, 60), Engine("other", 0, 1)], cache).backend == "other"


def weighted(path: Path, weight: float, constant: float = 1.0, columns: int = 32) -> Path:
    """y = 2 x + 1 for x (batch, 3); its graph also holds a layer of `weight` that leads to nothing."""
    values = [helper.make_tensor("two", TensorProto.FLOAT, [1], [2.0]), helper.make_tensor("one", TensorProto.FLOAT, [1], [constant])]
    values.append(helper.make_tensor("matrix", TensorProto.FLOAT, [3, columns], [weight] * 3 * columns))
    values.append(helper.make_tensor("bias", TensorProto.FLOAT, [1], [weight]))
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["m"]),
        helper.make_node("Add", ["m", "one"], ["y"]),
        helper.make_node("Gemm", ["x", "matrix", "bias"], ["z"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy")
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], values), opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def test_a_graph_with_other_weights_takes_a_plan_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "plans"
    slow_first, slow_last = ([Engine("onnxruntime", 0, a), Engine("other", 0, b)] for a, b in ((60, 1), (1, 60)))
    first = plan_with(monkeypatch, weighted(tmp_path / "first.onnx", 0.5), slow_first, cache)
    assert first.backend == "other"
    second = plan_with(monkeypatch, weighted(tmp_path / "second.onnx", 0.7), slow_last, cache)
    assert (second.backend, second.model, second.ladder) == ("other", "second", first.ladder)
    assert second.sha256 != first.sha256
    assert second.why.startswith("as measured for first, the same graph with other weights: median")
    third = plan_with(monkeypatch, weighted(tmp_path / "third.onnx", 0.9), slow_last, cache)
    assert third.why == second.why, "it names where it was measured"
    assert plan_with(monkeypatch, weighted(tmp_path / "second.onnx", 0.7), slow_last, cache) == second
    for other in ({"constant": 3.0}, {"columns": 40}):
        measured = plan_with(monkeypatch, weighted(tmp_path / "other.onnx", 0.5, **other), slow_last, cache)
        assert measured.backend == "onnxruntime", f"{other} is another graph"


def test_a_plan_of_other_sizes_is_not_taken_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = []
    for name, value in (("first", 0.5), ("second", 0.7)):
        values = [helper.make_tensor("w", TensorProto.FLOAT, [96], [value] * 96)]
        x, y = (helper.make_tensor_value_info(key, TensorProto.FLOAT, ["batch", "length"]) for key in "xy")
        graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"])], "g", [x], [y], values)
        files.append(tmp_path / f"{name}.onnx")
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), files[-1])
    engines = {engine.name: engine for engine in [Engine("onnxruntime", 0, 1)]}
    for module in (planner, contenders):
        monkeypatch.setattr(module, "backends", lambda: engines)
    whys = []
    for file, length in ((files[0], 8), (files[1], 8), (files[1], 300)):
        model, probe = rt.load(file), {"x": np.ones((1, length), np.float32)}
        cache = tmp_path / "plans"
        for old in cache.glob(f"{model.sha256[:16]}*"):
            old.unlink()
        whys.append(planner.plan_and_compile(model, "auto", 1, cache, probe=probe)[0].why)
    assert [why.startswith("as measured for first") for why in whys] == [False, True, False]


def test_a_plan_that_computes_something_else_with_other_weights_is_measured_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "plans"
    plan_with(monkeypatch, weighted(tmp_path / "first.onnx", 0.5), [Engine("onnxruntime", 0, 60), Engine("other", 0, 1)], cache)
    engines = [Engine("onnxruntime", 0, 60), Engine("other", 0.5, 1)]
    found = plan_with(monkeypatch, weighted(tmp_path / "second.onnx", 0.7), engines, cache)
    assert found.backend == "onnxruntime"
    assert "differ from the reference" in next(c.lost for c in found.candidates if c.backend == "other")
    assert engines[1].closed


def test_a_plan_that_can_not_be_kept_serves_all_the_same(linear: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with rt.Session(linear, plans=tmp_path / "file") as session:
        assert session.run(session.probe())
    assert "can't be kept" in caplog.text
    with rt.Session(linear, plans=str(tmp_path / "plans")) as session:
        session.prepare()
    assert len(list((tmp_path / "plans").iterdir())) == 1


@pytest.mark.parametrize(
    "asked", [{"ladder": (0,)}, {"ladder": "abc"}, {"ladder": (1.5,)}, {"memory_budget_mib": float("nan")}, {"memory_budget_mib": 0}]
)
def test_what_is_no_ladder_and_no_budget_is_refused(linear: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|from 1 on"):
        rt.Session(linear, **asked)


@pytest.mark.parametrize("asked", [("latency", 3.0), ("throughput", -1.0), ("throughput", float("nan"))])
def test_a_latency_limit_goes_with_throughput(asked: tuple[str, float]) -> None:
    with pytest.raises(ValueError, match="p99_ms"):
        rt.Objective(*asked)


def test_a_session_that_is_closed_within_a_run_says_so(linear: Path) -> None:
    session = rt.Session(linear)
    session.prepare()

    def interrupted(inputs: Any) -> Any:
        session.close()
        raise AttributeError("the engine is gone")

    session._run = interrupted
    with pytest.raises(rt.BackendUnavailableError, match="closed"):
        session.run(session.probe())


def test_a_closed_session_says_so(linear: Path) -> None:
    session = rt.Session(rt.load(linear))
    session.run({"x": np.zeros((1, 3), np.float32)})
    session.close()
    with pytest.raises(rt.BackendUnavailableError, match="closed"):
        session.run({"x": np.zeros((1, 3), np.float32)})


def test_a_torch_module_is_loaded_through_export() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    with rt.Session(rt.load(module, example={"x": x[:1]})) as session:
        (output,) = session.run({"x": x}).values()
    np.testing.assert_allclose(output, module(torch.from_numpy(x)).detach().numpy(), atol=1e-5)


def test_peak_memory_is_of_this_process_and_not_of_the_one_that_started_it() -> None:
    block = np.ones(400 << 20, np.uint8)
    command = [sys.executable, "-c", "from shared_runtime.host import peak_resident_mib; print(peak_resident_mib())"]
    child = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 10 < child < 300 < peak_resident_mib()
    assert block[-1] == 1


@pytest.mark.parametrize("content", [b"", b'{"name": "\xe4"}', b"[" * 100], ids=["empty", "another encoding", "another shape"])
def test_files_of_the_runtime_that_a_disk_damaged_are_no_plan_no_variant_and_a_clear_error(
    linear: Path, tmp_path: Path, content: bytes
) -> None:
    store = VariantStore(tmp_path / "variants")
    folder = store.folder("0" * 64) / "int8-openvino"
    folder.mkdir(parents=True)
    (folder / "variant.json").write_bytes(content)
    assert "can't be read" in store.read("0" * 64)["int8-openvino"].why_void
    one = {"x": np.ones((1, 3), np.float32)}
    for damage in (False, True):
        with rt.Session(rt.load(linear), "cpu", plans=tmp_path / "plans", budget_s=1) as session:
            assert session.run(one)
        (plan,) = (tmp_path / "plans").iterdir()
        if not damage:
            plan.write_bytes(content)
    (tmp_path / "signature.json").write_bytes(content)
    with pytest.raises(rt.ModelError, match=r"signature .* can't be read"):
        Signature.read(tmp_path / "signature.json")


def test_a_model_that_is_imported_anew_is_always_there_to_load(linear: Path, tmp_path: Path) -> None:
    repository = ModelRepository((tmp_path / "models",))
    made = rt.import_model(linear, "m", repository=repository)
    shutil.copytree(made, tmp_path / "models" / ".m-left-by-a-kill")
    assert repository.names() == ["m"]
    stop, replaced = threading.Event(), [0]

    def replace() -> None:
        while not stop.is_set():
            part = tmp_path / "models" / f".m-{replaced[0]}"
            shutil.copytree(made, part)
            replace_folder(part, made)
            replaced[0] += 1

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(400):
            assert rt.load("m", repository=repository).name == "m"
    finally:
        stop.set()
        thread.join()
    assert replaced[0] > 20
    with pytest.raises(rt.ModelNotFoundError, match="did you mean 'm'"):
        rt.load("mm", repository=repository)


def test_a_file_that_was_replaced_since_it_was_loaded_is_not_served_under_its_name(linear: Path, tmp_path: Path) -> None:
    model, same, gone = (rt.load(shutil.copy(linear, tmp_path / f"{name}.onnx")) for name in ("other", "same", "gone"))
    proto = onnx.load(linear)
    proto.graph.initializer[0].CopyFrom(helper.make_tensor("two", TensorProto.FLOAT, [1], [3.0]))
    onnx.save(proto, model.graph)
    same.graph.write_bytes(linear.read_bytes())
    gone.graph.unlink()
    one = {"x": np.ones((1, 3), np.float32)}
    for changed in (model, gone):
        with rt.Session(changed, "cpu") as session, pytest.raises(rt.ModelIntegrityError, match=r"was replaced since .* load it again"):
            session.run(one)
    with rt.Session(same, "cpu") as session:
        assert session.run(one)["y"].tolist() == [[3.0] * 3]
    with rt.Session(rt.load(model.graph), "cpu") as session:
        assert session.run(one)["y"].tolist() == [[4.0] * 3]
