"""What OpenVINO fuses wrongly: dense layers with a way around them end the process, scales behind reductions are those of others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import helper

import shared_runtime as rt
from shared_runtime.backends.base import backends
from shared_runtime.backends.openvino import read_network
from shared_runtime.backends.openvino_mends import forks, in_float, unsteady
from shared_runtime.graph.passes.base import plain_session
from shared_runtime.host import host
from shared_runtime.numeric import relative_difference
from shared_runtime.variants import VariantStore
from tests.contract.test_random_networks import draw
from tests.networks import save

WIDTH = 16
pytest.importorskip("openvino")
RUN = """
import sys
import numpy as np
import shared_runtime as rt
from shared_runtime.backends.base import backends
model, given = rt.load(sys.argv[1]), np.load(sys.argv[2])
executable = backends()["openvino"].compile(model, "cpu", 1)
for name in given:
    executable.specialise({"x": given[name]})
    np.save(f"{sys.argv[3]}/{name}.npy", executable.run({"x": given[name]})["y"])
"""


def network(path: Path, around: str, rows: int | str = "batch") -> Path:
    """Three blocks of two dense layers; `around` joins a block's input to its output, "" does not."""
    generator, nodes, weights, value = np.random.default_rng(0), [], {}, "x"
    for block in range(3):
        start = value
        for layer in range(2):
            name = f"{block}.{layer}"
            weights[f"w{name}"] = generator.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 4
            weights[f"b{name}"] = generator.standard_normal(WIDTH).astype(np.float32)
            nodes.append(helper.make_node("MatMul", [value, f"w{name}"], [f"m{name}"]))
            nodes.append(helper.make_node("Add", [f"m{name}", f"b{name}"], [f"a{name}"]))
            value = f"a{name}"
            if layer == 0:
                nodes.append(helper.make_node("Relu", [value], [f"r{name}"]))
                value = f"r{name}"
        if around:
            nodes.append(helper.make_node(around, [start, value], [f"j{block}"]))
            value = f"j{block}"
    nodes.append(helper.make_node("Identity", [value], ["y"]))
    return save(path, nodes, weights, {"x": [rows, WIDTH]}, {"y": [rows, WIDTH]})


@pytest.mark.parametrize("around", ["Add", "Mul", "Sub"])
def test_blocks_with_a_way_around_them(around: str, tmp_path: Path) -> None:
    path = network(tmp_path / "blocks.onnx", around)
    assert forks(read_network(path))
    given = {f"rows{n}": np.random.default_rng(n).standard_normal((n, WIDTH)).astype(np.float32) for n in (1, 4, 6, 8, 32)}
    np.savez(tmp_path / "given.npz", **given)
    command = [sys.executable, "-c", RUN, str(path), str(tmp_path / "given.npz"), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, f"ended by {ended.returncode}: {ended.stderr[-500:]}"
    session = plain_session(path)
    for name, x in given.items():
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), session.run(None, {"x": x})[0], rtol=1e-3, atol=1e-3)


def test_blocks_in_int8_give_the_same_for_few_rows_and_for_many(tmp_path: Path) -> None:
    model = rt.load(network(tmp_path / "blocks.onnx", "Add"))
    rows = [np.random.default_rng(i).standard_normal((1, WIDTH)).astype(np.float32) for i in range(48)]
    made = rt.optimize(
        model,
        calibration=[{"x": row} for row in rows],
        metric=rt.metrics.correlation,
        precisions=["int8"],
        threads=1,
        budget_s=10,
        max_drop=0.05,
        store=VariantStore(tmp_path / "variants"),
    )
    variant, x = made.variant("int8-openvino"), np.concatenate(rows)
    assert forks(read_network(variant.graph(model.graph)))
    expected = plain_session(model.graph).run(None, {"x": x})[0]
    for count in (1, 2, 4, 8, 48):
        executable = backends()["openvino"].compile(made, "cpu", 1, variant)
        executable.specialise({"x": x[:count]})
        output = executable.run({"x": x[:count]})["y"]
        assert relative_difference(output, expected[:count]) < 0.1, f"{count} rows"


def test_a_fork_before_the_first_quantizer_is_found(tmp_path: Path) -> None:
    """A way around layers that starts where the first one's input is scaled and quantized: one row was wrong by four fifths."""
    shape = draw(5, tmp_path / "tokens.onnx", "tokens")
    model, generator = rt.load(tmp_path / "tokens.onnx"), np.random.default_rng(5)
    data = [{"x": generator.standard_normal((1, *shape)).astype(np.float32)} for _ in range(24)]
    options: dict[str, Any] = {"metric": rt.metrics.correlation, "precisions": ["int8"], "threads": 1, "budget_s": 10, "max_drop": 0.05}
    made = rt.optimize(model, calibration=data, store=VariantStore(tmp_path / "variants"), **options)
    executable = backends()["openvino"].compile(made, "cpu", 1, made.variant("int8-openvino"))
    free = executable.run(data[0])["y"]
    executable.specialise(data[0])
    assert relative_difference(executable.run(data[0])["y"], free) < 0.05


