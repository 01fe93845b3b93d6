"""How products, normalizations and recurrent layers are lowered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.kernels.fused.program import View
from shared_runtime.kernels.fused.rules import Lowering, Rules, Value, joined, known

RULES = Rules()


@RULES.of("LayerNormalization")
def _layer_norm(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
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


@RULES.of("BatchNormalization")
def _batch_norm(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    scale, bias, mean, variance = (known(value, "a batch normalization").astype(np.float64) for value in inputs[1:5])
    if attributes.get("training_mode", 0):
        raise UnsupportedModelError("a batch normalization that learns")
    factor = scale / np.sqrt(variance + attributes.get("epsilon", 1e-5))
    wide = (-1, *[1] * (len(x.shape) - 2))
    scaled = lowering.builder.binary("Mul", x, lowering.builder.constant(factor.reshape(wide)))
    return [lowering.builder.binary("Add", scaled, lowering.builder.constant((bias - mean * factor).reshape(wide)))]


@RULES.of("Gemm")
def _gemm(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
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


@RULES.of("MatMul")
def _matmul(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
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


@RULES.of("Einsum")
def _einsum(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
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


@RULES.of("LSTM", "GRU")
def _recurrent(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
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
    weights, recurrence = known(inputs[1], "weights"), known(inputs[2], "weights")
    (steps, batch, _), directions, hidden = x.shape, weights.shape[0], attributes["hidden_size"]
    gates = weights.shape[1]
    bias = known(inputs[3], "a bias") if inputs[3] is not None else np.zeros((directions, 2 * gates), np.float32)
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
    results: list[Value] = [states, joined(lowering, last, 0) if directions > 1 else last[0]]
    if lstm:
        stacked = [cell.inserted(0) for cell in cells]
        results.append(joined(lowering, stacked, 0) if directions > 1 else stacked[0])
    return results


def _initial(lowering: Lowering, value: Value | None, direction: int, batch: int, hidden: int) -> View:
    """The first states of one direction (batch, hidden), rows contiguous."""
    view = lowering.builder.constant(np.zeros((1,))) if value is None else lowering.view(value)
    if value is not None:
        view = view.picked(0, direction, 1, 1).without(0)
    if value is None or view.strides[1] != 1:
        view = lowering.builder.unary("Copy", view.broadcast((batch, hidden)))
    return view


def _projected(lowering: Lowering, x: View, weights: NDArray[np.float32], bias: NDArray[np.float32]) -> View:
    """x (steps, batch, features) @ weights + bias, rows in the order in which they lie."""
    build, (steps, batch, _) = lowering.builder, x.shape
    swapped = x.transposed((1, 0, 2))
    if x.merged(0, 2) is None and swapped.merged(0, 2) is not None:
        found = build.product(build.one(swapped, 0, 2), weights, build.constant(bias))
        return build.reshaped(found, (batch, steps, weights.shape[1])).transposed((1, 0, 2))
    found = build.product(build.one(x, 0, 2), weights, build.constant(bias))
    return build.reshaped(found, (steps, batch, weights.shape[1]))
