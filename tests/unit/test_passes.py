"""Graph passes: each finds its pattern, changes nothing that matters, and is refused where it would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import shared_runtime as rt
from shared_runtime.graph.memory import plan_memory
from shared_runtime.graph.passes.base import passes, plain_session, run_pass
from shared_runtime.graph.passes.precision import to_float16
from shared_runtime.repository.store import ModelRepository
from shared_runtime.tools import tools
from tests.networks import save

generator = np.random.default_rng(0)
Graph = tuple[list[onnx.NodeProto], dict[str, np.ndarray]]
IMAGE = {"x": ["batch", 4, 6, 6]}


def weight(*shape: int) -> np.ndarray:
    return generator.standard_normal(shape).astype(np.float32)


def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=f"{kind}_{output}", **attributes)


def built(tmp_path: Path, graph: Graph, inputs: dict[str, list] | None = None, opset: int = 20) -> onnx.ModelProto:
    return onnx.load(save(tmp_path / "graph.onnx", *graph, inputs or IMAGE, {"y": ["batch", *(None for _ in range(3))]}, opset))


def applied(model: onnx.ModelProto, name: str, shape: tuple[int, ...] = (2, 4, 6, 6), **options: Any) -> tuple[onnx.ModelProto, Any]:
    probe = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    return run_pass(model, passes()[name], [probe], **options)


def kinds(model: onnx.ModelProto) -> list[str]:
    return [item.op_type for item in model.graph.node]


EXACT: dict[str, tuple[Graph, list[str]]] = {
    "constant-folding": (([node("Add", ["a", "b"], "c"), node("Mul", ["x", "c"], "y")], {"a": weight(1), "b": weight(1)}), ["Mul"]),
    "dead-code": (([node("Relu", ["x"], "y"), node("Exp", ["x"], "unused")], {}), ["Relu"]),
    "common-subexpressions": (
        ([node("Exp", ["x"], "a"), node("Exp", ["x"], "b"), node("Add", ["a", "b"], "y")], {}),
        ["Exp", "Add"],
    ),
    "cancel-transposes": (
        (
            [
                node("Transpose", ["x"], "a", perm=[0, 2, 3, 1]),
                node("Relu", ["a"], "b"),
                node("Transpose", ["b"], "c", perm=[0, 3, 1, 2]),
                node("Neg", ["c"], "y"),
            ],
            {},
        ),
        ["Relu", "Neg"],
    ),
    "cancel-casts": (
        ([node("Identity", ["x"], "a"), node("Cast", ["a"], "b", to=TensorProto.FLOAT), node("Neg", ["b"], "y")], {}),
        ["Neg"],
    ),
    "fold-pads": (
        (
            [node("Pad", ["x", "pads"], "p"), node("Conv", ["p", "w"], "y", pads=[1, 0, 0, 0])],
            {"pads": np.array([0, 0, 1, 2, 0, 0, 0, 1]), "w": weight(5, 4, 3, 3)},
        ),
        ["Conv"],
    ),
    "conv-batchnorm": (
        (
            [
                node("Conv", ["x", "w"], "c"),
                node("BatchNormalization", ["c", "scale", "shift", "mean", "variance"], "n"),
                node("Relu", ["n"], "y"),
            ],
            {"w": weight(5, 4, 3, 3), "scale": weight(5), "shift": weight(5), "mean": weight(5), "variance": np.abs(weight(5)) + 0.1},
        ),
        ["Conv", "Relu"],
    ),
    "silu": (([node("Sigmoid", ["x"], "g"), node("Mul", ["x", "g"], "y")], {}), ["Silu"]),
    "instancenorm-leakyrelu": (
        (
            [node("InstanceNormalization", ["x", "s", "b"], "n", epsilon=1e-3), node("LeakyRelu", ["n"], "y", alpha=0.2)],
            {"s": weight(4), "b": weight(4)},
        ),
        ["InstanceNormLeakyRelu"],
    ),
    "gelu": (
        (
            [
                node("Div", ["x", "root"], "d"),
                node("Erf", ["d"], "e"),
                node("Add", ["e", "one"], "a"),
                node("Mul", ["x", "a"], "m"),
                node("Mul", ["m", "half"], "y"),
            ],
            {"root": np.float32(2**0.5).reshape(1), "one": np.ones(1, np.float32), "half": np.full(1, 0.5, np.float32)},
        ),
        ["Gelu"],
    ),
}


@pytest.mark.parametrize("name", sorted(EXACT))
def test_an_exact_pass_finds_its_pattern_and_keeps_the_numbers(name: str, tmp_path: Path) -> None:
    graph, expected = EXACT[name]
    model = built(tmp_path, graph)
    changed, result = applied(model, name)
    assert not result.refused
    assert kinds(changed) == expected
    assert result.difference is not None
    assert result.difference < 1e-5
    assert kinds(model) != expected or name in ("dead-code",)


@pytest.mark.parametrize("read", ["the second column", "both columns", "the label too"])
def test_a_classifier_whose_label_nobody_reads_becomes_a_regressor(read: str) -> None:
    proto = onnx.load(rt.load("fraud-boosting").graph)
    if read != "the second column":
        proto.graph.node.pop()
        del proto.graph.output[:]
        proto.graph.output.append(helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 2]))
    if read == "the label too":
        proto.graph.output.append(helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]))
    probe = rt.load("fraud-boosting").signature.random(40)
    changed, result = run_pass(proto, passes()["tree-regressor"], [probe])
    assert (
        kinds(changed)
        == {
            "the second column": ["TreeEnsembleRegressor", "Sigmoid"],
            "both columns": ["TreeEnsembleRegressor", "Sigmoid", "Sub", "Concat"],
            "the label too": ["TreeEnsembleClassifier"],
        }[read]
    )
    assert result.refused == ("nothing to do" if read == "the label too" else "")


def test_the_halves_of_gelu_in_the_order_of_other_exporters(tmp_path: Path) -> None:
    nodes = [
        node("Mul", ["x", "half"], "h"),
        node("Mul", ["x", "inverse"], "d"),
        node("Erf", ["d"], "e"),
        node("Add", ["e", "one"], "a"),
        node("Mul", ["h", "a"], "y"),
    ]
    scalars = {"half": 0.5, "inverse": 0.5**0.5, "one": 1.0}
    changed, result = applied(built(tmp_path, (nodes, {k: np.full(1, v, np.float32) for k, v in scalars.items()})), "gelu")
    assert kinds(changed) == ["Gelu"]
    assert result.changes == 1


def test_linear_layernorm_and_weight_sharing(tmp_path: Path) -> None:
    nodes = [
        node("LayerNormalization", ["x", "scale", "shift"], "n"),
        node("MatMul", ["n", "w"], "q"),
        node("MatMul", ["n", "w2"], "k"),
        node("Add", ["q", "k"], "y"),
    ]
    w = weight(6, 6)
    model = built(tmp_path, (nodes, {"scale": weight(6), "shift": weight(6), "w": w, "w2": w.copy()}))
    shared, result = applied(model, "weight-sharing")
    assert result.changes == 1
    assert len(shared.graph.initializer) == 3
    folded, result = applied(model, "linear-layernorm")
    assert result.changes == 1
    assert result.difference < 1e-4
    ones = next(item for item in folded.graph.initializer if item.name == folded.graph.node[0].input[1])
    assert (onnx.numpy_helper.to_array(ones) == 1).all()


def test_opset_upgrade(tmp_path: Path) -> None:
    model = built(tmp_path, ([node("Relu", ["x"], "y")], {}), opset=11)
    changed, result = applied(model, "opset-upgrade", version=18)
    assert changed.opset_import[0].version == 18
    assert "operator set 18 already" in applied(changed, "opset-upgrade", version=18)[1].refused
    assert result.changes == 1


def test_a_pass_that_changes_the_numbers_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Wrong:
        name, summary, tolerance, engine = "wrong", "", 1e-5, ""

        def apply(self, model: onnx.ModelProto, **options: Any) -> int:
            model.graph.node[0].op_type = "Neg"
            return 1

    model = built(tmp_path, ([node("Relu", ["x"], "y")], {}))
    probe = {"x": np.ones((1, 4, 6, 6), np.float32)}
    with caplog.at_level("INFO"):
        kept, result = run_pass(model, Wrong(), [probe])
    assert kept is model
    assert "changes outputs" in result.refused
    assert "pass wrong refused" in caplog.text


def test_a_pass_is_verified_on_inputs_that_the_model_takes(tmp_path: Path, repository: ModelRepository) -> None:
    """Where an input holds sizes, random numbers fit nothing: the example does, and without one nothing is kept."""
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [7]), helper.make_tensor_value_info("sizes", TensorProto.INT64, [2])]
    parts = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "yz"]
    split = helper.make_node("Split", ["i", "sizes"], ["y", "z"])
    graph = helper.make_graph([node("Identity", ["x"], "i"), split], "parts", ends, parts)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "parts.onnx")
    with pytest.raises(rt.ModelError, match="can't be verified, as the graph fails on inputs tried"):
        rt.rewrite(tmp_path / "parts.onnx", ["cancel-casts"], "rewritten", repository=repository)
    example = {"x": np.arange(7, dtype=np.float32), "sizes": np.array([3, 4])}
    made, results = rt.rewrite(rt.load(tmp_path / "parts.onnx", example=example), ["cancel-casts"], "rewritten", repository=repository)
    assert kinds(onnx.load(made.graph)) == ["Split"]
    assert results[0].difference == 0


def test_input_passes_do_what_the_caller_did_before(tmp_path: Path) -> None:
    model = built(tmp_path, ([node("Conv", ["x", "w"], "y")], {"w": weight(2, 4, 3, 3)}))
    x = generator.uniform(0, 255, (2, 4, 6, 6)).astype(np.float32)
    expected = plain_session(model).run(None, {"x": (x - 100) / 50})[0]
    changed, _ = applied(model, "normalize-input", mean=[100] * 4, std=[50] * 4)
    np.testing.assert_allclose(plain_session(changed).run(None, {"x": x})[0], expected, atol=1e-4)
    expected = plain_session(model).run(None, {"x": (np.clip(x, 20, 120) - 20) / 100})[0]
    changed, _ = applied(model, "window-input", center=70, width=100)
    np.testing.assert_allclose(plain_session(changed).run(None, {"x": x})[0], expected, atol=1e-4)
    model, result = applied(model, "channels-last-input", uint8=True)
    assert result.changes == 2
    pixels = x.astype(np.uint8)
    graph = onnx.load(tmp_path / "graph.onnx")
    expected = plain_session(graph).run(None, {"x": pixels.astype(np.float32)})[0]
    np.testing.assert_allclose(plain_session(model).run(None, {"x": pixels.transpose(0, 2, 3, 1)})[0], expected, atol=1e-3)


def test_input_passes_stand_before_each_other(tmp_path: Path) -> None:
    model = built(tmp_path, ([node("Conv", ["x", "w"], "y")], {"w": weight(2, 4, 3, 3)}))
    pixels = generator.integers(0, 255, (2, 6, 6, 4)).astype(np.uint8)
    x = (np.clip(pixels.transpose(0, 3, 1, 2).astype(np.float32), 20, 120) - 20) / 100
    expected = plain_session(model).run(None, {"x": (x - 0.3) / 0.2})[0]
    changed, _ = applied(model, "normalize-input", mean=[0.3] * 4, std=[0.2] * 4)
    changed, _ = applied(changed, "window-input", center=70, width=100)
    changed, _ = applied(changed, "channels-last-input", uint8=True)
    np.testing.assert_allclose(plain_session(changed).run(None, {"x": pixels})[0], expected, atol=1e-3)
    _, result = run_pass(changed, passes()["normalize-input"], (), mean=0, std=1)
    assert "input 'x' is uint8; expected float32" in result.refused


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("normalize-input", {}, "mean and std"),
        ("normalize-input", {"mean": 0, "std": 0}, "above 0"),
        ("window-input", {"center": 0, "width": 0}, "above 0"),
        ("window-input", {"input": "z"}, "no input 'z'"),
        ("normalize-input", {"mean": 0, "std": float("nan")}, "above 0"),
        ("normalize-input", {"mean": [1, 2], "std": 1}, "hold 2 and 1 numbers and input 'x' has 4 channels"),
        ("normalize-input", {"mean": 0, "std": 1, "standard": 2}, "no option 'standard'; it has mean, std, input"),
        ("prune-weights", {"share": 0.5}, "no option 'share'; it has sparsity"),
        ("prune-weights", {"sparsity": 1.5}, "between 0 and 1"),
        ("share-values", {"values": 1}, "2 to 4096"),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = built(tmp_path, ([node("Conv", ["x", "w"], "y")], {"w": weight(8, 4, 3, 3)}))
    kept, result = applied(model, name, **options)
    assert kept is model
    assert words in result.refused


def test_output_passes(tmp_path: Path) -> None:
    model = built(tmp_path, ([node("Conv", ["x", "w"], "y")], {"w": weight(3, 4, 1, 1)}))
    x = weight(2, 4, 6, 6)
    logits = plain_session(model).run(None, {"x": x})[0]
    labels = plain_session(applied(model, "argmax-output")[0]).run(None, {"x": x})[0]
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, logits.argmax(1))
    probabilities = plain_session(applied(model, "softmax-output")[0]).run(None, {"x": x})[0]
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


def test_pruning_channels_keeps_what_matters(tmp_path: Path) -> None:
    first = weight(8, 4, 3, 3)
    first[::2] *= 1e-6
    nodes = [node("Conv", ["x", "w", "b"], "c"), node("Relu", ["c"], "r"), node("Conv", ["r", "v"], "y")]
    model = built(tmp_path, (nodes, {"w": first, "b": np.zeros(8, np.float32), "v": weight(5, 8, 3, 3)}))
    _, result = applied(model, "prune-channels", share=0.5)
    assert result.changes == 4
    assert result.bytes[1] < 0.6 * result.bytes[0]
    assert result.difference < 1e-4


def test_low_rank_and_shared_values(tmp_path: Path) -> None:
    matrix = weight(64, 4) @ weight(4, 64)
    model = built(tmp_path, ([node("MatMul", ["x", "w"], "y")], {"w": matrix}), {"x": ["batch", 1, 1, 64]})
    changed, result = applied(model, "low-rank", (2, 1, 1, 64), energy=0.9999)
    assert kinds(changed) == ["MatMul", "MatMul"]
    assert result.difference < 0.02
    shared, result = applied(model, "share-values", (2, 1, 1, 64), values=16)
    assert len(np.unique(onnx.numpy_helper.to_array(shared.graph.initializer[0]))) <= 16
    assert 0 < result.difference < 0.3
    sparse, _ = applied(model, "prune-weights", (2, 1, 1, 64), sparsity=0.75)
    assert np.mean(onnx.numpy_helper.to_array(sparse.graph.initializer[0]) == 0) == pytest.approx(0.75, abs=0.01)


def test_half_precision_keeps_what_would_overflow_in_float(tmp_path: Path) -> None:
    nodes = [node("Mul", ["x", "big"], "m"), node("Mul", ["m", "small"], "s"), node("Conv", ["s", "w"], "y")]
    weights = {"big": np.full(1, 6e4, np.float32), "small": np.full(1, 1 / 6e4, np.float32), "w": weight(3, 4, 3, 3)}
    model = built(tmp_path, (nodes, weights))
    probe = {"x": 100 * weight(1, 4, 6, 6)}
    from onnx.reference import ReferenceEvaluator

    def outputs(graph: onnx.ModelProto) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return ReferenceEvaluator(graph).run(None, probe)[0]

    expected = outputs(model)
    assert not np.isfinite(outputs(to_float16(model, {}))).all()
    guarded = to_float16(model, {"m": 6e6})
    np.testing.assert_allclose(outputs(guarded), expected, atol=0.02 * np.abs(expected).max())
    assert any(item.data_type == TensorProto.FLOAT16 for item in guarded.graph.initializer)
    _, result = applied(built(tmp_path, ([node("Mul", ["x", "huge"], "y")], {"huge": np.full(1, 1e6, np.float32)})), "fp16")
    assert "half precision ends" in result.refused


def test_every_tool_is_listed_with_one_line() -> None:
    found = tools()
    assert len(found) >= 20
    assert len({tool.name for tool in found}) == len(found)
    assert all(tool.summary and "\n" not in tool.summary for tool in found)
    assert {tool.kind for tool in found} == {"pass", "quantizer", "analysis"}


def test_the_memory_plan_packs_without_overlap_and_reaches_the_lower_bound(tmp_path: Path) -> None:
    model = rt.load("hippocampus-t1")
    inputs = model.signature.random()
    plan = plan_memory(model.graph, inputs)
    for a in plan.placements:
        for b in plan.placements:
            if a is not b and a.first <= b.last and b.first <= a.last:
                assert a.offset + a.size <= b.offset or b.offset + b.size <= a.offset
    assert plan.lower_bound <= plan.arena <= 1.3 * plan.lower_bound
    assert plan_memory(model.graph, model.signature.random(2)).arena >= 1.9 * plan.arena
    with pytest.raises(rt.MemoryBudgetError, match=r"planned peak .* the budget is 20"):
        rt.Session(model, memory_budget_mib=20)
    rt.Session(model, memory_budget_mib=plan.peak / 2**20 + 1).close()


def test_rewrite_keeps_a_model_with_its_work_inside(tmp_path: Path) -> None:
    built(tmp_path, ([node("Conv", ["x", "w"], "y")], {"w": weight(3, 4, 1, 1)}))
    repository = ModelRepository((tmp_path / "models",))
    steps = {"normalize-input": {"mean": [100.0] * 4, "std": [50.0] * 4}, "gelu": {}, "argmax-output": {}}
    made, results = rt.rewrite(tmp_path / "graph.onnx", steps, "labels", repository=repository)
    assert [bool(result.changes) for result in results] == [True, False, True]
    x = generator.uniform(0, 255, (2, 4, 6, 6)).astype(np.float32)
    expected = plain_session(onnx.load(tmp_path / "graph.onnx")).run(None, {"x": (x - 100) / 50})[0].argmax(1)
    with rt.Session(made, threads=1, plans=tmp_path / "plans", budget_s=1.0) as session:
        (labels,) = session.run({"x": x}).values()
    assert np.mean(labels == expected) > 0.99
    assert made.signature.outputs[0].dtype == "uint8"
    with pytest.raises(rt.ModelError, match="no pass 'magic'"):
        rt.rewrite(made, ["magic"], "x", repository=repository)
    with pytest.raises(rt.ModelError, match="no pass changed"):
        rt.rewrite(made, ["gelu"], "x", repository=repository)
    assert repository.names() == ["labels"]


def transformer(tmp_path: Path) -> onnx.ModelProto:
    """One attention with a residual and a layer normalisation, as torch exports it."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
            self.norm = nn.LayerNorm(32)

        def forward(self, x: Any) -> Any:
            rows, steps, _ = x.shape
            q, k, v = (part(x).reshape(rows, steps, 4, 8).transpose(1, 2) for part in (self.q, self.k, self.v))
            mixed = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
            return self.norm(x + self.o(mixed.transpose(1, 2).reshape(rows, steps, 32)))

    return onnx.load(rt.load(Block().eval(), example={"x": np.zeros((1, 6, 32), np.float32)}).graph)


