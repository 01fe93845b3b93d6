"""Passes that move work at the graph's ends into it: normalisation, CT window, layout, softmax, argmax. They change the signature."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shared_runtime.graph.passes.base import PassRefused

PARTS = ("inner", "mean", "scale", "centred", "low", "high", "clipped", "shifted", "float")


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

    def _stem(self, model: onnx.ModelProto, name: str) -> str:
        """What the names of new tensors before input `name` begin with: another pass may stand there already."""
        used = {item.name for item in model.graph.initializer} | {out for node in model.graph.node for out in node.output}
        stems = (name if count == 1 else f"{name}_{count}" for count in itertools.count(1))
        return next(stem for stem in stems if not used & {f"{stem}_{part}" for part in PARTS})

    def _before(
        self, model: onnx.ModelProto, value: onnx.ValueInfoProto, inner: str, nodes: list[onnx.NodeProto], constants: dict[str, Any]
    ) -> int:
        """`nodes` lead from the input's name to `inner`; the graph then reads the latter."""
        for node in model.graph.node:
            node.input[:] = [inner if read == value.name else read for read in node.input]
        for node in reversed(nodes):
            model.graph.node.insert(0, node)
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), key) for key, v in constants.items())
        return len(nodes)


class Normalize(_AtInput):
    """(x - mean) / std, a channel on axis 1, in the graph."""

    name, summary = "normalize-input", "put (x - mean) / std into the graph: options mean, std, input"
    options = ("mean", "std", "input")

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        value = self._input(model, options)
        if "mean" not in options or "std" not in options:
            raise PassRefused("it needs the options mean and std, a number a channel")
        mean, std = (np.atleast_1d(np.asarray(options[key], np.float32)) for key in ("mean", "std"))
        if not (std > 0).all() or not np.isfinite([*mean, *std]).all():
            raise PassRefused(f"mean holds {mean.tolist()} and std {std.tolist()}; expected numbers, those of std above 0")
        _floats(value)
        dims = value.type.tensor_type.shape.dim
        channels = dims[1].dim_value if len(dims) > 1 else 0
        if any(part.size > 1 and channels and part.size != channels for part in (mean, std)):
            raise PassRefused(
                f"mean and std hold {mean.size} and {std.size} numbers and input {value.name!r} has {channels} channels (axis 1); "
                "expected one number, or one a channel; normalize-input goes before channels-last-input"
            )
        shape = [1, -1, *([1] * (len(dims) - 2))]
        name, stem = value.name, self._stem(model, value.name)
        inner = f"{stem}_inner"
        nodes = [
            helper.make_node("Sub", [name, f"{stem}_mean"], [f"{stem}_centred"]),
            helper.make_node("Mul", [f"{stem}_centred", f"{stem}_scale"], [inner]),
        ]
        constants = {f"{stem}_mean": mean.reshape(shape), f"{stem}_scale": (1 / std).reshape(shape)}
        return self._before(model, value, inner, nodes, constants)


class Window(_AtInput):
    """A CT window: clip to centre +- width / 2 and scale to 0..1."""

    name, summary = "window-input", "put a CT window (clip and scale to 0..1) into the graph: options center, width [HU], input"
    options = ("center", "width", "input")

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        value = self._input(model, options)
        center, width = options.get("center"), options.get("width")
        if center is None or width is None or not np.isfinite([center, width]).all() or float(width) <= 0:
            raise PassRefused("it needs the options center and width, the width above 0")
        _floats(value)
        low, high = np.float32(center - width / 2), np.float32(center + width / 2)
        name, stem = value.name, self._stem(model, value.name)
        inner = f"{stem}_inner"
        nodes = [
            helper.make_node("Clip", [name, f"{stem}_low", f"{stem}_high"], [f"{stem}_clipped"]),
            helper.make_node("Sub", [f"{stem}_clipped", f"{stem}_low"], [f"{stem}_shifted"]),
            helper.make_node("Mul", [f"{stem}_shifted", f"{stem}_scale"], [inner]),
        ]
        constants = {f"{stem}_low": low, f"{stem}_high": high, f"{stem}_scale": np.float32(1 / width)}
        return self._before(model, value, inner, nodes, constants)


class ChannelsLastInput(_AtInput):
    """The input as cameras and files give it: channels last (and bytes, with `uint8`)."""

    name, summary = "channels-last-input", "take inputs with channels last, as bytes with the option uint8=True"
    options = ("uint8", "input")

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
        source, nodes, stem = value.name, [], self._stem(model, value.name)
        if options.get("uint8"):
            _floats(value)
            value.type.tensor_type.elem_type = TensorProto.UINT8
            nodes.append(helper.make_node("Cast", [source], [f"{stem}_float"], to=TensorProto.FLOAT))
            source = f"{stem}_float"
        nodes.append(helper.make_node("Transpose", [source], [f"{stem}_inner"], perm=[0, rank - 1, *range(1, rank - 1)]))
        return self._before(model, value, f"{stem}_inner", nodes, {})


def _floats(value: onnx.ValueInfoProto) -> None:
    """Raise PassRefused where an input is not in float32."""
    kind = value.type.tensor_type.elem_type
    if kind != TensorProto.FLOAT:
        name = TensorProto.DataType.Name(kind).lower()
        raise PassRefused(f"input {value.name!r} is {name}; expected float32: what makes bytes of it (channels-last-input) goes last")


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
    options = ("output",)

    def apply(self, model: onnx.ModelProto, **options: Any) -> int:
        value = self._output(model, options)
        model.graph.node.append(helper.make_node("Softmax", [value.name], [f"{value.name}_probabilities"], axis=1))
        value.name = f"{value.name}_probabilities"
        return 1


class ArgmaxOutput(_AtOutput):
    """A label map of bytes instead of logits: a quarter of one class's memory crosses to the host."""

    name, summary = "argmax-output", "give the highest class of axis 1 as bytes instead of logits: option output"
    options = ("output",)

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
