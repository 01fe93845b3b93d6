"""An ONNX graph as torch calls: the operators of convolutional and dense networks.

Semantics follow the ONNX operator specification (https://onnx.ai/onnx/operators/). A graph with an
operator or attribute outside of this set is refused when it is loaded, never run approximately.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as functional
from onnx import numpy_helper
from torch import Tensor

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


def _slice(inputs: list[Any], attributes: Attributes) -> Tensor:
    x, starts, ends = inputs[0], inputs[1].tolist(), inputs[2].tolist()
    axes = inputs[3].tolist() if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
    steps = inputs[4].tolist() if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    index: list[slice] = [slice(None)] * x.dim()
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            raise UnsupportedOperator("Slice with a negative step")
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def _reshape(inputs: list[Any], attributes: Attributes) -> Tensor:
    shape = inputs[1].tolist()
    if not attributes.get("allowzero", 0):
        shape = [inputs[0].shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return inputs[0].reshape(shape)


def _mean(inputs: list[Any], attributes: Attributes) -> Tensor:
    axes = inputs[1].tolist() if len(inputs) > 1 and inputs[1] is not None else attributes.get("axes")
    keep = bool(attributes.get("keepdims", 1))
    return inputs[0].mean(dim=tuple(axes) if axes is not None else tuple(range(inputs[0].dim())), keepdim=keep)


def _squeeze(inputs: list[Any], attributes: Attributes) -> Tensor:
    axes = inputs[1].tolist() if len(inputs) > 1 else attributes.get("axes")
    return inputs[0].squeeze(tuple(axes)) if axes is not None else inputs[0].squeeze()


def _unsqueeze(inputs: list[Any], attributes: Attributes) -> Tensor:
    result = inputs[0]
    axes = inputs[1].tolist() if len(inputs) > 1 else attributes["axes"]
    rank = result.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        result = result.unsqueeze(axis)
    return result


def _cast(inputs: list[Any], attributes: Attributes) -> Tensor:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(attributes["to"])
    return inputs[0].to(torch.from_numpy(np.zeros(0, dtype)).dtype)


OPERATORS: dict[str, Operator] = {
    "Add": lambda x, a: x[0] + x[1],
    "AveragePool": _pool((functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d), 0.0, True),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": lambda x, a: torch.clamp(x[0], *[*x[1:], None, None][:2]),
    "Concat": lambda x, a: torch.cat(x, dim=a["axis"]),
    "Constant": lambda x, a: a["value"],
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Div": lambda x, a: x[0] / x[1],
    "Flatten": lambda x, a: x[0].reshape(int(np.prod(x[0].shape[: a.get("axis", 1)])), -1),
    "Gather": lambda x, a: x[0][(slice(None),) * (a.get("axis", 0) % x[0].dim()) + (x[1],)],
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x, a: x[0].mean(dim=tuple(range(2, x[0].dim())), keepdim=True),
    "Identity": lambda x, a: x[0],
    "InstanceNormalization": lambda x, a: functional.instance_norm(x[0], weight=x[1], bias=x[2], eps=a.get("epsilon", 1e-5)),
    "LeakyRelu": lambda x, a: functional.leaky_relu(x[0], a.get("alpha", 0.01)),
    "MatMul": lambda x, a: x[0] @ x[1],
    "MaxPool": _pool((functional.max_pool1d, functional.max_pool2d, functional.max_pool3d), float("-inf"), False),
    "Mul": lambda x, a: x[0] * x[1],
    "Pow": lambda x, a: x[0] ** x[1],
    "ReduceMean": _mean,
    "Relu": lambda x, a: functional.relu(x[0]),
    "Reshape": _reshape,
    "Shape": lambda x, a: torch.tensor(list(x[0].shape)[a.get("start", 0) : a.get("end")]),
    "Sigmoid": lambda x, a: torch.sigmoid(x[0]),
    "Slice": _slice,
    "Softmax": lambda x, a: torch.softmax(x[0], dim=a.get("axis", -1)),
    "Sqrt": lambda x, a: torch.sqrt(x[0]),
    "Squeeze": _squeeze,
    "Sub": lambda x, a: x[0] - x[1],
    "Tanh": lambda x, a: torch.tanh(x[0]),
    "Transpose": lambda x, a: x[0].permute(*a.get("perm", range(x[0].dim() - 1, -1, -1))),
    "Unsqueeze": _unsqueeze,
}


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in node.attribute:
        value = onnx.helper.get_attribute_value(item)
        if isinstance(value, onnx.TensorProto):
            value = torch.from_numpy(numpy_helper.to_array(value).copy())
        found[item.name] = value.decode() if isinstance(value, bytes) else value
    return found


class GraphProgram:
    """The nodes of an ONNX file, ready on a device. Calling it maps named tensors to named tensors."""

    def __init__(self, graph: Path, device: str) -> None:
        proto = onnx.load(str(graph))
        if missing := sorted({node.op_type for node in proto.graph.node} - set(OPERATORS)):
            raise UnsupportedOperator(f"operators {missing} have no torch form here")
        self._nodes = [(OPERATORS[n.op_type], list(n.input), n.output[0], _attributes(n)) for n in proto.graph.node]
        self._outputs = [value.name for value in proto.graph.output]
        self._weights: dict[str, Tensor] = {}
        for item in proto.graph.initializer:
            tensor = torch.from_numpy(numpy_helper.to_array(item).copy())
            # Shapes, axes and indices stay on the host, where operators read them as numbers.
            self._weights[item.name] = tensor if tensor.dtype == torch.int64 else tensor.to(device)
        self._last = {name: index for index, (_, inputs, _, _) in enumerate(self._nodes) for name in inputs}

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values: dict[str, Any] = {**self._weights, **given}
        for index, (operator, inputs, output, attributes) in enumerate(self._nodes):
            values[output] = operator([values[name] if name else None for name in inputs], attributes)
            for name in inputs:
                if self._last.get(name) == index and name not in self._outputs:
                    values.pop(name, None)
        return {name: values[name] for name in self._outputs}
