"""Makes a program of an ONNX graph, for inputs of given shapes: what depends on shapes or constants alone is computed here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.kernels.fused import products, rules
from shared_runtime.kernels.fused.program import Builder, Program, View
from shared_runtime.kernels.fused.rules import Value

RULES = {**rules.RULES, **products.RULES}
FOLDED = {"Constant", "ConstantOfShape", "Range", "Equal", "Where", "Not", "And", "Or", "Less", "Greater", "Mod", "Tile", "NonZero", "Size"}
"""Operators that only constants may go through, beside those with a rule."""


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
