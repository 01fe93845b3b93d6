"""The kernel for small networks: every operator against ONNX Runtime, in each version that runs here; what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import shared_runtime as rt
from shared_runtime.backends.base import backends, prepare_any, specialise
from shared_runtime.errors import UnsupportedModelError
from shared_runtime.kernels.fused import reference
from shared_runtime.kernels.fused.lowering import lower
from shared_runtime.kernels.fused.program import CONSTANTS, KINDS, Program
from tests.conftest import absent

VERSIONS = ("any", "avx2", "avx512")
GENERATOR = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def needs_the_kernel() -> None:
    if lacks := backends()["fused"].availability("cpu").lacks:
        absent(f"the fused kernel lacks {lacks}")


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> Iterator[str]:
    from shared_runtime.kernels.fused import _cpu

    best = _cpu.version()
    try:
        _cpu.version(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    _cpu.version(best)


def node(kind: str, *inputs: str, out: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, out.split(), **attributes)


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[Any]],
    constants: dict[str, Any] | None = None,
    outputs: str = "y",
    opset: int = 17,
) -> onnx.ModelProto:
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs.split()]
    graph = helper.make_graph(list(nodes), "g", given, made, values)
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9))


def random(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (GENERATOR.standard_normal(shape) * scale).astype(np.float32)


def by_kernel(program: Program, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    from shared_runtime.kernels.fused import _cpu

    prepared = _cpu.prepare(program.instructions, program.constants, program.scratch, program.sizes, program.work)
    outputs = {name: np.full(shape, 77, np.float32) for name, shape in program.outputs.items()}
    _cpu.run(prepared, *(inputs[name] for name in program.inputs), *outputs.values())
    return outputs


def agree(proto: onnx.ModelProto, inputs: dict[str, np.ndarray], rtol: float = 2e-5, atol: float = 2e-6) -> None:
    """The kernel, the reference and ONNX Runtime give the same."""
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))
    program = lower(proto, {name: value.shape for name, value in inputs.items()})
    for found in (by_kernel(program, inputs), reference.run(program, inputs)):
        for name, value in wanted.items():
            assert found[name].shape == value.shape
            np.testing.assert_allclose(found[name], value, rtol=rtol, atol=atol, err_msg=name)


W = random(26, 40)
INTS = {"one": np.array([1]), "minus": np.array([-1]), "zero": np.array([0]), "two": np.array([2]), "big": np.array([2**62])}
CASES: dict[str, tuple[list[onnx.NodeProto], dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "a dense layer": ([node("Gemm", "x", "w", "b", alpha=0.5, beta=2.0)], {"x": (5, 26)}, {"w": W, "b": random(40)}),
    "its weights turned": ([node("Gemm", "x", "w", transB=1, transA=1)], {"x": (26, 7)}, {"w": random(33, 26)}),
    "a bias a row": ([node("Gemm", "x", "w", "b")], {"x": (6, 26)}, {"w": W, "b": random(6, 1)}),
    "a product of two inputs": ([node("Gemm", "x", "z", "b", transB=1, alpha=2.0)], {"x": (6, 5), "z": (3, 5)}, {"b": random(3)}),
    "rows of a sequence": ([node("MatMul", "x", "w")], {"x": (3, 4, 26)}, {"w": W}),
    "attention": ([node("MatMul", "x", "z")], {"x": (2, 3, 4, 20), "z": (1, 3, 20, 5)}, {}),
    "a vector": ([node("MatMul", "x", "z")], {"x": (2, 3, 17), "z": (17,)}, {}),
    "a constant first": ([node("MatMul", "w", "x")], {"x": (40, 3)}, {"w": W}),
    "scores": ([node("Einsum", "x", "z", equation="nlh,nh->nl")], {"x": (3, 8, 48), "z": (3, 48)}, {}),
    "weighted sum": ([node("Einsum", "x", "z", equation="nl,nlh->nh")], {"x": (3, 8), "z": (3, 8, 48)}, {}),
    "an outer product": ([node("Einsum", "x", "z", equation="ab,cd->dacb")], {"x": (3, 8), "z": (2, 5)}, {}),
    "two sums": ([node("Einsum", "x", "z", equation="abcd,dbe->eac")], {"x": (3, 2, 4, 5), "z": (5, 2, 6)}, {}),
    "a sum of one alone": ([node("Einsum", "x", "z", equation="abx,bcy->ca")], {"x": (3, 4, 5), "z": (4, 2, 3)}, {}),
    "broadcast": ([node("Add", "x", "z")], {"x": (3, 1, 5), "z": (4, 1)}, {}),
    "five axes": ([node("Mul", "x", "z")], {"x": (2, 1, 3, 1, 5), "z": (1, 4, 1, 2, 1)}, {}),
    "scalar": ([node("Div", "s", "x")], {"x": (3, 5)}, {"s": np.float32(3)}),
    "powers": ([node("Abs", "x", out="a"), node("Pow", "a", "p")], {"x": (3, 5)}, {"p": np.float32([2, 0.5, 1.5, 3, 0])}),
    "square": ([node("Pow", "x", "p")], {"x": (3, 5)}, {"p": np.float32(2)}),
    "prelu": ([node("PRelu", "x", "s")], {"x": (3, 5)}, {"s": random(5)}),
    "three terms": ([node("Sum", "x", "x", "s")], {"x": (3, 5)}, {"s": random(5)}),
    "clip": ([node("Clip", "x", "l", "h")], {"x": (3, 50)}, {"l": np.float32(-0.5), "h": np.float32(0.25)}),
    "turned": ([node("Transpose", "x", out="t", perm=[2, 0, 1]), node("Exp", "t")], {"x": (3, 4, 19)}, {}),
    "backwards": (
        [node("Slice", "x", "minus", "far", "one", "minus", out="t"), node("Neg", "t")],
        {"x": (3, 7)},
        INTS | {"far": np.array([-(2**62)])},
    ),
    "slices": ([node("Slice", "x", "one", "big", "zero", "two")], {"x": (9, 4)}, INTS),
    "picked": ([node("Gather", "x", "i", axis=1)], {"x": (3, 7, 2)}, {"i": np.array([[4, 0, -1], [1, 1, 2]])}),
    "one picked": ([node("Gather", "x", "i", axis=1)], {"x": (3, 7, 2)}, {"i": np.array(-2)}),
    "split and joined": (
        [node("Split", "x", "s", out="a b", axis=1), node("Concat", "b", "a", "x", axis=1)],
        {"x": (3, 7)},
        {"s": np.array([2, 5])},
    ),
    "reshaped": ([node("Transpose", "x", out="t"), node("Reshape", "t", "s")], {"x": (6, 4)}, {"s": np.array([0, -1, 3])}),
    "flat": ([node("Flatten", "x", axis=2)], {"x": (2, 3, 4, 5)}, {}),
    "squeezed": ([node("Unsqueeze", "x", "one", out="t"), node("Squeeze", "t", "one")], {"x": (3, 4)}, INTS),
    "expanded": ([node("Expand", "x", "s", out="t"), node("Sigmoid", "t")], {"x": (3, 1)}, {"s": np.array([2, 3, 4])}),
    "shape": (
        [
            node("Shape", "x", out="n"),
            node("Slice", "n", "zero", "one", out="m"),
            node("Concat", "m", "minus", out="s", axis=0),
            node("Reshape", "x", "s"),
        ],
        {"x": (3, 4, 5)},
        INTS,
    ),
    "mean of all": ([node("ReduceMean", "x", keepdims=0)], {"x": (3, 45)}, {}),
    "sum over the middle": ([node("ReduceSum", "x", "one", keepdims=1)], {"x": (3, 40, 5)}, INTS),
    "largest": ([node("ReduceMax", "x", axes=[0, 2], keepdims=0)], {"x": (3, 4, 5)}, {}),
    "least": ([node("ReduceMin", "x", axes=[-1])], {"x": (3, 4, 50)}, {}),
    "pooled": ([node("GlobalAveragePool", "x")], {"x": (3, 4, 5, 6)}, {}),
    "softmax": ([node("Softmax", "x", axis=1)], {"x": (3, 37, 5)}, {}),
    "log softmax": ([node("LogSoftmax", "x")], {"x": (3, 37)}, {}),
    "layer norm": ([node("LayerNormalization", "x", "g", "b", axis=-1)], {"x": (3, 4, 37)}, {"g": random(37), "b": random(37)}),
    "batch norm": (
        [node("BatchNormalization", "x", "g", "b", "m", "v")],
        {"x": (3, 4, 2)},
        {"g": random(4), "b": random(4), "m": random(4), "v": abs(random(4)) + 0.1},
    ),
    "cast": (
        [
            node("Cast", "x", to=TensorProto.FLOAT),
        ],
        {"x": (3, 4)},
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_compute_what_onnxruntime_does(name: str, version: str) -> None:
    nodes, shapes, constants = CASES[name]
    agree(graph_of(nodes, shapes, constants), {key: random(*shape) for key, shape in shapes.items()})


@pytest.mark.parametrize("kind", ["Neg", "Abs", "Sqrt", "Reciprocal", "Relu", "LeakyRelu", "Exp", "Sigmoid", "Tanh", "Sign", "Log", "Elu",
                                  "Softplus", "Erf", "Floor", "HardSigmoid"])  # fmt: skip
def test_functions_of_one_number(kind: str, version: str) -> None:
    x = np.concatenate(
        (random(200, scale=3), random(60, scale=1e-3), random(60, scale=40), np.float32([0, 1, -1, 88, -88, 1e-30, 100, -104]))
    )
    if kind in ("Sqrt", "Log"):
        x = abs(x)
    agree(graph_of([node(kind, "x")], {"x": (len(x),)}), {"x": x}, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["Exp", "Sigmoid", "Tanh", "Log", "Relu", "Abs", "Sign", "Softmax", "ReduceMax"])
def test_what_is_no_number_stays_none(kind: str, version: str) -> None:
    program = lower(graph_of([node(kind, "x")], {"x": (1, 40)}), {"x": (1, 40)})
    x = random(1, 40)
    x[0, 17] = np.nan
    found = by_kernel(program, {"x": x})["y"]
    assert np.isnan(found[0, 17] if found.shape == x.shape else found[0, 0])
    if kind in ("Exp", "Sigmoid", "Tanh", "Log"):
        ends = by_kernel(lower(graph_of([node(kind, "x")], {"x": (3,)}), {"x": (3,)}), {"x": np.float32([-np.inf, np.inf, 0])})["y"]
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(ends, reference.UNARY[kind](np.float32([-np.inf, np.inf, 0]), 0, 0).astype(np.float32))


@pytest.mark.parametrize("hidden", [1, 16, 21, 48])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers(kind: str, direction: str, hidden: int, version: str) -> None:
    both, gates = 1 + (direction == "bidirectional"), (4 if kind == "LSTM" else 3) * hidden
    constants = {"w": random(both, gates, 9), "r": random(both, gates, hidden, scale=0.3), "b": random(both, 2 * gates)}
    first = ["h", "c"] if kind == "LSTM" else ["h"]
    attributes = {} if kind == "LSTM" else {"linear_before_reset": 1}
    outputs = "y last cell" if kind == "LSTM" else "y last"
    made = node(kind, "x", "w", "r", "b", "", *first, out=outputs, hidden_size=hidden, direction=direction, **attributes)
    shapes: dict[str, tuple[int, ...]] = {"x": (6, 5, 9)} | dict.fromkeys(first, (both, 5, hidden))
    agree(graph_of([made], shapes, constants, outputs), {k: random(*s) for k, s in shapes.items()}, atol=1e-5)
    plain = node(kind, "t", "w", "r", out="z", hidden_size=hidden, direction=direction, **attributes)
    turned = [node("Transpose", "x", out="t", perm=[1, 0, 2]), plain, node("Tanh", "z")]
    agree(graph_of(turned, {"x": (3, 6, 9)}, constants), {"x": random(3, 6, 9, scale=3)}, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 9, 11, 13])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 33, 48, 49, 100])
def test_products_of_every_size(rows: int, columns: int, version: str) -> None:
    for depth in (1, 2, 7):
        made = [node("Gemm", "x", "w", "b", out="g"), node("Relu", "g")]
        agree(graph_of(made, {"x": (rows, depth)}, {"w": random(depth, columns), "b": random(columns)}), {"x": random(rows, depth)})


def test_any_number_of_rows_and_of_threads() -> None:
    model = rt.load("fraud-sequence")
    plain = backends()["onnxruntime"].compile(model, "cpu", 1)
    for mode in backends()["fused"].modes("cpu"):
        executable = backends()["fused"].compile(model, "cpu", 3, None, mode)
        specialise(executable, model.signature.random(4))
        requests = [model.signature.random(rows, seed=rows) for rows in (*range(20), 70, 1, 0, 2)]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(executable.run, requests))
        for request, answer in zip(requests, answers, strict=True):
            for name, value in plain.run(request).items():
                assert answer[name].shape == value.shape
                np.testing.assert_allclose(answer[name], value, rtol=1e-4, atol=1e-5)
        executable.close()


def test_a_few_programs_serve_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr("shared_runtime.backends.fused.lower", lambda *given: made.append(given[1]) or lower(*given))
    executable = backends()["fused"].compile(rt.load("fraud-sequence"), "cpu", 1)
    specialise(executable, rt.load("fraud-sequence").signature.random(3))
    prepare_any(executable)
    before = len(made)
    for rows in range(200):
        assert executable.run(rt.load("fraud-sequence").signature.random(rows))["logit"].shape == (rows,)
    assert before == len(made) == 8  # 1, 2, 4 ... 64, and the 3 it was prepared for


def test_rows_that_depend_on_one_another_stay_together(tmp_path: Path) -> None:
    proto = graph_of([node("ReduceMean", "x", out="m", axes=[0]), node("Sub", "x", "m")], {"x": ("rows", 3)})
    onnx.save(proto, tmp_path / "mean.onnx")
    model = rt.load(tmp_path / "mean.onnx")
    executable = backends()["fused"].compile(model, "cpu", 1)
    for rows in (5, 1, 2, 7):
        x = model.signature.random(rows, seed=rows)
        np.testing.assert_allclose(executable.run(x)["y"], x["x"] - x["x"].mean(axis=0), atol=1e-6)
    with pytest.raises(UnsupportedModelError, match="depend on one another"):
        specialise(backends()["fused"].compile(model, "cpu", 2, None, "streams"), model.signature.random(4))


def test_the_plan_takes_it_for_a_small_network_and_the_session_agrees() -> None:
    model = rt.load("fraud-sequence")
    with rt.Session(model, threads=1) as session:
        assert any(candidate.backend == "fused" and not candidate.lost for candidate in session.plan.candidates)
        x = model.signature.random(3, seed=2)
        wanted = backends()["onnxruntime"].compile(model, "cpu", 1).run(x)
        np.testing.assert_allclose(session.run(x)["logit"], wanted["logit"], rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "an operator": (lambda: graph_of([node("Conv", "x", "w")], {"x": (1, 2, 5)}, {"w": random(3, 2, 2)}), "no operator Conv"),
    "much work": (lambda: graph_of([node("MatMul", "x", "w")], {"x": (3000, 100)}, {"w": random(100, 100)}), "more than 20000000 mult"),
    "whole numbers": (lambda: graph_of([node("Cast", "x", out="i", to=7), node("Cast", "i", to=1)], {"x": (3,)}), "casts to another type"),
    "a diagonal": (lambda: graph_of([node("Einsum", "x", "x", equation="aa,ab->b")], {"x": (3, 3)}), "no Einsum"),
    "peepholes": (
        lambda: graph_of(
            [node("LSTM", "x", "w", "r", "", "", "", "", "p", hidden_size=4)],
            {"x": (2, 3, 5)},
            {"w": random(1, 16, 5), "r": random(1, 16, 4), "p": random(1, 12)},
        ),
        "peepholes",
    ),
    "a shape of the inputs": (lambda: graph_of([node("Expand", "x", "x")], {"x": (3,)}), "depends on the inputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_has_not_is_refused_by_name(name: str) -> None:
    make, words = REFUSED[name]
    proto = make()
    shapes = {item.name: tuple(d.dim_value for d in item.type.tensor_type.shape.dim) for item in proto.graph.input}
    with pytest.raises(UnsupportedModelError, match=words):
        lower(proto, shapes, 20_000_000)


def test_a_model_in_another_type_or_for_another_device_is_refused(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["rows", 3]) for name in "xy")
    made = helper.make_model(
        helper.make_graph([node("Tanh", "x")], "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    onnx.save(made, tmp_path / "double.onnx")
    with pytest.raises(UnsupportedModelError, match="float32 alone"):
        backends()["fused"].compile(rt.load(tmp_path / "double.onnx"), "cpu", 1)
    with pytest.raises(rt.BackendUnavailableError, match="no mode 'warp'"):
        backends()["fused"].compile(rt.load("fraud-sequence"), "cpu", 1, None, "warp")


def test_no_program_leads_outside_of_its_arrays() -> None:
    """Whatever number of an instruction is another one: the kernel refuses it or stays inside."""
    from shared_runtime.kernels.fused import _cpu

    layers = [
        node("LSTM", "x", "w", "r", "b", out="z", hidden_size=16),
        node("ReduceMean", "z", out="m", axes=[0, 1], keepdims=0),
        node("Gemm", "m", "v", out="g"),
        node("Softmax", "g"),
    ]
    constants = {"w": random(1, 64, 9), "r": random(1, 64, 16), "b": random(1, 128), "v": random(16, 5)}
    proto = graph_of(layers, {"x": (4, 3, 9)}, constants)
    program = lower(proto, {"x": (4, 3, 9)})
    x, refused, generator = random(4, 3, 9), 0, np.random.default_rng(3)
    for _ in range(3000):
        steps = program.instructions.copy()
        numbers = steps.view(np.int32).reshape(len(steps), -1)
        place = generator.integers(numbers.shape[0]), generator.integers(numbers.shape[1] - 2)
        numbers[place] = generator.choice([-1, 0, 1, 3, 5, 17, 64, 1000, 2**30, -(2**31), 2**31 - 1])
        try:
            prepared = _cpu.prepare(steps, program.constants, program.scratch, program.sizes, program.work)
        except ValueError:
            refused += 1
        else:
            if abs(int(numbers[place])) < 100:
                _cpu.run(prepared, x, *(np.empty(shape, np.float32) for shape in program.outputs.values()))
    assert refused > 300
    first = program.instructions.copy()
    first[0]["operand"][0]["space"] = CONSTANTS
    with pytest.raises(ValueError, match="instruction 0"):
        _cpu.prepare(first, program.constants, program.scratch, program.sizes, program.work)
    prepared = _cpu.prepare(program.instructions, program.constants, program.scratch, program.sizes, program.work)
    with pytest.raises(ValueError, match="expected 108 floats"):
        _cpu.run(prepared, x[:2], np.empty(program.outputs["y"], np.float32))
    with pytest.raises(ValueError, match="1 arrays, expected 2"):
        _cpu.run(prepared, x)
    with pytest.raises(ValueError, match="seconds of"):
        _cpu.timed(prepared, np.zeros(1), x, np.empty(program.outputs["y"], np.float32))
    with pytest.raises(TypeError, match="missing"):
        _cpu.run()  # type: ignore[call-arg]
    assert KINDS["Copy"] == 0
