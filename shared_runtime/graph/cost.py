"""What a graph costs for given inputs: arithmetic and bytes of each node, sizes of each tensor; nothing is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import onnx
from onnx import NodeProto, TensorProto

from shared_runtime.graph.check import read_whole
from shared_runtime.signature import Tensors

Shape = tuple[int, ...]
BIG = 4096
"""Weights with more elements are left out of shape inference: no shape is computed from them."""


class NodeCost(msgspec.Struct, frozen=True):
    """One node: arithmetic [floating point operations], bytes read and written, bytes of its weights."""

    name: str
    kind: str
    operations: float
    bytes_read: int
    bytes_written: int
    weight_bytes: int


class GraphCost(msgspec.Struct, frozen=True):
    """The nodes in order, and `unknown`: kinds of nodes whose shapes could not be told."""

    nodes: tuple[NodeCost, ...]
    unknown: tuple[str, ...]

    @property
    def operations(self) -> float:
        """Arithmetic of all nodes."""
        return sum(node.operations for node in self.nodes)

    @property
    def bytes(self) -> int:
        """Bytes that all nodes read and write, each counted where it is used."""
        return sum(node.bytes_read + node.bytes_written for node in self.nodes)


def tensor_sizes(model: onnx.ModelProto, inputs: Mapping[str, Shape]) -> tuple[dict[str, Shape], dict[str, int]]:
    """The shape and the bytes of one element of every tensor whose shape can be told, for inputs of these shapes."""
    weights = {item.name: item for item in model.graph.initializer}
    light = onnx.ModelProto()
    light.ir_version = model.ir_version
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = "shapes"
    graph.node.extend(model.graph.node)
    graph.output.extend(onnx.helper.make_empty_tensor_value_info(output.name) for output in model.graph.output)
    for value in model.graph.input:
        if value.name in inputs:
            graph.input.append(onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, inputs[value.name]))
    for name, item in weights.items():
        if math.prod(item.dims) > BIG:
            graph.input.append(onnx.helper.make_tensor_value_info(name, item.data_type, list(item.dims)))
        else:
            graph.initializer.append(item)
    inferred = onnx.shape_inference.infer_shapes(light, data_prop=True)
    shapes: dict[str, Shape] = {name: tuple(item.dims) for name, item in weights.items()}
    widths = {name: _width(item.data_type) for name, item in weights.items()}
    for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            shapes[value.name] = tuple(int(d.dim_value) for d in tensor.shape.dim)
            widths[value.name] = _width(tensor.elem_type)
    return shapes, widths


def graph_cost(graph: Path | onnx.ModelProto, inputs: Tensors) -> GraphCost:
    """The cost of running `graph` once on `inputs` (their shapes count, not their values)."""
    model = read_whole(graph) if isinstance(graph, Path) else graph
    shapes, widths = tensor_sizes(model, {name: tuple(value.shape) for name, value in inputs.items()})
    weights = {item.name for item in model.graph.initializer}
    nodes, unknown = [], set()
    for index, node in enumerate(model.graph.node):
        known = [name for name in (*node.input, *node.output) if name and name in shapes]
        if len(known) < len([name for name in (*node.input, *node.output) if name]):
            unknown.add(node.op_type)
        size = {name: math.prod(shapes[name]) * widths[name] for name in known}
        nodes.append(
            NodeCost(
                node.name or f"{node.op_type}_{index}",
                node.op_type,
                operations(node, shapes),
                sum(size.get(name, 0) for name in node.input),
                sum(size.get(name, 0) for name in node.output),
                sum(size.get(name, 0) for name in node.input if name in weights),
            )
        )
    return GraphCost(tuple(nodes), tuple(sorted(unknown)))


def operations(node: NodeProto, shapes: Mapping[str, Shape]) -> float:
    """Floating point operations of a node (a multiply-add counts two); one an output element for what is not listed."""
    ins = [shapes.get(name, ()) for name in node.input]
    out = next((shapes[name] for name in node.output if name in shapes), ())
    rule = _RULES.get(node.op_type)
    if rule is None:
        return float(math.prod(out)) * _EACH.get(node.op_type, 1.0)
    try:
        return float(rule(node, ins, out))
    except (IndexError, KeyError):
        return 0.0


def _conv(node: NodeProto, ins: list[Shape], out: Shape) -> float:
    return 2.0 * math.prod(out) * math.prod(ins[1][1:])


def _conv_transpose(node: NodeProto, ins: list[Shape], out: Shape) -> float:
    return 2.0 * math.prod(ins[0]) * math.prod(ins[1][1:])


def _matmul(node: NodeProto, ins: list[Shape], out: Shape) -> float:
    return 2.0 * math.prod(out) * ins[0][-1]


def _gemm(node: NodeProto, ins: list[Shape], out: Shape) -> float:
    inner = ins[0][0] if _attribute(node, "transA", 0) else ins[0][1]
    return 2.0 * math.prod(out) * inner


def _lstm(node: NodeProto, ins: list[Shape], out: Shape) -> float:
    steps, rows, _ = ins[0]
    return 2.0 * steps * rows * (math.prod(ins[1]) + math.prod(ins[2]))


def _attention(node: NodeProto, ins: list[Shape], out: Shape) -> float:
    return 4.0 * math.prod(ins[0]) * ins[1][-2]


def _trees(node: NodeProto, ins: list[Shape], out: Shape) -> float:
    trees = len(set(_attribute(node, "nodes_treeids", [0])))
    depth = math.log2(max(2.0, len(_attribute(node, "nodes_treeids", [0])) / max(1, trees)))
    return 2.0 * (ins[0][0] if ins[0] else 1) * trees * depth


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    found = next((item for item in node.attribute if item.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


_RULES: Mapping[str, Callable[[NodeProto, list[Shape], Shape], float]] = {
    "Attention": _attention,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "LSTM": _lstm,
    "MatMul": _matmul,
    "TreeEnsemble": _trees,
    "TreeEnsembleClassifier": _trees,
    "TreeEnsembleRegressor": _trees,
}
_EACH: Mapping[str, float] = {
    "BatchNormalization": 2.0,
    "Constant": 0.0,
    "Erf": 8.0,
    "Exp": 8.0,
    "Flatten": 0.0,
    "Gelu": 10.0,
    "GroupNormalization": 6.0,
    "Identity": 0.0,
    "InstanceNormalization": 6.0,
    "LayerNormalization": 6.0,
    "Reshape": 0.0,
    "Shape": 0.0,
    "Sigmoid": 4.0,
    "Softmax": 10.0,
    "Squeeze": 0.0,
    "Tanh": 8.0,
    "Transpose": 0.0,
    "Unsqueeze": 0.0,
}


def _width(elem_type: int) -> int:
    if elem_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        return 0
    return int(onnx.helper.tensor_dtype_to_np_dtype(elem_type).itemsize)
