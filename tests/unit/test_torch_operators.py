"""The torch backend's operators, each beside ONNX Runtime on the same graph, run as it stands and for shapes that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.graph.passes.base import plain_session
from shared_runtime.numeric import relative_difference

torch = pytest.importorskip("torch")
GENERATOR = np.random.default_rng(0)
ANY = TensorProto.UNDEFINED


def normal(*shape: int) -> np.ndarray:
    return GENERATOR.standard_normal(shape).astype(np.float32)


X = normal(2, 4, 9, 10)
INDICES = np.array([[[1, -1, 0]], [[2, 0, 1]]])
CASES: list[tuple[str, list[np.ndarray | None], dict[str, Any], int, int]] = [
    *[
        ("Conv", [X, normal(6, 4, 3, 2), normal(6)], {"auto_pad": auto, "strides": strides}, 1, 18)
        for auto in ("SAME_UPPER", "SAME_LOWER", "VALID")
        for strides in ([1, 1], [2, 3])
    ],
    ("Conv", [X, normal(8, 2, 3, 3)], {"pads": [1, 0, 2, 1], "group": 2}, 1, 18),
    ("ConvTranspose", [X, normal(4, 3, 3, 3)], {"strides": [2, 2], "pads": [0, 1, 1, 0]}, 1, 18),
    ("ConvTranspose", [X, normal(4, 3, 3, 3)], {"strides": [2, 2], "output_shape": [18, 20]}, 1, 18),
    ("ConvTranspose", [X, normal(4, 3, 3, 3), normal(3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}, 1, 18),
    ("ConvTranspose", [X, normal(4, 3, 3, 3)], {"strides": [2, 2], "output_padding": [1, 1]}, 1, 18),
    *[
        ("MaxPool", [X], {"kernel_shape": [3, 2], "strides": [2, 2], **more}, 1, 18)
        for more in ({}, {"pads": [1, 0, 1, 1]}, {"ceil_mode": 1}, {"auto_pad": "SAME_LOWER"}, {"dilations": [2, 2]})
    ],
    *[
        ("AveragePool", [X], {"kernel_shape": [3, 2], "strides": [2, 3], "count_include_pad": counted, **more}, 1, 19)
        for counted in (0, 1)
        for more in ({}, {"pads": [1, 0, 1, 1]}, {"ceil_mode": 1}, {"ceil_mode": 1, "pads": [1, 1, 1, 0]}, {"auto_pad": "SAME_UPPER"})
    ],
    ("Slice", [X, np.array([-1]), np.array([-100]), np.array([2]), np.array([-2])], {}, 1, 18),
    ("Slice", [X, np.array([7, 1]), np.array([2, 100]), np.array([3, 1]), np.array([-3, 2])], {}, 1, 18),
    ("Slice", [X], {"starts": [1], "ends": [3], "axes": [1]}, 1, 9),
    ("Pad", [X, np.array([1, 2, 0, 3]), np.float32(0.5), np.array([2, -1])], {}, 1, 18),
    ("Pad", [X, np.array([0, 0, 1, 2, 0, 0, 3, 0])], {"mode": "reflect"}, 1, 18),
    ("Pad", [X], {"pads": [0, 0, 1, 2, 0, 0, 3, 0], "value": 1.5}, 1, 10),
    *[
        ("Resize", [X, None, np.array([1, 1, *scales], np.float32)], {"mode": mode, "coordinate_transformation_mode": place, **more}, 1, 18)
        for scales in ((2, 2), (0.6, 1.7))
        for place in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
        for mode, more in (("linear", {}), *[("nearest", {"nearest_mode": r}) for r in ("floor", "ceil", "round_prefer_floor")])
    ],
    ("Resize", [X, None, None, np.array([2, 4, 5, 21])], {"mode": "cubic"}, 1, 18),
    ("Resize", [X, np.array([1, 1, 2, 3], np.float32)], {"mode": "linear"}, 1, 10),
    ("Upsample", [X, np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}, 1, 9),
    ("DepthToSpace", [X], {"blocksize": 2}, 1, 18),
    ("DepthToSpace", [X], {"blocksize": 2, "mode": "CRD"}, 1, 18),
    ("SpaceToDepth", [normal(2, 3, 4, 6)], {"blocksize": 2}, 1, 18),
    *[(kind, [X], {"axes": [1, 3], "keepdims": 0}, 1, 17) for kind in ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp")],
    ("ReduceLogSum", [np.abs(X)], {"axes": [2]}, 1, 17),
    *[(kind, [X], {"axis": 2}, 1, version) for kind in ("Softmax", "LogSoftmax") for version in (11, 13)],
    ("Softmax", [X], {}, 1, 11),
    ("Clip", [X], {"min": -0.5, "max": 0.25}, 1, 10),
    ("Clip", [X, None, np.float32(0.25)], {}, 1, 18),
    *[("CumSum", [X, np.array(2)], {"exclusive": e, "reverse": r}, 1, 18) for e in (0, 1) for r in (0, 1)],
    ("Trilu", [X, np.array(1)], {"upper": 0}, 1, 18),
    ("Trilu", [X], {}, 1, 18),
    ("GatherElements", [normal(2, 3, 3), INDICES], {"axis": 1}, 1, 18),
    ("ScatterElements", [normal(2, 3, 3), INDICES, normal(2, 1, 3)], {"axis": 1}, 1, 18),
    ("ScatterElements", [normal(2, 3, 3), INDICES, normal(2, 1, 3)], {"axis": 1, "reduction": "add"}, 1, 18),
    ("GatherND", [X, np.array([[0, 1], [-1, 3]])], {}, 1, 18),
    ("ScatterND", [X, np.array([[0, 1], [-1, 3]]), normal(2, 9, 10)], {}, 1, 18),
    ("ArgMin", [X], {"axis": 1}, 1, 18),
    ("LpNormalization", [X], {"axis": 1}, 1, 18),
    ("LRN", [X], {"size": 3, "alpha": 0.1}, 1, 18),
    ("Mod", [np.array([-7, 7, 5]), np.array([3, -3, 3])], {}, 1, 18),
    ("Mod", [X, np.float32(0.3)], {"fmod": 1}, 1, 18),
    ("Mean", [X, normal(4, 1, 1), X], {}, 1, 18),
    ("Sum", [X, X, normal(10)], {}, 1, 18),
    *[
        (kind, [X], {}, 1, 18)
        for kind in ("Atan", "Ceil", "Celu", "Cos", "Mish", "Round", "Selu", "Sin", "Size", "Softsign", "ThresholdedRelu")
    ],
    *[(kind, [X, normal(10)], {}, 1, 18) for kind in ("GreaterOrEqual", "LessOrEqual")],
    *[(kind, [X > 0, X > 0.5], {}, 1, 18) for kind in ("Or", "Xor")],
    *[
        (
            kind,
            [
                normal(5, 2, 3),
                *(normal(1 + (way == "bidirectional"), gates * 4, n) for n in (3, 4)),
                normal(1 + (way == "bidirectional"), 8 * gates),
            ],
            {"hidden_size": 4, "direction": way, **more},
            outputs,
            18,
        )
        for kind, gates, outputs, more in (("LSTM", 4, 3, {}), ("GRU", 3, 2, {"linear_before_reset": 1}))
        for way in ("forward", "reverse", "bidirectional")
    ],
    ("TopK", [X], {"k": 3, "axis": 2}, 2, 9),
]


def graph(path: Path, kind: str, inputs: list[np.ndarray | None], attributes: dict[str, Any], outputs: int, version: int) -> Path:
    """Floats and flags of several numbers come in, the rest is constant."""
    names = ["" if value is None else f"i{place}" for place, value in enumerate(inputs)]
    moving = [place for place, value in enumerate(inputs) if value is not None and (place == 0 or (value.dtype == bool or value.size > 40))]
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64, np.dtype(bool): TensorProto.BOOL}
    ends = [helper.make_tensor_value_info(names[p], types[inputs[p].dtype], inputs[p].shape) for p in moving]  # type: ignore[union-attr]
    fixed = [numpy_helper.from_array(np.asarray(v), n) for p, (n, v) in enumerate(zip(names, inputs, strict=True)) if n and p not in moving]
    made = [f"o{place}" for place in range(outputs)]
    node = helper.make_node(kind, names, made, **attributes)
    whole = helper.make_graph([node], kind, ends, [onnx.ValueInfoProto(name=name) for name in made], fixed)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", version)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("case", CASES, ids=[f"{place}-{case[0]}" for place, case in enumerate(CASES)])
def test_an_operator_computes_what_onnx_runtime_computes(case: tuple[Any, ...], tmp_path: Path) -> None:
    from shared_runtime.backends.torch_graph import GraphProgram

    path = graph(tmp_path / "one.onnx", *case)
    session = plain_session(path)
    given = {item.name: case[1][int(item.name[1:])] for item in session.get_inputs()}
    expected = session.run(None, given)
    program = GraphProgram(path, "cpu")
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    for got in ([program(tensors)[name] for name in program.outputs], program.straight(tensors)(*tensors.values())):
        for mine, theirs in zip(got, expected, strict=True):
            assert relative_difference(mine.numpy(), np.asarray(theirs)) <= 1e-6


@pytest.mark.parametrize(
    ("kind", "inputs", "attributes"),
    [
        ("GRU", [normal(5, 2, 3), normal(1, 12, 3), normal(1, 12, 4)], {"hidden_size": 4}),
        ("Resize", [X, None, np.array([1, 1, 2, 2], np.float32)], {"mode": "cubic", "coordinate_transformation_mode": "asymmetric"}),
        ("AveragePool", [X], {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    ],
)
def test_what_has_no_torch_form_is_a_refusal_when_it_runs(kind: str, inputs: list[Any], attributes: dict[str, Any], tmp_path: Path) -> None:
    """A plan on a GPU goes on with the other engines."""
    import shared_runtime as rt
    from shared_runtime.backends.base import backends

    model = rt.load(graph(tmp_path / "odd.onnx", kind, inputs, attributes, 1, 19))
    with pytest.raises(UnsupportedModelError, match=kind if kind != "AveragePool" else "dilated averages"):
        backends()["torch"].compile(model, "cpu", 1).run(model.random())


def test_shapes_in_any_type_of_number_are_known_before_it_runs(tmp_path: Path) -> None:
    """As TensorFlow's converter writes them, in int32 and scaled: a program whose shapes are known can be captured on a GPU."""
    from shared_runtime.backends.torch_graph import GraphProgram

    nodes = [
        helper.make_node("Shape", ["x"], ["long"]),
        helper.make_node("Cast", ["long"], ["shape"], to=TensorProto.INT32),
        helper.make_node("Slice", ["shape", "zero", "one"], ["rows"]),
        helper.make_node("Concat", ["rows", "more"], ["target"], axis=0),
        helper.make_node("Cast", ["target"], ["scaled"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["scaled", "factor"], ["doubled"]),
        helper.make_node("Cast", ["doubled"], ["sizes"], to=TensorProto.INT64),
        helper.make_node("Expand", ["x", "sizes"], ["y"]),
    ]
    constants = {"zero": np.array([0]), "one": np.array([1]), "more": np.array([3], np.int32), "factor": np.array([1, 2], np.float32)}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", ["n", 1]), ("y", ["n", 6]))]
    whole = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(v, k) for k, v in constants.items()])
    onnx.save(helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "shapes.onnx")
    x = torch.from_numpy(normal(5, 1))
    module = GraphProgram(tmp_path / "shapes.onnx", "cpu").straight({"x": x})
    assert [node.op for node in module.graph.nodes] == ["placeholder", "call_function", "output"]
    np.testing.assert_array_equal(module(x)[0].numpy(), np.repeat(x.numpy(), 6, 1))


