"""ONNX operators as torch calls: those of convolutional, recurrent, dense and attention networks.

Semantics follow the ONNX operator specification (https://onnx.ai/onnx/operators/). What has no torch form here raises
UnsupportedOperator; nothing is run approximately.
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

Attributes = Mapping[str, Any]
Operator = Callable[[list[Any], Attributes], Tensor]


class UnsupportedOperator(Exception):
    """An operator, or one of its attributes, has no torch form here."""


def _pads(attributes: Attributes, rank: int) -> list[int]:
    """ONNX pads (begins, then ends) as torch's pairs from the last axis on."""
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise UnsupportedOperator(f"auto_pad={attributes['auto_pad']}")
    pads = list(attributes.get("pads", [0] * (2 * rank)))
    return [value for axis in reversed(range(rank)) for value in (pads[axis], pads[axis + rank])]


def _conv(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, weight, bias = [*inputs, None][:3]
    rank = weight.dim() - 2
    call = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    padded = functional.pad(x, pairs) if any(pairs := _pads(attributes, rank)) else x
    return call(
        padded,
        weight,
        bias,
        stride=attributes.get("strides", [1] * rank),
        dilation=attributes.get("dilations", [1] * rank),
        groups=attributes.get("group", 1),
    )


def _conv_transpose(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, weight, bias = [*inputs, None][:3]
    rank = weight.dim() - 2
    pads = list(attributes.get("pads", [0] * (2 * rank)))
    if pads[:rank] != pads[rank:] or "output_shape" in attributes:
        raise UnsupportedOperator("ConvTranspose with unequal pads or output_shape")
    call = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[rank - 1]
    return call(
        x,
        weight,
        bias,
        stride=attributes.get("strides", [1] * rank),
        padding=pads[:rank],
        output_padding=attributes.get("output_padding", [0] * rank),
        groups=attributes.get("group", 1),
        dilation=attributes.get("dilations", [1] * rank),
    )


def _pool(calls: tuple[Any, Any, Any], fill: float, average: bool) -> Operator:
    def run(inputs: list[Any], attributes: Attributes) -> Tensor:
        x, rank = inputs[0], inputs[0].dim() - 2
        pairs = _pads(attributes, rank)
        if attributes.get("ceil_mode", 0) or (average and any(pairs) and not attributes.get("count_include_pad", 0)):
            raise UnsupportedOperator("pooling with ceil_mode, or an average that leaves its padding out")
        if not average and set(attributes.get("dilations", [1])) != {1}:
            raise UnsupportedOperator("dilated pooling")
        padded = functional.pad(x, pairs, value=fill) if any(pairs) else x
        result: Tensor = calls[rank - 1](padded, attributes["kernel_shape"], stride=attributes.get("strides", [1] * rank))
        return result

    return run


def _gemm(inputs: list[Any], attributes: Attributes) -> Tensor:
    a, b = inputs[:2]
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    result = attributes.get("alpha", 1.0) * (a @ b)
    return result + attributes.get("beta", 1.0) * inputs[2] if len(inputs) > 2 else result


def _batch_norm(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, scale, bias, mean, variance = inputs
    return functional.batch_norm(x, mean, variance, scale, bias, eps=attributes.get("epsilon", 1e-5))


def _ints(value: Any) -> list[int]:
    """Shapes, axes and indices, which stay on the host."""
    return value if isinstance(value, list) else value.reshape(-1).tolist()


def _slice(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, starts, ends, axes, steps = [*inputs, None, None][:5]
    starts, ends = _ints(starts), _ints(ends)
    axes = _ints(axes) if axes is not None else list(range(len(starts)))
    steps = _ints(steps) if steps is not None else [1] * len(starts)
    index: list[slice] = [slice(None)] * x.dim()
    flipped = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < -1:
            raise UnsupportedOperator(f"Slice with step {step}")
        if step == -1:
            size = x.shape[axis]
            first = min(start + size if start < 0 else start, size - 1)
            last = end + size if -size <= end < 0 else max(end, -1)
            index[axis % x.dim()] = slice(last + 1, first + 1)
            flipped.append(axis)
        else:
            index[axis % x.dim()] = slice(min(start, x.shape[axis]), min(end, x.shape[axis]), step)
    result = x[tuple(index)]
    return result.flip(flipped) if flipped else result


def _reshape(inputs: list[Any], attributes: Attributes) -> Tensor:
    shape = _ints(inputs[1])
    if not attributes.get("allowzero", 0):
        shape = [inputs[0].shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return inputs[0].reshape(shape)


def _reduce(call: Callable[..., Tensor]) -> Operator:
    def run(inputs: list[Any], attributes: Attributes) -> Tensor:
        axes = _ints(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else attributes.get("axes")
        if not axes and attributes.get("noop_with_empty_axes", 0):
            return inputs[0]
        keep = bool(attributes.get("keepdims", 1))
        return call(inputs[0], dim=tuple(axes) if axes else tuple(range(inputs[0].dim())), keepdim=keep)

    return run


def _squeeze(inputs: list[Any], attributes: Attributes) -> Tensor:
    axes = _ints(inputs[1]) if len(inputs) > 1 else attributes.get("axes")
    return inputs[0].squeeze(tuple(axes)) if axes is not None else inputs[0].squeeze()


def _unsqueeze(inputs: list[Any], attributes: Attributes) -> Tensor:
    result = inputs[0]
    axes = _ints(inputs[1]) if len(inputs) > 1 else attributes["axes"]
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
        return torch.split(inputs[0], _ints(inputs[1]), dim=axis)
    if "split" in attributes:
        return torch.split(inputs[0], list(attributes["split"]), dim=axis)
    return torch.split(inputs[0], -(-inputs[0].shape[axis] // attributes["num_outputs"]), dim=axis)


def _expand(inputs: list[Any], attributes: Attributes) -> Tensor:
    shape = _ints(inputs[1])
    return inputs[0] * torch.ones(shape, dtype=inputs[0].dtype, device=inputs[0].device) if shape else inputs[0]


def _pad(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, pads = inputs[0], _ints(inputs[1])
    if len(inputs) > 3 and inputs[3] is not None:
        raise UnsupportedOperator("Pad with axes")
    mode = attributes.get("mode", "constant")
    if mode not in ("constant", "reflect", "edge"):
        raise UnsupportedOperator(f"Pad with mode {mode!r}")
    pairs = [value for axis in reversed(range(x.dim())) for value in (pads[axis], pads[axis + x.dim()])]
    if mode == "constant":
        return functional.pad(x, pairs, value=_ints(inputs[2])[0] if len(inputs) > 2 and inputs[2] is not None else 0.0)
    while pairs[-2:] == [0, 0]:
        del pairs[-2:]
    return functional.pad(x, pairs, mode={"reflect": "reflect", "edge": "replicate"}[mode])


def _resize(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, _, scales, sizes = [*inputs, None, None, None][:4]
    mode, place = attributes.get("mode", "nearest"), attributes.get("coordinate_transformation_mode", "half_pixel")
    target = _ints(sizes)[2:] if sizes is not None else [int(n * s) for n, s in zip(x.shape[2:], _ints(scales)[2:], strict=True)]
    whole = all(want % have == 0 for want, have in zip(target, x.shape[2:], strict=True))
    if (
        mode == "nearest"
        and (whole or place == "asymmetric")
        and attributes.get("nearest_mode", "round_prefer_floor") in ("floor", "round_prefer_floor")
    ):
        return functional.interpolate(x, target, mode="nearest")
    kinds = {1: "linear", 2: "bilinear", 3: "trilinear"}
    if mode == "linear" and place in ("half_pixel", "pytorch_half_pixel", "align_corners") and not attributes.get("antialias", 0):
        return functional.interpolate(x, target, mode=kinds[x.dim() - 2], align_corners=place == "align_corners")
    raise UnsupportedOperator(f"Resize with mode {mode!r} and {place!r}")


def _layer_norm(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, scale, bias = [*inputs, None][:3]
    shape = x.shape[attributes.get("axis", -1) % x.dim() :]
    return functional.layer_norm(x, shape, scale, bias, attributes.get("epsilon", 1e-5))


def _group_norm(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, scale, bias = inputs
    return functional.group_norm(x, attributes["num_groups"], scale, bias, attributes.get("epsilon", 1e-5))


def _top_k(inputs: list[Any], attributes: Attributes) -> tuple[Tensor, ...]:
    return tuple(torch.topk(inputs[0], _ints(inputs[1])[0], dim=attributes.get("axis", -1), largest=bool(attributes.get("largest", 1))))


def _argmax(inputs: list[Any], attributes: Attributes) -> Tensor:
    return torch.argmax(inputs[0], dim=attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))


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


def _lstm(inputs: list[Any], attributes: Attributes) -> tuple[Tensor, ...]:
    """One layer with the default activations, as in the ONNX operator: gates in the order i, o, f, c; Y (T, directions, N, H)."""
    x, w, r, b, lengths, h0, c0, peepholes = [*inputs, *[None] * 8][:8]
    directions = w.shape[0]
    hidden = attributes["hidden_size"]
    odd = attributes.get("clip", 0.0) or attributes.get("input_forget", 0) or attributes.get("layout", 0)
    given = lengths is not None or peepholes is not None
    named = [value.decode() if isinstance(value, bytes) else value for value in attributes.get("activations", [])]
    if odd or given or attributes.get("direction", "forward") == "reverse" or named not in ([], ["Sigmoid", "Tanh", "Tanh"] * directions):
        raise UnsupportedOperator("LSTM with clip, input_forget, lengths, peepholes, layout, activations or in reverse")

    def order(value: Tensor) -> Tensor:  # i, o, f, c -> torch's i, f, g, o
        i, o, f, c = value.split(hidden, 0)
        return torch.cat([i, f, c, o])

    flat = []
    for d in range(directions):
        bias = b[d] if b is not None else torch.zeros(8 * hidden, dtype=x.dtype, device=x.device)
        flat += [order(w[d]), order(r[d]), order(bias[: 4 * hidden]), order(bias[4 * hidden :])]
    zero = torch.zeros(directions, x.shape[1], hidden, dtype=x.dtype, device=x.device)
    state = (zero if h0 is None else h0, zero if c0 is None else c0)
    y, h, c = torch.lstm(x, state, flat, True, 1, 0.0, False, directions == 2, False)
    return y.reshape(*y.shape[:2], directions, hidden).transpose(1, 2), h, c


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
    "ArgMax": _argmax,
    "AveragePool": _pool((functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d), 0.0, True),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": lambda x, a: torch.clamp(x[0], *[*x[1:], None, None][:2]),
    "Concat": lambda x, a: torch.cat(x, dim=a["axis"]),
    "Constant": lambda x, a: a["value"],
    "ConstantOfShape": lambda x, a: torch.full(_ints(x[0]), a["value"].item() if "value" in a else 0.0),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DequantizeLinear": _dequantize,
    "Div": lambda x, a: torch.div(x[0], x[1], rounding_mode=None if x[0].is_floating_point() else "trunc"),
    "Dropout": lambda x, a: x[0],
    "Einsum": lambda x, a: torch.einsum(a["equation"], *x),
    "Elu": lambda x, a: functional.elu(x[0], a.get("alpha", 1.0)),
    "Equal": lambda x, a: x[0] == x[1],
    "Erf": lambda x, a: torch.erf(x[0]),
    "Exp": lambda x, a: x[0].exp(),
    "Expand": _expand,
    "Flatten": lambda x, a: x[0].reshape(math.prod(x[0].shape[: a.get("axis", 1)]), -1),
    torch_float8.KIND: torch_float8.multiply,
    torch_float8.KIND: torch_float8.multiply,
    "Floor": lambda x, a: x[0].floor(),
    "Gather": _gather,
    "Gelu": lambda x, a: functional.gelu(x[0], approximate=a.get("approximate", "none")),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x, a: x[0].mean(dim=tuple(range(2, x[0].dim())), keepdim=True),
    "GlobalMaxPool": lambda x, a: x[0].amax(dim=tuple(range(2, x[0].dim())), keepdim=True),
    "Greater": lambda x, a: x[0] > x[1],
    "GroupNormalization": _group_norm,
    "HardSigmoid": lambda x, a: torch.clamp(a.get("alpha", 0.2) * x[0] + a.get("beta", 0.5), 0.0, 1.0),
    "HardSwish": lambda x, a: functional.hardswish(x[0]),
    "Identity": lambda x, a: x[0],
    "InstanceNormLeakyRelu": lambda x, a: functional.leaky_relu(
        functional.instance_norm(x[0], weight=x[1], bias=x[2], eps=a["epsilon"]), a["alpha"]
    ),
    "InstanceNormalization": lambda x, a: functional.instance_norm(x[0], weight=x[1], bias=x[2], eps=a.get("epsilon", 1e-5)),
    "LSTM": _lstm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, a: functional.leaky_relu(x[0], a.get("alpha", 0.01)),
    "Less": lambda x, a: x[0] < x[1],
    "Log": lambda x, a: x[0].log(),
    "LogSoftmax": lambda x, a: torch.log_softmax(x[0], dim=a.get("axis", -1)),
    "MatMul": lambda x, a: x[0] @ x[1],
    "Max": _fold(torch.maximum),
    "MaxPool": _pool((functional.max_pool1d, functional.max_pool2d, functional.max_pool3d), float("-inf"), False),
    "Min": _fold(torch.minimum),
    "Mul": lambda x, a: x[0] * x[1],
    "Neg": lambda x, a: -x[0],
    "Not": lambda x, a: ~x[0],
    "PRelu": lambda x, a: torch.where(x[0] >= 0, x[0], x[0] * x[1]),
    "Pad": _pad,
    "Pow": lambda x, a: x[0] ** x[1],
    "QuantizeLinear": _quantize,
    "Range": _range,
    "Reciprocal": lambda x, a: x[0].reciprocal(),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "Relu": lambda x, a: functional.relu(x[0]),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": lambda x, a: torch.tensor(list(x[0].shape)[a.get("start", 0) : a.get("end")]),
    "Sigmoid": lambda x, a: torch.sigmoid(x[0]),
    "Sign": lambda x, a: torch.sign(x[0]),
    "Silu": lambda x, a: functional.silu(x[0]),
    "Slice": _slice,
    "Softmax": lambda x, a: torch.softmax(x[0], dim=a.get("axis", -1)),
    "Softplus": lambda x, a: functional.softplus(x[0]),
    "Split": _split,
    "Sqrt": lambda x, a: torch.sqrt(x[0]),
    "Squeeze": _squeeze,
    "Sub": lambda x, a: x[0] - x[1],
    "Tanh": lambda x, a: torch.tanh(x[0]),
    "Tile": lambda x, a: x[0].repeat(_ints(x[1])),
    "TopK": _top_k,
    "Transpose": lambda x, a: x[0].permute(*a.get("perm", range(x[0].dim() - 1, -1, -1))),
    "Unsqueeze": _unsqueeze,
    "Where": lambda x, a: torch.where(x[0], x[1], x[2]),
}
HOST_INPUTS: Mapping[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Pad": (1, 2),
    "Range": (0, 1, 2),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceSum": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
}
"""Inputs that an operator reads as numbers: they are shapes, axes and sizes, and never cross to the device."""
