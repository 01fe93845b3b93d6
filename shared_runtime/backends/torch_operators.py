"""ONNX operators as torch calls: those of convolutional, recurrent, dense and attention networks.

Semantics follow the ONNX operator specification (https://onnx.ai/onnx/operators/). What has no torch form here raises
UnsupportedModelError; nothing is run approximately.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as functional
from torch import Tensor

from shared_runtime.backends import torch_float8
from shared_runtime.backends.torch_recurrent import gru, lstm
from shared_runtime.backends.torch_windows import (
    Attributes,
    Operator,
    convolution,
    cut,
    depth_to_space,
    ints,
    pad,
    pooling,
    resize,
    space_to_depth,
    transposed_convolution,
)
from shared_runtime.errors import UnsupportedModelError


def _gemm(inputs: list[Any], attributes: Attributes) -> Tensor:
    a, b = inputs[:2]
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    result = attributes.get("alpha", 1.0) * (a @ b)
    return result + attributes.get("beta", 1.0) * inputs[2] if len(inputs) > 2 else result


def _batch_norm(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, scale, bias, mean, variance = inputs
    return functional.batch_norm(x, mean, variance, scale, bias, eps=attributes.get("epsilon", 1e-5))


def _reshape(inputs: list[Any], attributes: Attributes) -> Tensor:
    shape = ints(inputs[1])
    if not attributes.get("allowzero", 0):
        shape = [inputs[0].shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return inputs[0].reshape(shape)


def _reduce(call: Callable[..., Tensor]) -> Operator:
    def run(inputs: list[Any], attributes: Attributes) -> Tensor:
        axes = ints(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else attributes.get("axes")
        if not axes and attributes.get("noop_with_empty_axes", 0):
            return inputs[0]
        keep = bool(attributes.get("keepdims", 1))
        return call(inputs[0], dim=tuple(axes) if axes else tuple(range(inputs[0].dim())), keepdim=keep)

    return run


def _squeeze(inputs: list[Any], attributes: Attributes) -> Tensor:
    axes = ints(inputs[1]) if len(inputs) > 1 else attributes.get("axes")
    return inputs[0].squeeze(tuple(axes)) if axes is not None else inputs[0].squeeze()


def _unsqueeze(inputs: list[Any], attributes: Attributes) -> Tensor:
    result = inputs[0]
    axes = ints(inputs[1]) if len(inputs) > 1 else attributes["axes"]
    rank = result.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        result = result.unsqueeze(axis)
    return result


def _cast(inputs: list[Any], attributes: Attributes) -> Tensor:
    return inputs[0].to(attributes["dtype"])


def torch_dtype(onnx_type: int) -> torch.dtype:
    special = {onnx.TensorProto.BFLOAT16: torch.bfloat16, onnx.TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn}
    if onnx_type in special:
        return special[onnx_type]
    return torch.from_numpy(np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(onnx_type))).dtype


def _split(inputs: list[Any], attributes: Attributes) -> tuple[Tensor, ...]:
    axis = attributes.get("axis", 0)
    if len(inputs) > 1 and inputs[1] is not None:
        return torch.split(inputs[0], ints(inputs[1]), dim=axis)
    if "split" in attributes:
        return torch.split(inputs[0], list(attributes["split"]), dim=axis)
    return torch.split(inputs[0], -(-inputs[0].shape[axis] // attributes["num_outputs"]), dim=axis)


def _expand(inputs: list[Any], attributes: Attributes) -> Tensor:
    shape = ints(inputs[1])
    return inputs[0] * torch.ones(shape, dtype=inputs[0].dtype, device=inputs[0].device) if shape else inputs[0]


def _layer_norm(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, scale, bias = [*inputs, None][:3]
    shape = x.shape[attributes.get("axis", -1) % x.dim() :]
    return functional.layer_norm(x, shape, scale, bias, attributes.get("epsilon", 1e-5))


def _group_norm(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, scale, bias = inputs
    return functional.group_norm(x, attributes["num_groups"], scale, bias, attributes.get("epsilon", 1e-5))


def _top_k(inputs: list[Any], attributes: Attributes) -> tuple[Tensor, ...]:
    count = ints(inputs[1])[0] if len(inputs) > 1 else attributes["k"]
    axis, largest = attributes.get("axis", -1), bool(attributes.get("largest", 1))
    values, places = torch.sort(
        inputs[0], dim=axis, descending=largest, stable=True
    )  # of equal ones the first, which topk does not promise
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


def _extreme(call: Callable[..., Tensor]) -> Operator:
    def run(inputs: list[Any], attributes: Attributes) -> Tensor:
        if attributes.get("select_last_index", 0):
            raise UnsupportedModelError("ArgMax or ArgMin of the last of equal values")
        return call(inputs[0], dim=attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))

    return run


def _dropout(inputs: list[Any], attributes: Attributes) -> Tensor:
    if len(inputs) > 2 and inputs[2] is not None and bool(inputs[2]):
        raise UnsupportedModelError("Dropout in training")
    return inputs[0]


def _infinite(inputs: list[Any], attributes: Attributes) -> Tensor:
    found = torch.zeros_like(inputs[0], dtype=torch.bool)
    for asked, call in (("detect_positive", torch.isposinf), ("detect_negative", torch.isneginf)):
        if attributes.get(asked, 1):
            found |= call(inputs[0])
    return found


def _clip(inputs: list[Any], attributes: Attributes) -> Tensor:
    low, high = [*inputs[1:], None, None][:2]
    low, high = attributes.get("min") if low is None else low, attributes.get("max") if high is None else high
    return inputs[0] if low is None and high is None else torch.clamp(inputs[0], low, high)


def _over_classes(call: Callable[..., Tensor]) -> Operator:
    """Before opset 13 all axes from the given one on are classes."""

    def run(inputs: list[Any], attributes: Attributes) -> Tensor:
        x = inputs[0]
        if attributes["opset"] >= 13:
            return call(x, dim=attributes.get("axis", -1))
        axis = attributes.get("axis", 1) % x.dim()
        return call(x.reshape(math.prod(x.shape[:axis]), -1), dim=1).reshape(x.shape)

    return run


def _cumulative_sum(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, axis = inputs[0], ints(inputs[1])[0]
    backward = bool(attributes.get("reverse", 0))
    given = x.flip(axis) if backward else x
    result = given.cumsum(axis, dtype=x.dtype)
    result = result - given if attributes.get("exclusive", 0) else result
    return result.flip(axis) if backward else result


def _lower_or_upper(inputs: list[Any], attributes: Attributes) -> Tensor:
    diagonal = ints(inputs[1])[0] if len(inputs) > 1 and inputs[1] is not None else 0
    return torch.triu(inputs[0], diagonal) if attributes.get("upper", 1) else torch.tril(inputs[0], diagonal)


def _gather_elements(inputs: list[Any], attributes: Attributes) -> Tensor:
    axis = attributes.get("axis", 0)
    return inputs[0].gather(axis, inputs[1].long() % inputs[0].shape[axis])


def _scatter_elements(inputs: list[Any], attributes: Attributes) -> Tensor:
    data, indices, updates = inputs
    axis, reduction = attributes.get("axis", 0), attributes.get("reduction", "none")
    places = indices.long() % data.shape[axis]
    if reduction == "none":
        return data.scatter(axis, places, updates)
    kinds = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return data.scatter_reduce(axis, places, updates, kinds[reduction])


def _gather_nd(inputs: list[Any], attributes: Attributes) -> Tensor:
    if attributes.get("batch_dims", 0):
        raise UnsupportedModelError("GatherND with batch_dims")
    return inputs[0][inputs[1].long().unbind(-1)]


def _scatter_nd(inputs: list[Any], attributes: Attributes) -> Tensor:
    if attributes.get("reduction", "none") != "none":
        raise UnsupportedModelError(f"ScatterND with reduction {attributes['reduction']!r}")
    return inputs[0].index_put(inputs[1].long().unbind(-1), inputs[2])


def _normalised(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, axis = inputs[0], attributes.get("axis", -1)
    norm = torch.linalg.vector_norm(x, ord=attributes.get("p", 2), dim=axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def _local_response(inputs: list[Any], attributes: Attributes) -> Tensor:
    if attributes["size"] % 2 == 0:
        raise UnsupportedModelError("LRN of an even size")
    alpha, beta = attributes.get("alpha", 1e-4), attributes.get("beta", 0.75)
    return functional.local_response_norm(inputs[0], attributes["size"], alpha, beta, attributes.get("bias", 1.0))


def _fold(call: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def run(inputs: list[Any], attributes: Attributes) -> Tensor:
        result = inputs[0]
        for other in inputs[1:]:
            result = call(result, other)
        return result

    return run


def _gather(inputs: list[Any], attributes: Attributes) -> Tensor:
    data, indices = inputs
    axis = attributes.get("axis", 0) % data.dim()
    if indices.dim() == 0 and not indices.is_cuda:
        return data.select(axis, int(indices))
    flat = torch.index_select(data, axis, indices.reshape(-1) % data.shape[axis])
    return flat.reshape(*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])


def _quantize(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, scale, zero = inputs
    axis = attributes.get("axis", 1)
    shape = [1] * x.dim()
    if scale.numel() > 1:
        shape[axis] = -1
    if zero.dtype == torch.float8_e4m3fn:
        return (x / scale.reshape(shape)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    bounds = torch.iinfo(zero.dtype)
    return ((x / scale.reshape(shape)).round() + zero.reshape(shape)).clamp(bounds.min, bounds.max).to(zero.dtype)


def _dequantize(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, scale, zero = [*inputs, None][:3]
    shape = [1] * x.dim()
    if scale.numel() > 1:
        shape[attributes.get("axis", 1)] = -1
    shifted = (
        x.to(scale.dtype) if zero is None or zero.dtype == torch.float8_e4m3fn else x.to(scale.dtype) - zero.reshape(shape).to(scale.dtype)
    )
    return shifted * scale.reshape(shape)


def _range(inputs: list[Any], attributes: Attributes) -> Tensor:
    start, limit, delta = (value if isinstance(value, (int, float)) else value.item() for value in inputs)
    return torch.arange(start, limit, delta)


OPERATORS: dict[str, Callable[[list[Any], Attributes], Any]] = {
    "Abs": lambda x, a: x[0].abs(),
    "Add": lambda x, a: x[0] + x[1],
    "And": lambda x, a: x[0] & x[1],
    "ArgMax": _extreme(torch.argmax),
    "ArgMin": _extreme(torch.argmin),
    "Atan": lambda x, a: torch.atan(x[0]),
    "AveragePool": pooling((functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d), True),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Ceil": lambda x, a: x[0].ceil(),
    "Celu": lambda x, a: functional.celu(x[0], a.get("alpha", 1.0)),
    "Clip": _clip,
    "Concat": lambda x, a: torch.cat(x, dim=a["axis"]),
    "Constant": lambda x, a: a["value"],
    "ConstantOfShape": lambda x, a: a["value"].reshape(-1).expand(ints(x[0])).clone() if "value" in a else torch.zeros(ints(x[0])),
    "Conv": convolution,
    "ConvTranspose": transposed_convolution,
    "Cos": lambda x, a: x[0].cos(),
    "CumSum": _cumulative_sum,
    "DepthToSpace": depth_to_space,
    "DequantizeLinear": _dequantize,
    "Div": lambda x, a: torch.div(x[0], x[1], rounding_mode=None if x[0].is_floating_point() else "trunc"),
    "Dropout": _dropout,
    "Einsum": lambda x, a: torch.einsum(a["equation"], *x),
    "Elu": lambda x, a: functional.elu(x[0], a.get("alpha", 1.0)),
    "Equal": lambda x, a: x[0] == x[1],
    "Erf": lambda x, a: torch.erf(x[0]),
    "Exp": lambda x, a: x[0].exp(),
    "Expand": _expand,
    "Flatten": lambda x, a: x[0].reshape(math.prod(x[0].shape[: a.get("axis", 1)]), -1),
    torch_float8.KIND: torch_float8.multiply,
    "Floor": lambda x, a: x[0].floor(),
    "GRU": gru,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gelu": lambda x, a: functional.gelu(x[0], approximate=a.get("approximate", "none")),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x, a: x[0].mean(dim=tuple(range(2, x[0].dim())), keepdim=True),
    "GlobalMaxPool": lambda x, a: x[0].amax(dim=tuple(range(2, x[0].dim())), keepdim=True),
    "Greater": lambda x, a: x[0] > x[1],
    "GreaterOrEqual": lambda x, a: x[0] >= x[1],
    "GroupNormalization": _group_norm,
    "HardSigmoid": lambda x, a: torch.clamp(a.get("alpha", 0.2) * x[0] + a.get("beta", 0.5), 0.0, 1.0),
    "HardSwish": lambda x, a: functional.hardswish(x[0]),
    "Identity": lambda x, a: x[0],
    "InstanceNormLeakyRelu": lambda x, a: functional.leaky_relu(
        functional.instance_norm(x[0], weight=x[1], bias=x[2], eps=a["epsilon"]), a["alpha"]
    ),
    "InstanceNormalization": lambda x, a: functional.instance_norm(x[0], weight=x[1], bias=x[2], eps=a.get("epsilon", 1e-5)),
    "IsInf": _infinite,
    "IsNaN": lambda x, a: torch.isnan(x[0]),
    "LRN": _local_response,
    "LSTM": lstm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, a: functional.leaky_relu(x[0], a.get("alpha", 0.01)),
    "Less": lambda x, a: x[0] < x[1],
    "LessOrEqual": lambda x, a: x[0] <= x[1],
    "Log": lambda x, a: x[0].log(),
    "LogSoftmax": _over_classes(torch.log_softmax),
    "LpNormalization": _normalised,
    "MatMul": lambda x, a: x[0] @ x[1],
    "Max": _fold(torch.maximum),
    "MaxPool": pooling((functional.max_pool1d, functional.max_pool2d, functional.max_pool3d), False),
    "Mean": lambda x, a: _fold(torch.add)(x, a) / len(x),
    "Min": _fold(torch.minimum),
    "Mish": lambda x, a: functional.mish(x[0]),
    "Mod": lambda x, a: torch.fmod(x[0], x[1]) if a.get("fmod", 0) else torch.remainder(x[0], x[1]),
    "Mul": lambda x, a: x[0] * x[1],
    "Neg": lambda x, a: -x[0],
    "Not": lambda x, a: ~x[0],
    "Or": lambda x, a: x[0] | x[1],
    "PRelu": lambda x, a: torch.where(x[0] >= 0, x[0], x[0] * x[1]),
    "Pad": pad,
    "Pow": lambda x, a: (x[0] ** x[1]).to(x[0].dtype),
    "QuantizeLinear": _quantize,
    "Range": _range,
    "Reciprocal": lambda x, a: x[0].reciprocal(),
    "ReduceL1": _reduce(lambda x, dim, keepdim: x.abs().sum(dim=dim, keepdim=keepdim)),
    "ReduceL2": _reduce(lambda x, dim, keepdim: torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim)),
    "ReduceLogSum": _reduce(lambda x, dim, keepdim: x.sum(dim=dim, keepdim=keepdim).log()),
    "ReduceLogSumExp": _reduce(torch.logsumexp),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "ReduceSumSquare": _reduce(lambda x, dim, keepdim: x.square().sum(dim=dim, keepdim=keepdim)),
    "Relu": lambda x, a: functional.relu(x[0]),
    "Reshape": _reshape,
    "Resize": resize,
    "Shape": lambda x, a: torch.tensor(list(x[0].shape)[a.get("start", 0) : a.get("end")], dtype=torch.int64),
    "Round": lambda x, a: x[0].round(),
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Selu": lambda x, a: functional.elu(x[0], a.get("alpha", 1.6732632)) * a.get("gamma", 1.050701),
    "Sigmoid": lambda x, a: torch.sigmoid(x[0]),
    "Sign": lambda x, a: torch.sign(x[0]),
    "Silu": lambda x, a: functional.silu(x[0]),
    "Sin": lambda x, a: x[0].sin(),
    "Size": lambda x, a: torch.tensor(x[0].numel()),
    "Slice": cut,
    "Softmax": _over_classes(torch.softmax),
    "Softplus": lambda x, a: functional.softplus(x[0]),
    "Softsign": lambda x, a: functional.softsign(x[0]),
    "SpaceToDepth": space_to_depth,
    "Split": _split,
    "Sqrt": lambda x, a: torch.sqrt(x[0]),
    "Squeeze": _squeeze,
    "Sub": lambda x, a: x[0] - x[1],
    "Sum": _fold(torch.add),
    "Tanh": lambda x, a: torch.tanh(x[0]),
    "ThresholdedRelu": lambda x, a: torch.where(x[0] > a.get("alpha", 1.0), x[0], torch.zeros_like(x[0])),
    "Tile": lambda x, a: x[0].repeat(ints(x[1])),
    "TopK": _top_k,
    "Transpose": lambda x, a: x[0].permute(*a.get("perm", range(x[0].dim() - 1, -1, -1))),
    "Trilu": _lower_or_upper,
    "Unsqueeze": _unsqueeze,
    "Upsample": resize,
    "Where": lambda x, a: torch.where(x[0], x[1], x[2]),
    "Xor": lambda x, a: x[0] ^ x[1],
}
HOST_INPUTS: Mapping[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Pad": (1, 2, 3),
    "Range": (0, 1, 2),
    "CumSum": (1,),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceLogSum": (1,),
    "ReduceLogSumExp": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceSum": (1,),
    "ReduceSumSquare": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
"""Inputs that an operator reads as numbers: they are shapes, axes and sizes, and never cross to the device."""
