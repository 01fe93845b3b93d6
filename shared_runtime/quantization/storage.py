"""How the constants of layers that compute in float are stored: in INT8 with a scale a channel, or in half precision.

Engines unpack them once, when they load the graph (constant folding): such a layer is as fast as in float.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shared_runtime.graph.passes.base import attribute
from shared_runtime.quantization.rounding import Array, balanced_rounding

SMALLEST = 256
"""Weights with fewer elements are not stored in INT8: their scales would weigh more than they save."""
SHORTEST = 64
"""Constants with fewer elements stay as they are: what unpacks them would weigh more than they save."""
SMALLEST_NORMAL = 2.0**-14
"""Below it, half precision has fewer than ten bits."""
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
"""What reads scales: these stay in float32."""


def int8_and_scale(values: Array, channels: tuple[int, ...]) -> tuple[Array, Array]:
    """Symmetric INT8 of `values`, and float32 scales along the axes `channels`, of length 1 along the others.

    Scales are numbers of half precision where it has all its bits, so that they can be stored in it.
    """
    order = (*channels, *(axis for axis in range(values.ndim) if axis not in channels))
    moved = values.transpose(order)
    kept = moved.shape[: len(channels)]
    rows = moved.reshape(prod(kept), -1)
    scale = (np.abs(rows).max(axis=1) / 127.0).astype(np.float32)
    scale[scale < 1e-12] = 1.0  # a channel of zeros
    if scale.min() >= SMALLEST_NORMAL and scale.max() <= np.finfo(np.float16).max / 2:
        half = scale.astype(np.float16)
        scale = np.where(half < scale, np.nextafter(half, np.float16(np.inf)), half).astype(np.float32)
    stored = balanced_rounding(rows / scale[:, None], 127).astype(np.int8).reshape(moved.shape)
    shape = [values.shape[axis] if axis in channels else 1 for axis in range(values.ndim)]
    return np.ascontiguousarray(stored.transpose(np.argsort(order))), scale.reshape(kept).transpose(np.argsort(channels)).reshape(shape)


def fits_int8(values: Array) -> bool:
    """Whether a constant is a weight that gains from INT8: finite float32, SMALLEST elements or more."""
    return values.dtype == np.float32 and values.size >= SMALLEST and bool(np.isfinite(values).all())


def pack(proto: onnx.ModelProto, channels: Mapping[str, int]) -> None:
    """Store these float32 constants of a graph in INT8, in place; `channels`: the axis of each that has a scale an index."""
    for item in [i for i in proto.graph.initializer if i.name in channels]:
        values = numpy_helper.to_array(item)
        if not fits_int8(values):
            continue
        stored, scale = int8_and_scale(values, (channels[item.name] % values.ndim,))
        name = item.name
        proto.graph.initializer.remove(item)
        proto.graph.initializer.append(numpy_helper.from_array(stored, f"{name}_packed"))
        proto.graph.initializer.append(numpy_helper.from_array(scale, f"{name}_packed_scale"))
        proto.graph.node.insert(0, helper.make_node("Mul", [f"{name}_unpacked", f"{name}_packed_scale"], [name]))
        proto.graph.node.insert(0, helper.make_node("Cast", [f"{name}_packed"], [f"{name}_unpacked"], to=TensorProto.FLOAT))


def halve(proto: onnx.ModelProto) -> None:
    """Store the float32 constants of a graph in half precision, in place, but for quantizers' scales and what it can't hold."""
    kept = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    kinds: dict[str, set[str]] = {}
    for node in proto.graph.node:
        for name in node.input:
            kinds.setdefault(name, set()).add(node.op_type)
        if node.domain not in ("", "ai.onnx") or node.op_type in QUANTIZERS or node.op_type.startswith("QLinear"):
            kept.update(node.input)
    for item in list(proto.graph.initializer):
        name = item.name
        if item.data_type != TensorProto.FLOAT or prod(item.dims) < SHORTEST or name in kept:
            continue
        values = numpy_helper.to_array(item)
        if not holds_in_half(values, each=not kinds.get(name, set()) <= SUMMING):
            continue
        proto.graph.initializer.remove(item)
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        proto.graph.node.insert(0, helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))


def holds_in_half(values: Array, each: bool) -> bool:
    """Whether half precision keeps ten bits of the largest of `values`, or of each of them."""
    sizes = np.abs(values[values != 0])
    least, largest = float(sizes.min(initial=np.inf)), float(sizes.max(initial=0.0))
    if not np.isfinite(values).all() or largest > float(np.finfo(np.float16).max):
        return False
    return not sizes.size or (least if each else largest) >= SMALLEST_NORMAL


def weights(node: onnx.NodeProto) -> list[tuple[str, int]]:
    """The constant operands of a layer that may be stored in INT8, with their channel axis."""
    if node.op_type == "Conv":
        return [(node.input[1], 0)]
    if node.op_type == "ConvTranspose":
        return [(node.input[1], 1)]
    if node.op_type == "Gemm":
        return [(node.input[1], 0 if attribute(node, "transB", 0) else 1)]
    if node.op_type == "MatMul":
        return [(node.input[0], -2), (node.input[1], -1)]
    if node.op_type in RECURRENT:
        return [(node.input[1], 1), (node.input[2], 1)]
    if node.op_type == "Gather":
        return [(node.input[0], 0)]
    return []


RECURRENT = ("LSTM", "GRU", "RNN")
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", *RECURRENT, "Gather")
"""Kinds of layers whose weights can be stored in INT8."""
SUMMING = frozenset({*WEIGHTED, "Add", "Sub"})
"""What reads a constant to add it up with others: the largest of its elements decide."""


def weighty(proto: onnx.ModelProto, kinds: Iterable[str] = WEIGHTED) -> tuple[str, ...]:
    """Names of the layers of these kinds with constant float32 weights of SMALLEST elements or more."""
    large = {i.name for i in proto.graph.initializer if i.data_type == TensorProto.FLOAT and prod(i.dims) >= SMALLEST}
    return tuple(n.name for n in proto.graph.node if n.op_type in kinds and any(name in large for name, _ in weights(n)))