@pytest.mark.parametrize("reduction", ["ReduceMean", "ReduceMax", "ReduceL2"])
def test_a_reduction_before_a_quantizer(reduction: str, tmp_path: Path) -> None:
    """Tokens that are put together before a head in INT8."""
    generator = np.random.default_rng(0)
    weights = {
        "axes": np.array([1]),
        "scale": generator.uniform(0.5, 2, (1, WIDTH)).astype(np.float32),
        "step": np.float32(0.05),
        "zero": np.uint8(128),
    }
    nodes = [
        helper.make_node(reduction, ["x", "axes"], ["together"], keepdims=0),
        helper.make_node("Mul", ["together", "scale"], ["scaled"]),
        helper.make_node("QuantizeLinear", ["scaled", "step", "zero"], ["levels"]),
        helper.make_node("DequantizeLinear", ["levels", "step", "zero"], ["y"]),
    ]
    path = save(tmp_path / "tokens.onnx", nodes, weights, {"x": ["batch", 6, WIDTH]}, {"y": ["batch", WIDTH]}, 18)
    x = generator.standard_normal((40, 6, WIDTH)).astype(np.float32)
    expected = plain_session(path).run(None, {"x": x})[0]
    executable = backends()["openvino"].compile(rt.load(path), "cpu", 1)
    np.testing.assert_allclose(executable.run({"x": x})["y"], expected, atol=0.051)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("told", [False, True])
def test_means_over_time_that_are_scaled_by_channel(keep: int, told: bool, tmp_path: Path) -> None:
    """In float, as pooling and a normalisation have it: all rows but the first were wrong."""
    generator, sizes = np.random.default_rng(0), [1, WIDTH, 1][: 2 + keep]
    weights = {name: generator.uniform(0.5, 2, sizes).astype(np.float32) for name in ("scale", "shift")}
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[-1], keepdims=keep),
        helper.make_node("Mul", ["mean", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["y"]),
    ]
    path = save(tmp_path / "time.onnx", nodes, weights, {"x": ["batch", WIDTH, "time"]}, {"y": ["batch", *sizes[1:]]})
    x = generator.standard_normal((5, WIDTH, 9)).astype(np.float32)
    executable = backends()["openvino"].compile(rt.load(path), "cpu", 1)
    if told:
        executable.specialise({"x": x})
    np.testing.assert_allclose(executable.run({"x": x})["y"], plain_session(path).run(None, {"x": x})[0], atol=1e-5)


def rounding(value: str, name: str) -> list[Any]:
    """A quantizer of 256 steps behind a value, and what takes it back."""
    return [
        helper.make_node("QuantizeLinear", [value, "step", "zero"], [f"{name}_levels"]),
        helper.make_node("DequantizeLinear", [f"{name}_levels", "step", "zero"], [name]),
    ]


@pytest.mark.parametrize("heads", [(), (2,)])
@pytest.mark.parametrize("told", [False, True])
def test_a_product_of_two_computed_matrices_that_is_scaled_by_channel(heads: tuple[int, ...], told: bool, tmp_path: Path) -> None:
    """Attention in INT8 whose output is scaled for the layer behind it: all but the first matrix were wrong."""
    generator, shape = np.random.default_rng(0), ["batch", *heads, 6]
    weights = {"scale": generator.uniform(0.5, 2, WIDTH).astype(np.float32), "step": np.float32(0.05), "zero": np.int8(0)}
    nodes = [
        *rounding("shares", "a"),
        *rounding("x", "b"),
        helper.make_node("MatMul", ["a", "b"], ["product"]),
        helper.make_node("Mul", ["product", "scale"], ["scaled"]),
        *rounding("scaled", "y"),
    ]
    path = save(tmp_path / "attention.onnx", nodes, weights, {"shares": [*shape, 6], "x": [*shape, WIDTH]}, {"y": [*shape, WIDTH]})
    sizes = (5, *heads, 6)
    given = {"shares": generator.uniform(0, 0.4, (*sizes, 6)).astype(np.float32)}
    given["x"] = generator.standard_normal((*sizes, WIDTH)).astype(np.float32)
    executable = backends()["openvino"].compile(rt.load(path), "cpu", 1)
    if told:
        executable.specialise(given)
    np.testing.assert_allclose(executable.run(given)["y"], plain_session(path).run(None, given)[0], atol=0.051)


