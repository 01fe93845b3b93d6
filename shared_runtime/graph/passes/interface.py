"""Passes that move work at the graph's ends into it: normalisation, CT window, layout, softmax, argmax. They change the signature."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shared_runtime.graph.passes.base import PassRefused


class _AtInput:
    """A new input stands before the old one, with nodes between."""

    tolerance, engine = None, ""

    def _input(self, model: onnx.ModelProto, options: dict[str, Any]) -> onnx.ValueInfoProto:
        weights = {item.name for item in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in weights]
        name = options.get("input", inputs[0].name)
        found = next((value for value in inputs if value.name == name), None)
        if found is None:
            raise PassRefused(f"the graph has no input {name!r}; it has {[value.name for value in inputs]}")
        return found

    def _before(self, model: onnx.ModelProto, value: onnx.ValueInfoProto, nodes: list[onnx.NodeProto], constants: dict[str, Any]) -> int:
        """`nodes` lead from the input's name to its name with `_inner`; the graph then reads the latter."""
        name = value.name
        for node in model.graph.node:
            for place, read in enumerate(node.input):
                if read == name:
                    node.input[place] = f"{name}_inner"
        for node in reversed(nodes):
            model.graph.node.insert(0, node)
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), key) for key, v in constants.items())
        return len(nodes)


class Normalize(_AtInput):
    """(x - mean) / std, a channel on axis 1, in the graph."""

    name, summary = "normalize-input", "put (x - mean) / std into the graph: options mean, std, input"

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        value = self._input(model, options)
        if "mean" not in options or "std" not in options:
            raise PassRefused("it needs the options mean and std, a number a channel")
        mean, std = (np.atleast_1d(np.asarray(options[key], np.float32)) for key in ("mean", "std"))
        if (std <= 0).any():
            raise PassRefused(f"std holds {float(std.min())}; expected numbers above 0")
        rank = len(value.type.tensor_type.shape.dim)
        shape = [1, -1, *([1] * (rank - 2))]
        name = value.name
        nodes = [
            helper.make_node("Sub", [name, f"{name}_mean"], [f"{name}_centred"]),
            helper.make_node("Mul", [f"{name}_centred", f"{name}_scale"], [f"{name}_inner"]),
        ]
        return self._before(model, value, nodes, {f"{name}_mean": mean.reshape(shape), f"{name}_scale": (1 / std).reshape(shape)})


class Window(_AtInput):
    """A CT window: clip to centre +- width / 2 and scale to 0..1."""

    name, summary = "window-input", "put a CT window (clip and scale to 0..1) into the graph: options center, width [HU], input"

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        value = self._input(model, options)
        center, width = options.get("center"), options.get("width")
        if center is None or width is None or float(width) <= 0:
            raise PassRefused("it needs the options center and width, the width above 0")
        low, high = np.float32(center - width / 2), np.float32(center + width / 2)
        name = value.name
        nodes = [
            helper.make_node("Clip", [name, f"{name}_low", f"{name}_high"], [f"{name}_clipped"]),
            helper.make_node("Sub", [f"{name}_clipped", f"{name}_low"], [f"{name}_shifted"]),
            helper.make_node("Mul", [f"{name}_shifted", f"{name}_scale"], [f"{name}_inner"]),
        ]
        return self._before(model, value, nodes, {f"{name}_low": low, f"{name}_high": high, f"{name}_scale": np.float32(1 / width)})


class ChannelsLastInput(_AtInput):
    """The input as cameras and files give it: channels last (and bytes, with `uint8`)."""

    name, summary = "channels-last-input", "take inputs with channels last, as bytes with the option uint8=True"

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        value = self._input(model, options)
        dims = value.type.tensor_type.shape.dim
        rank = len(dims)
        if rank < 3:
            raise PassRefused(f"input {value.name!r} has {rank} dimensions; expected (batch, channels, ...)")
        order = [0, *range(2, rank), 1]
        moved = [onnx.TensorShapeProto.Dimension() for _ in dims]
        for target, axis in zip(moved, order, strict=True):
            target.CopyFrom(dims[axis])
        del dims[:]
        dims.extend(moved)
        name, source, nodes = value.name, value.name, []
        if options.get("uint8"):
            value.type.tensor_type.elem_type = TensorProto.UINT8
            nodes.append(helper.make_node("Cast", [name], [f"{name}_float"], to=TensorProto.FLOAT))
            source = f"{name}_float"
        nodes.append(helper.make_node("Transpose", [source], [f"{name}_inner"], perm=[0, rank - 1, *range(1, rank - 1)]))
        return self._before(model, value, nodes, {})


class _AtOutput:
    """Nodes behind an output; the old name stays inside the graph."""

    tolerance, engine = None, ""

    def _output(self, model: onnx.ModelProto, options: dict[str, Any]) -> onnx.ValueInfoProto:
        name = options.get("output", model.graph.output[0].name)
        found = next((value for value in model.graph.output if value.name == name), None)
        if found is None:
            raise PassRefused(f"the graph has no output {name!r}; it has {[value.name for value in model.graph.output]}")
        if len(found.type.tensor_type.shape.dim) < 2:
            raise PassRefused(f"output {name!r} has no class axis; expected (batch, classes, ...)")
        return found


class SoftmaxOutput(_AtOutput):
    """Probabilities instead of logits, over axis 1."""

    name, summary = "softmax-output", "give probabilities over axis 1 instead of logits: option output"

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        value = self._output(model, options)
        model.graph.node.append(helper.make_node("Softmax", [value.name], [f"{value.name}_probabilities"], axis=1))
        value.name = f"{value.name}_probabilities"
        return 1


class ArgmaxOutput(_AtOutput):
    """A label map of bytes instead of logits: a quarter of one class's memory crosses to the host."""

    name, summary = "argmax-output", "give the highest class of axis 1 as bytes instead of logits: option output"

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        value = self._output(model, options)
        dims = value.type.tensor_type.shape.dim
        if dims[1].HasField("dim_value") and dims[1].dim_value > 256:
            raise PassRefused(f"{dims[1].dim_value} classes do not fit into a byte")
        name = value.name
        model.graph.node.append(helper.make_node("ArgMax", [name], [f"{name}_index"], axis=1, keepdims=0))
        model.graph.node.append(helper.make_node("Cast", [f"{name}_index"], [f"{name}_labels"], to=TensorProto.UINT8))
        kept = [dim for axis, dim in enumerate(dims) if axis != 1]
        shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in kept]
        value.CopyFrom(helper.make_tensor_value_info(f"{name}_labels", TensorProto.UINT8, shape))
        return 2
