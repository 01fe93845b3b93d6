"""How each operator is lowered: element by element, by moving, and along axes. Products are in `products`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.kernels.fused.program import BINARY, REDUCE, SOFTMAX, UNARY, Builder, View

Value = View | NDArray[Any]
MOST_PARTS = 64
"""Most pieces that an operator may be cut into."""


class Lowering(Protocol):
    """What a rule knows of the graph that is lowered. `version`: of the graph's operators."""

    builder: Builder
    version: int

    def view(self, value: Value | None) -> View:
        """A value as the kernel reads it."""


Rule = Callable[[Lowering, onnx.NodeProto, list[Value | None], dict[str, Any]], list[Value]]


class Rules(dict[str, Rule]):
    """Rules by operator."""

    def of(self, *names: str) -> Callable[[Rule], Rule]:
        """Marks the rule that lowers the operators `names`: (lowering, node, inputs, attributes) to the values of its outputs."""

        def add(rule: Rule) -> Rule:
            self.update(dict.fromkeys(names, rule))
            return rule

        return add


RULES = Rules()


def known(value: Value | None, what: str) -> NDArray[Any]:
    """A value that no input changes; raises UnsupportedModelError where one does."""
    if not isinstance(value, np.ndarray):
        raise UnsupportedModelError(f"{what} depends on the inputs; the fused kernel needs it beforehand")
    return value


def axes_of(inputs: list[Value | None], attributes: Mapping[str, Any], place: int = 1) -> list[int] | None:
    """Axes, given as an input or, by older operators, as an attribute."""
    if len(inputs) > place and inputs[place] is not None:
        return [int(a) for a in known(inputs[place], "the axes").ravel()]
    return [int(a) for a in attributes["axes"]] if "axes" in attributes else None


@RULES.of("Identity", "Dropout", "Shape")  # the shape of a view is known before the rules are asked
def _same(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    return [lowering.view(inputs[0])]


@RULES.of("Cast")
def _cast(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    if attributes["to"] != onnx.TensorProto.FLOAT:
        raise UnsupportedModelError("the fused kernel computes in float32 alone; the graph casts to another type")
    return [lowering.view(inputs[0])]


PARAMETERS = {"LeakyRelu": (0.01, 0.0), "Elu": (1.0, 0.0), "HardSigmoid": (0.2, 0.5)}


@RULES.of(*(name for name in UNARY if name != "Copy"))
def _unary(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    if attributes.get("approximate", b"none") != b"none":
        raise UnsupportedModelError("the fused kernel has no approximate Gelu")
    alpha, beta = PARAMETERS.get(node.op_type, (0.0, 0.0))
    alpha, beta = float(attributes.get("alpha", alpha)), float(attributes.get("beta", beta))
    return [lowering.builder.unary(node.op_type, lowering.view(inputs[0]), alpha, beta)]


@RULES.of(*BINARY, "Sum", "PRelu")
def _binary(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
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


@RULES.of("Clip")
def _clip(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    result = lowering.view(inputs[0])
    for place, name, kind in ((1, "min", "Max"), (2, "max", "Min")):
        limit = inputs[place] if len(inputs) > place else None
        if limit is None and name in attributes:
            limit = np.array(attributes[name], np.float32)
        if limit is not None:
            result = lowering.builder.binary(kind, result, lowering.view(limit))
    return [result]


@RULES.of("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    shape = list(x.shape)
    if node.op_type == "Reshape":
        wanted = [int(n) for n in known(inputs[1], "a shape")]
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
    axes = axes_of(inputs, attributes)
    if node.op_type == "Squeeze":
        gone = {a % len(shape) for a in axes} if axes is not None else {a for a, n in enumerate(shape) if n == 1}
        for axis in sorted(gone, reverse=True):
            x = x.without(axis)
        return [x]
    for axis in sorted(a % (len(shape) + len(axes or [])) for a in axes or []):
        x = x.inserted(axis)
    return [x]


@RULES.of("Transpose")
def _transpose(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    return [x.transposed(attributes.get("perm", range(len(x.shape))[::-1]))]


@RULES.of("Expand")
def _expand(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    return [x.broadcast(np.broadcast_shapes(x.shape, tuple(int(n) for n in known(inputs[1], "a shape"))))]


@RULES.of("Slice")
def _slice(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    names = ("starts", "ends", "axes", "steps")
    given = dict(zip(names, (known(v, "a slice").ravel().tolist() if v is not None else None for v in inputs[1:]), strict=False))
    starts, ends, axes, steps = (given.get(name) or attributes.get(name) or [] for name in names)
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis, step = (axes[i] if axes else i) % len(x.shape), steps[i] if steps else 1
        taken = range(*slice(start, end, step).indices(x.shape[axis]))
        if not taken:
            raise UnsupportedModelError("a slice without elements")
        x = x.picked(axis, taken[0], step, len(taken))
    return [x]


@RULES.of("Gather")
def _gather(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x, indices = lowering.view(inputs[0]), known(inputs[1], "what is gathered")
    axis = attributes.get("axis", 0) % len(x.shape)
    flat = [int(i) % x.shape[axis] for i in indices.ravel()]
    steps = {b - a for a, b in itertools.pairwise(flat)}
    if len(steps) <= 1:
        found = x.picked(axis, flat[0], steps.pop() if steps else 1, len(flat))
    else:
        found = joined(lowering, [x.picked(axis, i, 1, 1) for i in flat], axis)
    if indices.ndim < 2:
        return [found if indices.ndim else found.without(axis)]
    return [lowering.builder.reshaped(found, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))]


@RULES.of("Split")
def _split(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    axis, parts = attributes.get("axis", 0) % len(x.shape), len(node.output)
    given = known(inputs[1], "the sizes") if len(inputs) > 1 and inputs[1] is not None else attributes.get("split")
    each = -(-x.shape[axis] // parts)
    sizes = [int(n) for n in np.ravel(given)] if given is not None else [min(each, x.shape[axis] - each * i) for i in range(parts)]
    starts = np.cumsum([0, *sizes]).tolist()
    return [x.picked(axis, start, 1, size) for start, size in zip(starts, sizes, strict=False)]


@RULES.of("Concat")
def _concat(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    views = [lowering.view(value) for value in inputs]
    return [joined(lowering, views, attributes["axis"] % len(views[0].shape))]


def joined(lowering: Lowering, views: Sequence[View], axis: int) -> View:
    """The views behind each other along an axis."""
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


@RULES.of(*REDUCE)
def _reduce(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    axes = axes_of(inputs, attributes)
    if not axes and attributes.get("noop_with_empty_axes", 0):
        return [x]
    chosen = sorted({a % len(x.shape) for a in axes} if axes else range(len(x.shape)))
    return [lowering.builder.reduced(node.op_type, x, chosen, bool(attributes.get("keepdims", 1)))]


@RULES.of("GlobalAveragePool")
def _average(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    return [lowering.builder.reduced("ReduceMean", x, range(2, len(x.shape)), keep=True)]


@RULES.of(*SOFTMAX)
def _softmax(lowering: Lowering, node: onnx.NodeProto, inputs: list[Value | None], attributes: dict[str, Any]) -> list[Value]:
    x = lowering.view(inputs[0])
    if lowering.version >= 13:
        return [lowering.builder.softmax(node.op_type, x, attributes.get("axis", -1) % len(x.shape))]
    axis = attributes.get("axis", 1) % len(x.shape)
    flat = lowering.builder.reshaped(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))
    return [lowering.builder.reshaped(lowering.builder.softmax(node.op_type, flat, 1), x.shape)]