def test_what_is_quantized_can_be_computed_in_float(tmp_path: Path) -> None:
    """As on processors without VNNI; left to OpenVINO, a quantizer behind scaled means took other channels' ranges for free sizes."""
    import openvino

    generator = np.random.default_rng(0)
    weights = {"scale": generator.uniform(0.3, 3, (1, WIDTH)).astype(np.float32), "step": np.float32(0.05), "zero": np.uint8(128)}
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Mul", ["flat", "scale"], ["scaled"]),
        *rounding("scaled", "y"),
    ]
    path = save(tmp_path / "means.onnx", nodes, weights, {"x": ["batch", "length", WIDTH]}, {"y": ["batch", WIDTH]})
    network = read_network(path)
    compiled = openvino.Core().compile_model(network, "CPU", in_float(network) | {"INFERENCE_PRECISION_HINT": "f32"})
    for rows, length in ((1, 6), (5, 3), (2, 34)):
        x = generator.standard_normal((rows, length, WIDTH)).astype(np.float32)
        np.testing.assert_allclose(compiled(x)[0], plain_session(path).run(None, {"x": x})[0], atol=0.051)


def test_convolutions_over_one_axis_are_unsteady_on_amx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In INT8, with a free batch: then what is compiled for any shape computes in float, and gives the same numbers."""
    generator = np.random.default_rng(0)
    weights = {"w": generator.standard_normal((WIDTH, 4, 3)).astype(np.float32), "step": np.float32(0.05), "zero": np.uint8(128)}
    nodes = [*rounding("x", "q"), helper.make_node("Conv", ["q", "w"], ["y"], pads=[1, 1])]
    model = rt.load(save(tmp_path / "line.onnx", nodes, weights, {"x": ["batch", 4, 20]}, {"y": ["batch", WIDTH, 20]}))
    fixed = read_network(save(tmp_path / "fixed.onnx", nodes, weights, {"x": [2, 4, 20]}, {"y": [2, WIDTH, 20]}))
    x = generator.standard_normal((5, 4, 20)).astype(np.float32)
    expected = plain_session(model.graph).run(None, {"x": x})[0]
    for vector, found in (((), False), (("amx_int8",), True)):
        changed = msgspec.structs.replace(host(), vector=vector)
        monkeypatch.setattr("shared_runtime.backends.openvino_mends.host", lambda changed=changed: changed)
        assert unsteady(read_network(model.graph)) == found
        assert not unsteady(fixed)
        with caplog.at_level("INFO"):
            assert relative_difference(backends()["openvino"].compile(model, "cpu", 1).run({"x": x})["y"], expected) < 0.01
        assert ("computed in float" in caplog.text) == found


def test_the_guard_finds_what_is_wrong_for_many_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same fault in a network that is quantized here, left as it is: one by one all samples are right."""
    shape = draw(21, tmp_path / "tokens.onnx")
    model, generator = rt.load(tmp_path / "tokens.onnx"), np.random.default_rng(0)
    data = [{"x": generator.standard_normal((1, *shape)).astype(np.float32)} for _ in range(24)]
    options: dict[str, Any] = {"metric": rt.metrics.correlation, "precisions": ["int8"], "threads": 1, "budget_s": 10, "max_drop": 0.05}
    made = rt.optimize(model, calibration=data, store=VariantStore(tmp_path / "mended"), **options)
    assert made.certificate("int8-openvino").together == 40
    monkeypatch.setattr("shared_runtime.backends.openvino_mends.part_layers", lambda network: None)
    left = rt.optimize(model, calibration=data, store=VariantStore(tmp_path / "left"), **options)
    assert "40 samples in one run" in left.refused["int8-openvino"]


def test_a_chain_without_forks_is_fused_as_before(tmp_path: Path) -> None:
    assert not forks(read_network(network(tmp_path / "chain.onnx", "")))


def test_a_network_of_eight_rows_is_optimised_without_nncf(tmp_path: Path) -> None:
    model = rt.load(network(tmp_path / "eight.onnx", "Add", 8))
    data = [{"x": np.random.default_rng(i).standard_normal((8, WIDTH)).astype(np.float32)} for i in range(8)]
    options = {"metric": rt.metrics.correlation, "threads": 1, "budget_s": 10, "max_drop": 0.05}
    made = rt.optimize(model, calibration=data, precisions=["int8"], **options)
    assert "export it with a free batch" in made.refused["int8-openvino"]


def test_what_can_not_be_fused_is_compiled_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of several layers may need more registers than there are (INT8 with bfloat16 on AMX)."""
    import openvino

    class Core(openvino.Core):
        def compile_model(self, model: Any, device: str, properties: dict[str, str]) -> Any:
            asked.append(properties.get("SNIPPETS_MODE"))
            if asked[-1] is None:
                raise RuntimeError("Not enough gp registers in the pool to perform manual assignment")
            return super().compile_model(model, device, properties)

    asked: list[str | None] = []
    model = rt.load(network(tmp_path / "chain.onnx", ""))
    executable = backends()["openvino"].compile(model, "cpu", 1)
    monkeypatch.setattr(openvino, "Core", Core)
    x = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)
    executable.specialise({"x": x})
    np.testing.assert_allclose(executable.run({"x": x})["y"], plain_session(model.graph).run(None, {"x": x})[0], rtol=1e-3, atol=1e-3)
    assert asked == [None, "DISABLE"]
