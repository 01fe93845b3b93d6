"""Kernels of our own against their references and the engines."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

import shared_runtime as rt
from shared_runtime.backends.base import backends
from shared_runtime.kernels.trees import reference
from shared_runtime.kernels.trees.ensemble import read_ensemble
from tests.conftest import absent

WIDTH = 4


@pytest.fixture(autouse=True)
def compiled() -> None:
    """Skips, or fails where REQUIRE_SERVICES promises it, without the compiled kernel."""
    if lacks := backends()["trees"].availability("cpu").lacks:
        absent(lacks)


def grown(seed: int, trees: int, depth: int, targets: int, modes: tuple[str, ...]) -> dict[str, list[Any]]:
    """Attributes of random trees: unbalanced, NaN to either side."""
    rng = np.random.default_rng(seed)
    nodes: list[tuple[int, int, str, int, float, int, int, int]] = []
    leaves: list[tuple[int, int, int, float]] = []
    for tree in range(trees):
        count = 0

        def grow(left: int, tree: int = tree) -> int:
            nonlocal count
            here, count = count, count + 1
            if left == 0 or rng.random() < 0.2:
                nodes.append((tree, here, "LEAF", 0, 0.0, 0, 0, 0))
                leaves.extend((tree, here, target, float(rng.standard_normal())) for target in range(targets))
                return here
            true, false = grow(left - 1), grow(left - 1)
            limit = float(np.float32(rng.choice([-1.0, -0.5, 0.0, 0.5, 1.0])))
            nodes.append((tree, here, str(rng.choice(modes)), int(rng.integers(WIDTH)), limit, true, false, int(rng.integers(2))))
            return here

        grow(depth)
    nodes.sort()
    keys = ("treeids", "nodeids", "modes", "featureids", "values", "truenodeids", "falsenodeids", "missing_value_tracks_true")
    found: dict[str, list[Any]] = {f"nodes_{key}": list(column) for key, column in zip(keys, zip(*nodes, strict=True), strict=True)}
    for key, column in zip(("treeids", "nodeids", "ids", "weights"), zip(*leaves, strict=True), strict=True):
        found[f"target_{key}"] = list(column)
    return found


def graph_of(given: dict[str, Any], targets: int = 1, tail: list[onnx.NodeProto] | None = None, **more: Any) -> onnx.ModelProto:
    """x -> trees -> y -> `tail`."""
    output = tail[-1].output[0] if tail else "y"
    node = helper.make_node("TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", n_targets=targets, **given, **more)
    graph = helper.make_graph(
        [node, *(tail or [])],
        "trees",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", targets])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def saved(path: Path, proto: onnx.ModelProto) -> rt.Model:
    onnx.save(proto, path)
    return rt.load(path)


def rows(count: int, seed: int = 0, missing: float = 0.0) -> np.ndarray:
    """Values on and beside the thresholds, infinite ones, NaN where wanted."""
    rng = np.random.default_rng(seed)
    x = rng.choice(
        [-np.inf, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1e-40, np.nextafter(np.float32(0.5), np.float32(1)), 3e38, np.inf], (count, WIDTH)
    )
    x[rng.random(x.shape) < missing] = np.nan
    return x.astype(np.float32)


@pytest.mark.parametrize("modes", [("BRANCH_LT",), ("BRANCH_LEQ",), ("BRANCH_LT", "BRANCH_LEQ", "BRANCH_GT", "BRANCH_GTE")])
@pytest.mark.parametrize(
    ("targets", "tail", "aggregate"), [(1, None, "SUM"), (1, "Sigmoid", "SUM"), (3, "Softmax", "AVERAGE"), (2, None, "AVERAGE")]
)
def test_trees_score_as_the_engine_and_the_reference(
    tmp_path: Path, modes: tuple[str, ...], targets: int, tail: str | None, aggregate: str
) -> None:
    after = [helper.make_node(tail, ["y"], ["z"])] if tail else None
    proto = graph_of(grown(3, 130, 7, targets, modes), targets, after, aggregate_function=aggregate, base_values=[0.25] * targets)
    model = saved(tmp_path / "m.onnx", proto)
    name = model.signature.outputs[0].name
    kernel, engine = (backends()[b].compile(model, "cpu", 2) for b in ("trees", "onnxruntime"))
    ensemble = read_ensemble(onnx.load(str(model.graph)), WIDTH)
    for count, missing in ((1, 0.0), (1, 0.5), (65, 0.0), (130, 0.2), (1100, 0.1)):
        x = rows(count, count, missing)
        y = kernel.run({"x": x})[name]
        np.testing.assert_allclose(y, engine.run({"x": x})[name], rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(y, reference.scores(ensemble, x), rtol=1e-6, atol=1e-6)


def test_the_order_of_the_nodes_does_not_matter() -> None:
    given = grown(4, 9, 5, 1, ("BRANCH_LEQ",))
    order = np.random.default_rng(0).permutation(len(given["nodes_modes"]))
    mixed = {name: [values[i] for i in order] if name.startswith("nodes_") else values for name, values in given.items()}
    x = rows(100, 1, 0.1)
    first, second = (reference.scores(read_ensemble(graph_of(some), WIDTH), x) for some in (given, mixed))
    np.testing.assert_allclose(first, second, rtol=1e-6)


def test_onnx_itself_agrees_on_values_at_the_thresholds(tmp_path: Path) -> None:
    for mode in ("BRANCH_LT", "BRANCH_LEQ", "BRANCH_GT", "BRANCH_GTE"):
        model = saved(tmp_path / f"{mode}.onnx", graph_of(grown(5, 3, 4, 1, (mode,))))
        x = rows(200, 2)
        expected = ReferenceEvaluator(str(model.graph)).run(None, {"x": x})[0]
        np.testing.assert_allclose(backends()["trees"].compile(model, "cpu", 1).run({"x": x})["y"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["forest", "boosting", "boosting of three", "histograms", "lightgbm", "lightgbm of two", "xgboost of three"]
)
def test_the_trees_of_other_libraries(kind: str) -> None:
    ensembles, boosters, lightgbm = pytest.importorskip("sklearn.ensemble"), pytest.importorskip("xgboost"), pytest.importorskip("lightgbm")
    pytest.importorskip("skl2onnx")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 6)).astype(np.float32)
    two = (x[:, 0] + x[:, 1] * x[:, 2] > 0).astype(int)
    three = two + (x[:, 3] > 1)
    estimator, y = {
        "forest": (ensembles.RandomForestClassifier(20, random_state=0), three),
        "boosting": (ensembles.GradientBoostingClassifier(n_estimators=15, random_state=0), two),
        "boosting of three": (ensembles.GradientBoostingClassifier(n_estimators=15, random_state=0), three),
        "histograms": (ensembles.HistGradientBoostingClassifier(max_iter=15, random_state=0), two),
        "lightgbm": (lightgbm.LGBMRegressor(n_estimators=15, verbose=-1), x[:, 0]),
        "lightgbm of two": (lightgbm.LGBMClassifier(n_estimators=15, verbose=-1), two),
        "xgboost of three": (boosters.XGBClassifier(n_estimators=15), three),
    }[kind]
    model = rt.load(estimator.fit(x, y))
    kernel, engine = (backends()[b].compile(model, "cpu", 1) for b in ("trees", "onnxruntime"))
    more = rng.standard_normal((300, 6)).astype(np.float32)
    expected = engine.run({"features": more})
    found = kernel.run({"features": more})
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        if value.dtype == np.int64:
            np.testing.assert_array_equal(value, expected[name])
        else:
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5)


def test_threads_may_share_the_trees(tmp_path: Path) -> None:
    model = saved(tmp_path / "m.onnx", graph_of(grown(1, 200, 6, 1, ("BRANCH_LT",))))
    executable = backends()["trees"].compile(model, "cpu", 2)
    inputs = [{"x": rows(1500, seed, 0.1)} for seed in range(12)]
    expected = [executable.run(x)["y"] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for a, b in zip(pool.map(lambda x: executable.run(x)["y"], inputs), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    executable.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes_featureids": 9}, "feature 9"),
        ({"nodes_modes": "BRANCH_EQ"}, "BRANCH_EQ"),
        ({"nodes_values": float("nan")}, "compares with nan"),
        ({"nodes_truenodeids": 4711}, "not there"),
        ({"nodes_nodeids": 1}, "listed twice"),
        ({"nodes_truenodeids": 0}, "belong to no tree"),
    ],
)
def test_trees_that_can_not_be_walked_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    given = grown(4, 1, 3, 1, ("BRANCH_LT",))
    place = next(i for i, mode in enumerate(given["nodes_modes"]) if mode != "LEAF" and given["nodes_nodeids"][i] == 0)
    for key, value in change.items():
        given[key][place] = value
    with pytest.raises(rt.UnsupportedModelError, match=message):
        read_ensemble(graph_of(given), WIDTH)


def test_a_label_beside_one_score_is_refused() -> None:
    given = {key.replace("target_", "class_"): value for key, value in grown(4, 3, 3, 1, ("BRANCH_LT",)).items()}
    node = helper.make_node(
        "TreeEnsembleClassifier",
        ["x"],
        ["label", "both"],
        domain="ai.onnx.ml",
        classlabels_int64s=[0, 1],
        post_transform="LOGISTIC",
        **given,
    )
    cut = helper.make_node("Slice", ["both", "one", "two", "one"], ["second"])
    graph = helper.make_graph(
        [node, cut],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("second", TensorProto.FLOAT, ["batch", 1]),
        ],
        [helper.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in (("one", 1), ("two", 2))],
    )
    with pytest.raises(rt.UnsupportedModelError, match="beside the score of one"):
        read_ensemble(helper.make_model(graph), WIDTH)


def test_a_graph_of_other_operators_is_refused() -> None:
    with pytest.raises(rt.UnsupportedModelError, match="no trees"):
        backends()["trees"].compile(rt.load("hippocampus-t1"), "cpu", 1)


def test_the_compiled_kernel_never_leaves_its_arrays() -> None:
    """Whatever is handed over: nodes that lead outside, blocks of too many trees, buffers of other sizes."""
    from shared_runtime.kernels.trees import _cpu

    leaf, branch = struct.pack("<fiii", np.inf, 0, 1, 0), struct.pack("<fiii", 0.5, 0, 1, 0)
    nodes = np.frombuffer(branch + leaf + struct.pack("<fiii", np.inf, 0, 2, 0), [("n", "V16")])
    good = [nodes, np.array([[1, 1]], np.int32), np.array([0], np.int32), np.array([0, 1, 2], np.float32), np.zeros(1), 1, 0, 1.0]
    ensemble, out = _cpu.prepare(*good), np.empty((2, 1), np.float32)
    _cpu.run(ensemble, np.array([[0.0], [0.5]], np.float32), out)
    assert out.ravel().tolist() == [1.0, 2.0]
    bad_nodes = [struct.pack("<fiii", 0.5, *rest) for rest in ((0, 2, 0), (0, -1, 0), (1, 1, 0), (-1, 1, 0), (0, 1, 2), (0, 0, 0))]
    for one in bad_nodes:
        broken = np.frombuffer(one + nodes.tobytes()[16:], [("n", "V16")])
        with pytest.raises(ValueError, match="outside"):
            _cpu.prepare(broken, *good[1:])
    for place, value in ((1, [[65, 1]]), (1, [[2, 1]]), (1, [[1, -1]]), (2, [3]), (2, [-1])):
        with pytest.raises(ValueError, match="outside"):
            _cpu.prepare(*[np.array(value, np.int32) if i == place else item for i, item in enumerate(good)])
    with pytest.raises(ValueError, match="weights has"):
        _cpu.prepare(*good[:3], np.zeros(2, np.float32), *good[4:])
    with pytest.raises(ValueError, match="expected 4"):
        _cpu.run(ensemble, np.zeros((3, 1), np.float32), out)
    with pytest.raises(ValueError, match="expected 4"):
        _cpu.run(ensemble, np.zeros((1, 1), np.float64), out)
    with pytest.raises(ValueError, match="PyCapsule"):
        _cpu.run(object(), np.zeros((1, 1), np.float32), out)  # type: ignore[arg-type]
