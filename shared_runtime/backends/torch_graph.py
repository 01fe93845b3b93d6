"""An ONNX graph as torch calls, operator by operator, or as one torch.fx module for shapes that are known.

A graph with an operator or attribute outside of `torch_operators` is refused when it is loaded, never run approximately.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from shared_runtime.backends import torch_float8
from shared_runtime.backends.torch_operators import HOST_INPUTS, OPERATORS, torch_dtype
from shared_runtime.backends.torch_windows import Attributes
from shared_runtime.errors import UnsupportedModelError
from shared_runtime.graph.check import opset, read_whole
from shared_runtime.graph.passes.simplify import ConstantFolding


def _attributes(node: onnx.NodeProto, version: int) -> dict[str, Any]:
    found: dict[str, Any] = {"opset": version}
    for item in node.attribute:
        value = onnx.helper.get_attribute_value(item)
        if isinstance(value, onnx.TensorProto):
            value = _tensor(value)
        found[item.name] = value.decode() if isinstance(value, bytes) else value
    if node.op_type == "Cast":
        found["dtype"] = torch_dtype(found["to"])
    return found


def _tensor(proto: onnx.TensorProto) -> Tensor:
    array = numpy_helper.to_array(proto)
    if proto.data_type in (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT8E4M3FN):
        return torch.from_numpy(array.astype(np.float32)).to(torch_dtype(proto.data_type))
    return torch.from_numpy(array.copy())


FEW = 8
"""Numbers up to which a constant may be part of a shape."""
SEVERAL = ("Split", "LSTM", "GRU", "TopK")
"""Kinds whose call gives a tuple, also where one output is read."""


@dataclass(frozen=True)
class Step:
    """One node: what computes it, the names it reads and writes."""

    kind: str
    operator: Callable[[list[Any], Attributes], Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Attributes


class GraphProgram:
    """The nodes of an ONNX file, ready on a device. Calling it maps named tensors to named tensors."""

    def __init__(self, graph: Path, device: str, channels_last: bool = False) -> None:
        proto = read_whole(graph)
        ConstantFolding().apply(proto)
        torch_float8.fuse(proto)
        if missing := sorted({node.op_type for node in proto.graph.node} - set(OPERATORS)):
            raise UnsupportedModelError(f"operators {missing} have no torch form here")
        version = opset(proto)
        self.steps = [
            Step(n.op_type, OPERATORS[n.op_type], tuple(n.input), tuple(n.output), _attributes(n, version)) for n in proto.graph.node
        ]
        self.outputs = [value.name for value in proto.graph.output]
        self.device, self.channels_last = device, channels_last
        host = {name for step in self.steps for at in HOST_INPUTS.get(step.kind, ()) for name in step.inputs[at : at + 1]}
        self.constants: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        for item in proto.graph.initializer:
            tensor = _tensor(item)
            # Whole and few numbers are kept on the host too: shapes are computed from them.
            if item.name in host or tensor.dtype in (torch.int32, torch.int64) or tensor.numel() <= FEW:
                self.constants[item.name] = tensor
            self._weights[item.name] = self.laid_out(tensor.to(device))
        self._make_constants_ready()
        self._last = {name: index for index, step in enumerate(self.steps) for name in step.inputs}

    def _make_constants_ready(self) -> None:
        """Weights that are stored narrow are given back once, unless a product takes them as they are."""
        later = []
        for step in self.steps:
            if step.kind == "DequantizeLinear" and all(name in self._weights for name in step.inputs if name):
                given = [self._weights[name] if name else None for name in step.inputs]
                self._weights[step.outputs[0]] = self.laid_out(step.operator(given, step.attributes))
            else:
                later.append(step)
            if step.kind == torch_float8.KIND:
                torch_float8.lay_out(step.inputs, step.attributes, self._weights)
        self.steps = later
        read = {name for step in self.steps for name in step.inputs} | set(self.outputs)
        self._weights = {name: value for name, value in self._weights.items() if name in read}

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The tensor in channels-last memory where that is this program's layout."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if not self.channels_last or tensor.dim() not in formats:
            return tensor
        return tensor.contiguous(memory_format=formats[tensor.dim()])

    def timed(self, given: Mapping[str, Tensor], watch: Callable[[int, str, str, float], None]) -> None:
        """Run once and tell `watch` the place, kind, name and seconds of each step."""
        values: dict[str, Any] = {**self._weights, **{name: self.laid_out(value) for name, value in given.items()}}
        static: dict[str, Any] = dict(self.constants)
        for index, step in enumerate(self.steps):
            begin = time.perf_counter()
            self._execute(step, values, static)
            if self.device == "cuda":
                torch.cuda.synchronize()
            watch(index, step.kind, next(filter(None, step.outputs)), time.perf_counter() - begin)

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values: dict[str, Any] = {**self._weights, **{name: self.laid_out(value) for name, value in given.items()}}
        static: dict[str, Any] = dict(self.constants)
        for index, step in enumerate(self.steps):
            self._execute(step, values, static)
            for name in step.inputs:
                if self._last.get(name) == index and name not in self.outputs and name not in self._weights:
                    values.pop(name, None)
        return {name: values[name] for name in self.outputs}

    def _execute(self, step: Step, values: dict[str, Any], static: dict[str, Any]) -> bool:
        """Run one step; True where its result is known from the shapes alone, and so computed on the host."""
        known = step.kind == "Shape" or all(name in static for name in step.inputs if name)
        source = static if known and step.kind != "Shape" else values
        hosted = HOST_INPUTS.get(step.kind, ())
        arguments: list[Any] = []
        for at, name in enumerate(step.inputs):
            if not name:
                arguments.append(None)
            elif at in hosted:
                arguments.append((static[name] if name in static else values[name]).reshape(-1).tolist())
            else:
                arguments.append(source[name])
        if step.kind == "Range":
            arguments = [value[0] for value in arguments]
        result = step.operator(arguments, step.attributes)
        for name, value in zip(step.outputs, result if isinstance(result, tuple) else (result,), strict=False):
            if known:
                static[name] = value
                values[name] = value.to(self.device)
            else:
                values[name] = value
        return known

    def straight(self, given: Mapping[str, Tensor]) -> torch.fx.GraphModule:
        """The program for exactly these shapes as a torch.fx module from tensors to a tuple of outputs: what
        depends on the shapes alone is computed now, so that it can be compiled or captured."""
        values: dict[str, Any] = {**self._weights, **{name: self.laid_out(value) for name, value in given.items()}}
        static: dict[str, Any] = dict(self.constants)
        root = torch.nn.Module()
        graph = torch.fx.Graph()
        nodes: dict[str, torch.fx.Node] = {name: graph.placeholder(f"input_{i}") for i, name in enumerate(given)}

        def node(name: str) -> Any:
            if name not in nodes:
                key = f"constant_{len(nodes)}"
                root.register_buffer(key, values[name])
                nodes[name] = graph.get_attr(key)
            return nodes[name]

        for step in self.steps:
            if self._execute(step, values, static):
                continue
            hosted = HOST_INPUTS.get(step.kind, ())
            arguments = [
                None if not name else (static[name].reshape(-1).tolist() if at in hosted and name in static else node(name))
                for at, name in enumerate(step.inputs)
            ]
            made = graph.call_function(step.operator, (arguments, dict(step.attributes)))
            if len(step.outputs) == 1 and not isinstance(values[step.outputs[0]], tuple) and step.kind not in SEVERAL:
                nodes[step.outputs[0]] = made
            else:
                for at, name in enumerate(step.outputs):
                    if name:
                        nodes[name] = graph.call_function(operator.getitem, (made, at))
        graph.output(tuple(node(name) for name in self.outputs))
        return torch.fx.GraphModule(root, graph)
