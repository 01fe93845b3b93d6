"""Matrix products in FP8 (e4m3) as one call each, in place of QuantizeLinear, DequantizeLinear, MatMul or Gemm, and Add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from shared_runtime.graph.passes.base import GraphEditor, attribute

KIND = "Float8MatMul"
MULTIPLE = 16
"""What both sides of a matrix in FP8 are multiples of, or the hardware does not take it."""
_PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0}


def fuse(proto: onnx.ModelProto) -> int:
    """Write the half-precision products of two FP8 matrices with one scale each as nodes `KIND`; how many there are.

    Such a node reads x (..., K), its scale, the weight (K, N), or (N, K) with `transB`, its scale, and a bias (N,) or nothing.
    """
    editor, absorbed, count = GraphEditor(proto), set(), 0
    layout: dict[str, int] = {}
    for node in proto.graph.node:
        plain = node.op_type == "MatMul" or (node.op_type == "Gemm" and all(attribute(node, k, v) == v for k, v in _PLAIN.items()))
        if not plain or (x := _in_float8(editor, node.input[0])) is None or (w := _in_float8(editor, node.input[1])) is None:
            continue
        weight, turned = editor.constants.get(w[0]), attribute(node, "transB", 0)
        if weight is None or not takes(weight):
            continue
        if layout.setdefault(w[0], turned) != turned:
            continue  # a weight lies one way in memory
        columns = [weight.dims[0 if turned else 1]]
        bias, result = node.input[2] if len(node.input) > 2 else "", node.output[0]
        if bias and (bias not in editor.constants or list(editor.constants[bias].dims) != columns):
            continue
        if not bias and (reader := editor.only_reader(result)) is not None and reader.op_type == "Add":
            found = [name for name in reader.input if name in editor.constants and list(editor.constants[name].dims) == columns]
            if found:
                bias, result = found[0], reader.output[0]
                absorbed.add(result)
        scales = [_wide(editor, scale) for scale in (x[1], w[1])]
        node.CopyFrom(helper.make_node(KIND, [x[0], scales[0], w[0], scales[1], bias], [result], node.name, transB=turned))
        count += 1
    read = {name for node in proto.graph.node for name in node.input} | editor.outputs
    given_back = {node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    gone = absorbed | (given_back - read)
    kept = [node for node in proto.graph.node if node.op_type == KIND or not gone & set(node.output)]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    return count


def takes(matrix: TensorProto) -> bool:
    """Whether the FP8 units take a constant."""
    return len(matrix.dims) == 2 and not any(side % MULTIPLE for side in matrix.dims)


def _in_float8(editor: GraphEditor, name: str) -> tuple[str, str] | None:
    """The FP8 tensor and the half-precision scale of which `name` is the product, or None."""
    node = editor.maker.get(name)
    if node is None or node.op_type != "DequantizeLinear":
        return None
    stored, scale = editor.constants.get(node.input[0]), editor.constants.get(node.input[1])
    if scale is None or scale.data_type != TensorProto.FLOAT16 or scale.dims:
        return None
    source = editor.maker.get(node.input[0])
    if stored is None and source is not None and source.op_type == "QuantizeLinear" and len(source.input) > 2:
        stored = editor.constants.get(source.input[2])  # the zero point, which says the type
    if stored is None or stored.data_type != TensorProto.FLOAT8E4M3FN:
        return None
    return node.input[0], node.input[1]


def _wide(editor: GraphEditor, scale: str) -> str:
    """The name of a scale in float32, as the product takes it; others may still read it in half precision."""
    name = f"{scale}_float32"
    if name not in editor.constants:
        editor.set_value(name, np.asarray(editor.value(scale), np.float32))
    return name


def lay_out(inputs: tuple[str, ...], attributes: Mapping[str, Any], weights: dict[str, Tensor]) -> None:
    """Bring the weight of a node `KIND` to how the product takes it: column by column."""
    name = inputs[2]
    weights[name] = weights[name] if attributes.get("transB") else weights[name].t().contiguous().t()


def multiply(inputs: list[Any], attributes: Mapping[str, Any]) -> Tensor:
    """x (..., K) and weight (K, N), both e4m3, with their scales (): (..., N) float16."""
    x, x_scale, weight, scale, bias = inputs
    weight = weight.t() if attributes.get("transB") else weight
    rows = x.reshape(-1, x.shape[-1])
    product = torch._scaled_mm(rows, weight, x_scale, scale, bias=bias, out_dtype=torch.float16, use_fast_accum=True)
    return product.reshape(*x.shape[:-1], weight.shape[1])