def test_equal_numbers_are_ranked_as_onnx_ranks_them(tmp_path: Path) -> None:
    x = np.repeat(normal(3, 4), 3, 1)
    case = ("TopK", [x, np.array([5])], {"axis": 1}, 2, 18)
    test_an_operator_computes_what_onnx_runtime_computes(case, tmp_path)


def test_rows_are_filled_up_only_where_none_depends_on_another(tmp_path: Path) -> None:
    """A captured graph takes fewer rows than it was captured for: not so one that attends over them, nor one with states by layer."""
    import shared_runtime as rt
    from shared_runtime.backends.base import backends

    relu, softmax = helper.make_node("Relu", ["i0"], ["o0"]), helper.make_node("Softmax", ["i0"], ["o0"], axis=0)
    for node, parted in ((relu, True), (softmax, False)):
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("i0", "o0")]
        whole = helper.make_graph([node], "g", ends[:1], ends[1:])
        path = tmp_path / f"{node.op_type}.onnx"
        onnx.save(helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        executable = backends()["torch"].compile(rt.load(path), "cpu", 1)
        assert executable._may_be_parted({"i0": normal(3, 4)}) is parted
    recurrent = [normal(5, 2, 3), normal(1, 16, 3), normal(1, 16, 4)]
    model = rt.load(graph(tmp_path / "lstm.onnx", "LSTM", recurrent, {"hidden_size": 4}, 3, 18))
    assert backends()["torch"].compile(model, "cpu", 1)._may_be_parted(model.random()) is False
