"""Makes a program of an ONNX graph, for inputs of given shapes: what depends on shapes or constants alone is computed here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.kernels.fused.program import BINARY, REDUCE, SOFTMAX, UNARY, Builder, Program, View

Value = View | NDArray[Any]
Rule = Callable[["_Lowering", onnx.NodeProto, list[Value | None], dict[str, Any]], list[Value]]
RULES: dict[str, Rule] = {}
MOST_PARTS = 64
"""Most pieces that an operator may be cut into."""


def lower(proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], most_work: int | None = None) -> Program:
    """The program of a graph with those input shapes. Raises UnsupportedModelError with what the kernel lacks, and where a run
    takes more multiplications than `most_work`."""
    refuse_unknown_operators(proto)
    lowering = _Lowering(proto, Builder(dict(shapes), most_work))
    for node in proto.graph.node:
        lowering.take(node)
    outputs = {}
    for output in proto.graph.output:
        if output.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
            raise UnsupportedModelError(f"output {output.name!r} is not in float32")
        outputs[output.name] = lowering.view(lowering.values[output.name])
    return lowering.builder.finish(outputs)


def refuse_unknown_operators(proto: onnx.ModelProto) -> None:
    """Raises UnsupportedModelError where a graph has operators that the kernel does not have."""
    strange = sorted({node.op_type for node in proto.graph.node if node.op_type not in RULES and node.op_type not in FOLDED})
    if strange:
        raise UnsupportedModelError(f"the fused kernel has no operator {', '.join(strange[:5])}")


class _Lowering:
    """Values by name: an array where they are known, a view where the kernel computes them."""

    def __init__(self, proto: onnx.ModelProto, builder: Builder) -> None:
        self.opsets = list(proto.opset_import)
        self.version = next((o.version for o in self.opsets if o.domain in ("", "ai.onnx")), 1)
        self.builder = builder
        self.values: dict[str, Value] = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
        self.values |= self.builder.given

    def take(self, node: onnx.NodeProto) -> None:
        """Add what a node computes."""
        if node.domain not in ("", "ai.onnx"):
            raise UnsupportedModelError(f"the fused kernel has no operator {node.domain}.{node.op_type}")
        self.builder.source = node.name or node.output[0], node.op_type
        inputs = [self.values[name] if name else None for name in node.input]
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type == "Shape" and isinstance(inputs[0], View):
            results: list[Value] = [np.array(inputs[0].shape, np.int64)[attributes.get("start", 0) : attributes.get("end")]]
        elif not any(isinstance(value, View) for value in inputs):
            results = self._folded(node)
        elif node.op_type in RULES:
            results = RULES[node.op_type](self, node, inputs, attributes)
        else:
            raise UnsupportedModelError(f"the fused kernel has {node.op_type} for constants alone")
        self.values |= {name: value for name, value in zip(node.output, results, strict=False) if name}

    def _folded(self, node: onnx.NodeProto) -> list[Value]:
        given = [name for name in dict.fromkeys(node.input) if name]
        feeds: dict[str, Any] = {name: self.values[name] for name in given}
        inputs = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(feeds[n].dtype), feeds[n].shape) for n in given]
        outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
        graph = helper.make_graph([node], "constant", inputs, outputs)
        return list(ReferenceEvaluator(helper.make_model(graph, opset_imports=self.opsets)).run(None, feeds))

    def view(self, value: Value | None) -> View:
        """A value as the kernel reads it."""
        if isinstance(value, View):
            return value
        if value is None or value.dtype not in (np.float32, np.float64, np.float16):
            raise UnsupportedModelError(f"a tensor of {getattr(value, 'dtype', None)}; the fused kernel computes in float32")
        return self.builder.constant(value)


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


FOLDED = {"Constant", "ConstantOfShape", "Range", "Equal", "Where", "Not", "And", "Or", "Less", "Greater", "Mod", "Tile", "NonZero", "Size"}
"""Operators that only constants may go through, beside those with a rule."""


def _known(value: Value | None, what: str) -> NDArray[Any]:
    if not isinstance(value, np.ndarray):
        raise UnsupportedModelError(f"{what} depends on the inputs; the fused kernel needs it beforehand")
    return value


def _axes(inputs: list[Value | None], attributes: Mapping[str, Any], place: int = 1) -> list[int] | None:
    """Axes, given as an input or, by older operators, as an attribute."""
    if len(inputs) > place and inputs[place] is not None:
        return [int(a) for a in _known(inputs[place], "the axes").ravel()]
    return [int(a) for a in attributes["axes"]] if "axes" in attributes else None


@_rule("Identity", "Dropout")
def _same(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    return [lowering.view(inputs[0])]


@_rule("Cast")
def _cast(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    if attributes["to"] != onnx.TensorProto.FLOAT:
        raise UnsupportedModelError("the fused kernel computes in float32 alone; the graph casts to another type")
    return [lowering.view(inputs[0])]


PARAMETERS = {"LeakyRelu": (0.01, 0.0), "Elu": (1.0, 0.0), "HardSigmoid": (0.2, 0.5)}


@_rule(*(name for name in UNARY if name != "Copy"))
def _unary(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    if attributes.get("approximate", b"none") != b"none":
        raise UnsupportedModelError("the fused kernel has no approximate Gelu")
    alpha, beta = PARAMETERS.get(node.op_type, (0.0, 0.0))
    alpha, beta = float(attributes.get("alpha", alpha)), float(attributes.get("beta", beta))
    return [lowering.builder.unary(node.op_type, lowering.view(inputs[0]), alpha, beta)]


@_rule(*BINARY, "Sum", "PRelu")
def _binary(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    build, views = lowering.builder, [lowering.view(value) for value in inputs]
    if node.op_type == "PRelu":
        low = build.binary("Mul", build.binary("Min", views[0], build.constant(np.zeros(()))), views[1])
        return [build.binary("Add", build.unary("Relu", views[0]), low)]
    if node.op_type == "Pow" and isinstance(inputs[1], np.ndarray) and inputs[1].size == 1 and inputs[1].ravel()[0] in (2, 0.5):
        if inputs[1].ravel()[0] == 2:
            return [build.binary("Mul", views[0], views[0])]
        return [build.unary("Sqrt", views[0])]
    result = views[0]
    for other in views[1:]:
        result = build.binary("Add" if node.op_type == "Sum" else node.op_type, result, other)
    return [result]


@_rule("Clip")
def _clip(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    result = lowering.view(inputs[0])
    for place, name, kind in ((1, "min", "Max"), (2, "max", "Min")):
        limit = inputs[place] if len(inputs) > place else None
        if limit is None and name in attributes:
            limit = np.array(attributes[name], np.float32)
        if limit is not None:
            result = lowering.builder.binary(kind, result, lowering.view(limit))
    return [result]


@_rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    shape = list(x.shape)
    if node.op_type == "Reshape":
        wanted = [int(n) for n in _known(inputs[1], "a shape")]
        if not attributes.get("allowzero", 0):
            wanted = [shape[i] if n == 0 else n for i, n in enumerate(wanted)]
        rest = math.prod(n for n in wanted if n != -1)
        wanted = [math.prod(shape) // rest if n == -1 and rest else n for n in wanted]
        if math.prod(wanted) != math.prod(shape):
            raise UnsupportedModelError(f"a tensor of shape {shape} can't become {wanted}")
        return [lowering.builder.reshaped(x, wanted)]
    if node.op_type == "Flatten":
        axis = attributes.get("axis", 1)
        axis += len(shape) if axis < 0 else 0
        return [lowering.builder.reshaped(x, (math.prod(shape[:axis]), math.prod(shape[axis:])))]
    axes = _axes(inputs, attributes)
    if node.op_type == "Squeeze":
        gone = {a % len(shape) for a in axes} if axes is not None else {a for a, n in enumerate(shape) if n == 1}
        for axis in sorted(gone, reverse=True):
            x = x.without(axis)
        return [x]
    for axis in sorted(a % (len(shape) + len(axes or [])) for a in axes or []):
        x = x.inserted(axis)
    return [x]


@_rule("Transpose")
def _transpose(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    return [x.transposed(attributes.get("perm", range(len(x.shape))[::-1]))]


@_rule("Expand")
def _expand(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    return [x.broadcast(np.broadcast_shapes(x.shape, tuple(int(n) for n in _known(inputs[1], "a shape"))))]


@_rule("Slice")
def _slice(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    names = ("starts", "ends", "axes", "steps")
    given = dict(zip(names, (_known(v, "a slice").ravel().tolist() if v is not None else None for v in inputs[1:]), strict=False))
    starts, ends, axes, steps = (given.get(name) or attributes.get(name) or [] for name in names)
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis, step = (axes[i] if axes else i) % len(x.shape), steps[i] if steps else 1
        taken = range(*slice(start, end, step).indices(x.shape[axis]))
        if not taken:
            raise UnsupportedModelError("a slice without elements")
        x = x.picked(axis, taken[0], step, len(taken))
    return [x]


@_rule("Gather")
def _gather(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x, indices = lowering.view(inputs[0]), _known(inputs[1], "what is gathered")
    axis = attributes.get("axis", 0) % len(x.shape)
    flat = [int(i) % x.shape[axis] for i in indices.ravel()]
    steps = {b - a for a, b in itertools.pairwise(flat)}
    if len(steps) <= 1:
        found = x.picked(axis, flat[0], steps.pop() if steps else 1, len(flat))
    else:
        found = _joined(lowering, [x.picked(axis, i, 1, 1) for i in flat], axis)
    if indices.ndim < 2:
        return [found if indices.ndim else found.without(axis)]
    return [lowering.builder.reshaped(found, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))]


@_rule("Split")
def _split(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    axis, parts = attributes.get("axis", 0) % len(x.shape), len(node.output)
    given = _known(inputs[1], "the sizes") if len(inputs) > 1 and inputs[1] is not None else attributes.get("split")
    each = -(-x.shape[axis] // parts)
    sizes = [int(n) for n in np.ravel(given)] if given is not None else [min(each, x.shape[axis] - each * i) for i in range(parts)]
    starts = np.cumsum([0, *sizes]).tolist()
    return [x.picked(axis, start, 1, size) for start, size in zip(starts, sizes, strict=False)]


@_rule("Concat")
def _concat(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    views = [lowering.view(value) for value in inputs]
    return [_joined(lowering, views, attributes["axis"] % len(views[0].shape))]


def _joined(lowering: _Lowering, views: Sequence[View], axis: int) -> View:
    views = [v for v in views if v.shape[axis]]
    if len(views) > MOST_PARTS:
        raise UnsupportedModelError(f"{len(views)} pieces are joined; the fused kernel joins {MOST_PARTS}")
    shape = list(views[0].shape)
    shape[axis] = sum(v.shape[axis] for v in views)
    whole, start = lowering.builder.new(shape), 0
    for view in views:
        lowering.builder.nest("Copy", whole.picked(axis, start, 1, view.shape[axis]), [view])
        start += view.shape[axis]
    return whole


@_rule(*REDUCE)
def _reduce(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    axes = _axes(inputs, attributes)
    if not axes and attributes.get("noop_with_empty_axes", 0):
        return [x]
    chosen = sorted({a % len(x.shape) for a in axes} if axes else range(len(x.shape)))
    return [lowering.builder.reduced(node.op_type, x, chosen, bool(attributes.get("keepdims", 1)))]


@_rule("GlobalAveragePool")
def _average(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    return [lowering.builder.reduced("ReduceMean", x, range(2, len(x.shape)), keep=True)]


@_rule(*SOFTMAX)
def _softmax(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    if lowering.version >= 13:
        return [lowering.builder.softmax(node.op_type, x, attributes.get("axis", -1) % len(x.shape))]
    axis = attributes.get("axis", 1) % len(x.shape)
    flat = lowering.builder.reshaped(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))
    return [lowering.builder.reshaped(lowering.builder.softmax(node.op_type, flat, 1), x.shape)]


@_rule("LayerNormalization")
def _layer_norm(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    if len([name for name in node.output if name]) > 1:
        raise UnsupportedModelError("the fused kernel does not give the mean of a layer normalization")
    build, x = lowering.builder, lowering.view(inputs[0])
    axes = list(range(attributes.get("axis", -1) % len(x.shape), len(x.shape)))
    centred = build.binary("Sub", x, build.reduced("ReduceMean", x, axes, keep=True))
    variance = build.reduced("ReduceMean", build.binary("Mul", centred, centred), axes, keep=True)
    epsilon = build.constant(np.array(attributes.get("epsilon", 1e-5)))
    result = build.binary("Div", centred, build.unary("Sqrt", build.binary("Add", variance, epsilon)))
    result = build.binary("Mul", result, lowering.view(inputs[1]))
    return [build.binary("Add", result, lowering.view(inputs[2])) if len(inputs) > 2 and inputs[2] is not None else result]


@_rule("BatchNormalization")
def _batch_norm(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    scale, bias, mean, variance = (_known(value, "a batch normalization").astype(np.float64) for value in inputs[1:5])
    if attributes.get("training_mode", 0):
        raise UnsupportedModelError("a batch normalization that learns")
    factor = scale / np.sqrt(variance + attributes.get("epsilon", 1e-5))
    wide = (-1, *[1] * (len(x.shape) - 2))
    scaled = lowering.builder.binary("Mul", x, lowering.builder.constant(factor.reshape(wide)))
    return [lowering.builder.binary("Add", scaled, lowering.builder.constant((bias - mean * factor).reshape(wide)))]


@_rule("Gemm")
def _gemm(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    build, a = lowering.builder, lowering.view(inputs[0])
    if attributes.get("transA", 0):
        a = a.transposed((1, 0))
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    start: Value | None = inputs[2] if len(inputs) > 2 else None
    if isinstance(start, np.ndarray):
        start = build.constant(start * np.float32(beta))
    elif start is not None and beta != 1:
        start = build.binary("Mul", start, build.constant(np.array(beta)))
    if isinstance(inputs[1], np.ndarray):
        weights = inputs[1].T if attributes.get("transB", 0) else inputs[1]
        return [build.product(a, weights * np.float32(alpha), start)]
    b = lowering.view(inputs[1])
    b = b.transposed((1, 0)) if attributes.get("transB", 0) else b
    result = build.contraction(a.inserted(0), b.inserted(0))
    result = build.reshaped(result, result.shape[1:])
    result = result if alpha == 1 else build.binary("Mul", result, build.constant(np.array(alpha)))
    return [result if start is None else build.binary("Add", result, start)]


@_rule("MatMul")
def _matmul(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    build, a = lowering.builder, lowering.view(inputs[0])
    if isinstance(inputs[1], np.ndarray) and inputs[1].ndim == 2 and len(a.shape) >= 2:
        rows = build.one(a, 0, len(a.shape) - 1)
        return [build.reshaped(build.product(rows, inputs[1].astype(np.float32)), (*a.shape[:-1], inputs[1].shape[1]))]
    b = lowering.view(inputs[1])
    one_row, one_column = len(a.shape) == 1, len(b.shape) == 1
    a = a.inserted(0) if one_row else a
    b = b.inserted(1) if one_column else b
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    result = build.contraction(*(build.one(v.broadcast((*batch, *v.shape[-2:])), 0, len(batch)) for v in (a, b)))
    shape = (*batch, *(() if one_row else a.shape[-2:-1]), *(() if one_column else b.shape[-1:]))
    return [build.reshaped(result, shape)]


@_rule("Einsum")
def _einsum(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    equation = attributes["equation"].decode().replace(" ", "")
    sources, _, out = equation.partition("->")
    labels = sources.split(",")
    if "->" not in equation or "." in equation or len(labels) != 2 or any(len(set(text)) != len(text) for text in (*labels, out)):
        raise UnsupportedModelError(f"the fused kernel has no Einsum {equation!r}")
    build, views = lowering.builder, [lowering.view(value) for value in inputs]
    for place, other in ((0, 1), (1, 0)):  # what one operand alone sums over
        if lost := [axis for axis, c in enumerate(labels[place]) if c not in labels[other] + out]:
            views[place] = build.reduced("ReduceSum", views[place], lost, keep=False)
            labels[place] = "".join(c for axis, c in enumerate(labels[place]) if axis not in lost)
    (left, right), (a, b) = labels, views
    batch, rows = [c for c in out if c in left and c in right], [c for c in left if c not in right]
    columns, depth = [c for c in right if c not in left], [c for c in left if c in right and c not in out]
    sizes = dict(zip(left, a.shape, strict=True))
    if any(sizes.setdefault(c, n) != n for c, n in zip(right, b.shape, strict=True)):
        raise UnsupportedModelError(f"Einsum {equation!r} of tensors of shape {list(a.shape)} and {list(b.shape)}")

    def grouped(view: View, own: str, groups: Sequence[list[str]]) -> View:
        view = view.transposed([own.index(c) for group in groups for c in group])
        for place, group in enumerate(groups):
            view = build.one(view, place, place + len(group)) if group else view.inserted(place)
        return view

    result = build.contraction(grouped(a, left, (batch, rows, depth)), grouped(b, right, (batch, depth, columns)))
    order = [*batch, *rows, *columns]
    result = build.reshaped(result, [sizes[c] for c in order])
    return [result.transposed([order.index(c) for c in out])]


@_rule("LSTM", "GRU")
def _recurrent(lowering: _Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    lstm = node.op_type == "LSTM"
    inputs = [*inputs, *[None] * (8 - len(inputs))]
    direction = attributes.get("direction", b"forward")
    plain = {"hidden_size", "direction", "layout", "input_forget", "linear_before_reset"}
    if strange := sorted(set(attributes) - plain):
        raise UnsupportedModelError(f"the fused kernel has no {node.op_type} with {strange[0]}")
    if attributes.get("layout", 0) or attributes.get("input_forget", 0) or inputs[4] is not None or (lstm and inputs[7] is not None):
        raise UnsupportedModelError(f"the fused kernel has no {node.op_type} with lengths, peepholes, coupled gates or the batch in front")
    if not lstm and not attributes.get("linear_before_reset", 0):
        raise UnsupportedModelError("the fused kernel has no GRU that resets before its product")
    build, x = lowering.builder, lowering.view(inputs[0])
    weights, recurrence = _known(inputs[1], "weights"), _known(inputs[2], "weights")
    (steps, batch, _), directions, hidden = x.shape, weights.shape[0], attributes["hidden_size"]
    gates = weights.shape[1]
    bias = _known(inputs[3], "a bias") if inputs[3] is not None else np.zeros((directions, 2 * gates), np.float32)
    states, last, cells = build.new((steps, directions, batch, hidden)), [], []
    for d in range(directions):
        backwards = direction == b"reverse" or d == 1
        own, theirs = bias[d, :gates], bias[d, gates:].copy()
        if lstm:
            own, theirs = own + theirs, np.zeros(0, np.float32)
        else:  # only the bias of the candidate is inside of the reset
            own = own + np.concatenate((theirs[: 2 * hidden], np.zeros(hidden, np.float32)))
            theirs[: 2 * hidden] = 0
        given = _projected(lowering, x, np.ascontiguousarray(weights[d].T), own)
        start = [_initial(lowering, inputs[place], d, batch, hidden) for place in ((5, 6) if lstm else (5,))]
        state = states.picked(1, d, 1, 1).without(1)
        build.spend(steps * batch * hidden * gates)
        extra = build.unary("Copy", start[1]) if lstm else build.constant(theirs)
        if lstm:
            cells.append(extra)
        work = build.new((batch * gates,))
        operands = [
            state,
            View(given.buffer, given.shape, (*given.strides[:2], 1), given.offset),
            build.panels(np.ascontiguousarray(recurrence[d].T)),
            View(start[0].buffer, (1, batch, hidden), (0, start[0].strides[0], 1), start[0].offset),
            View(work.buffer, work.shape, (0, 0, 1), work.offset),
            View(extra.buffer, extra.shape, (0, hidden if lstm else 0, 1), extra.offset),
        ]
        operands[2] = View(operands[2].buffer, operands[2].shape, (0, 0, 0), operands[2].offset)
        build.emit(node.op_type, (steps, batch, hidden), operands, flag=int(backwards))
        last.append(state.picked(0, 0 if backwards else steps - 1, 1, 1))
    results: list[Value] = [states, _joined(lowering, last, 0) if directions > 1 else last[0]]
    if lstm:
        stacked = [cell.inserted(0) for cell in cells]
        results.append(_joined(lowering, stacked, 0) if directions > 1 else stacked[0])
    return results


def _initial(lowering: _Lowering, value: Value | None, direction: int, batch: int, hidden: int) -> View:
    """The first states of one direction (batch, hidden), rows contiguous."""
    view = lowering.builder.constant(np.zeros((1,))) if value is None else lowering.view(value)
    if value is not None:
        view = view.picked(0, direction, 1, 1).without(0)
    if value is None or view.strides[1] != 1:
        view = lowering.builder.unary("Copy", view.broadcast((batch, hidden)))
    return view


def _projected(lowering: _Lowering, x: View, weights: NDArray[np.float32], bias: NDArray[np.float32]) -> View:
    """x (steps, batch, features) @ weights + bias, rows in the order in which they lie."""
    build, (steps, batch, _) = lowering.builder, x.shape
    swapped = x.transposed((1, 0, 2))
    if x.merged(0, 2) is None and swapped.merged(0, 2) is not None:
        found = build.product(build.one(swapped, 0, 2), weights, build.constant(bias))
        return build.reshaped(found, (batch, steps, weights.shape[1])).transposed((1, 0, 2))
    found = build.product(build.one(x, 0, 2), weights, build.constant(bias))
    return build.reshaped(found, (steps, batch, weights.shape[1]))


RULES["Shape"] = _same  # that of a view is known before the rules are asked