def test_attention_and_bfloat16_of_a_transformer(tmp_path: Path) -> None:
    model = transformer(tmp_path)
    fused, result = applied(model, "attention", (2, 6, 32))
    assert "Attention" in kinds(fused)
    assert result.difference < 1e-5
    half, result = applied(model, "bf16", (2, 6, 32))
    assert 1e-4 < result.difference < 5e-2
    assert any(item.data_type == TensorProto.BFLOAT16 for item in half.graph.initializer)


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        ("nlh,nh->nl", ((2, 5, 3), (2, 3)), ["Unsqueeze", "MatMul", "Squeeze"]),
        ("nl,nlh->nh", ((2, 5), (2, 5, 3)), ["Unsqueeze", "MatMul", "Squeeze"]),
        ("bhqd,bhkd->bhqk", ((2, 3, 4, 5), (2, 3, 6, 5)), ["Transpose", "MatMul"]),
        ("ij,jk->ki", ((4, 5), (5, 6)), ["MatMul", "Transpose"]),
        ("bi,bi->b", ((2, 7), (2, 7)), ["Unsqueeze", "Unsqueeze", "MatMul", "Squeeze", "Squeeze"]),
    ],
)
def test_an_einsum_over_one_index_becomes_a_product(tmp_path: Path, equation: str, shapes: Any, expected: list[str]) -> None:
    graph = [node("Einsum", ["a", "b"], "y", equation=equation)]
    inputs = {name: ["batch", *shape[1:]] for name, shape in zip("ab", shapes, strict=True)}
    model = onnx.load(save(tmp_path / "graph.onnx", graph, {}, inputs, {"y": ["rows"] * len(equation.split("->")[1])}))
    probe = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in zip("ab", shapes, strict=True)}
    changed, result = run_pass(model, passes()["einsum-to-matmul"], [probe])
    assert not result.refused
    assert kinds(changed) == expected


@pytest.mark.parametrize("equation", ["ij,kl->ijkl", "bij,bij->b", "i...,i...->...", "ii,ij->j", "ijk,kl->ijl"])
def test_an_einsum_that_is_no_such_product_is_left(tmp_path: Path, equation: str) -> None:
    rank = len(equation.split("->")[1].replace("...", ""))
    ranks = [len(part.replace("...", "x")) for part in equation.split("->")[0].split(",")]
    inputs = {name: ["n"] * size for name, size in zip("ab", ranks, strict=True)}
    graph = [node("Einsum", ["a", "b"], "y", equation=equation)]
    output = helper.make_graph(
        graph,
        "test",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"] * max(rank, 1))],
    )
    model = helper.make_model(output, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    assert passes()["einsum-to-matmul"].apply(model) == 0
    assert kinds(model) == ["Einsum"]
