"""Each kind of layer in INT8 with a scale a channel and a quantizer behind it: OpenVINO gives ONNX Runtime's numbers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import shared_runtime as rt
from shared_runtime.backends.base import backends
from shared_runtime.graph.passes.base import plain_session
from shared_runtime.numeric import relative_difference
from tests.contract.test_random_networks import Draw

pytest.importorskip("openvino")
SHAPES = [(8, 12), (8, 6, 10), (4, 6, 10, 4)]
REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceSum")
KINDS = [
    "dense",
    "product",
    "product-turned",
    "convolution",
    "depthwise",
    "deconvolution",
    "GlobalAveragePool",
    "InstanceNormalization",
    "Softmax",
    "Add",
    "Concat",
    "MaxPool",
    "Transpose",
    *(f"{kind}-{axis}-{keep}" for kind in REDUCTIONS for axis in (1, -1) for keep in (0, 1)),
]
NEAR = 0.04
"""Relative difference that one step of rounding makes at most."""


class Quantized(Draw):
    """A graph in INT8; `signed`: quantizers without a zero point."""

    def __init__(self, signed: bool) -> None:
        super().__init__(0)
        self.weights["zero"] = np.array(0, np.int8) if signed else np.array(128, np.uint8)

    def rounded(self, value: str, step: float) -> str:
        """A quantizer and what takes it back."""
        size = self.constant(np.array(step, np.float32))
        return self.add("DequantizeLinear", [self.add("QuantizeLinear", [value, size, "zero"]), size, "zero"])

    def matrix(self, shape: tuple[int, ...], axis: int) -> str:
        """Weights in INT8 with a scale for each place along an axis."""
        values = self.random.standard_normal(shape) / np.sqrt(np.prod(shape) / shape[axis])
        others = tuple(place for place in range(len(shape)) if place != axis)
        scale = np.abs(values).max(axis=others, keepdims=True) / 127
        names = [self.constant(np.round(values / scale).astype(np.int8)), self.constant(scale.ravel().astype(np.float32))]
        return self.add("DequantizeLinear", [*names, self.constant(np.zeros(shape[axis], np.int8))], axis=axis)

    def layer(self, kind: str, value: str, shape: tuple[int, ...]) -> str:
        """A layer of a kind over what has `shape` but for its rows."""
        channels, spatial = shape[0], len(shape) - 1
        if kind == "dense":
            return self.add("MatMul", [value, self.matrix((shape[-1], 16), 1)])
        if kind.startswith("product"):
            turned = self.add("Transpose", [value], perm=[*range(spatial), spatial + 1, spatial])
            return self.add("MatMul", [value, turned] if kind == "product" else [turned, value])
        if kind in ("convolution", "depthwise"):
            groups = channels if kind == "depthwise" else 1
            kernel = self.matrix((16 if groups == 1 else channels, channels // groups, *[3] * spatial), 0)
            return self.add("Conv", [value, kernel], pads=[1] * 2 * spatial, group=groups)
        if kind == "deconvolution":
            return self.add("ConvTranspose", [value, self.matrix((channels, 16, *[2] * spatial), 1)], strides=[2] * spatial)
        if kind == "InstanceNormalization":
            return self.add(kind, [value, self.constant(np.ones(channels, np.float32)), self.constant(np.zeros(channels, np.float32))])
        if kind in ("Add", "Concat"):
            other = self.rounded(self.add("Tanh", ["x"]), 0.03)
            return self.add(kind, [value, other], **({"axis": 1} if kind == "Concat" else {}))
        if kind.startswith("Reduce"):
            name, axis, keep = kind.replace("--", "-~").split("-")  # "ReduceMean--1-0"
            return self.add(name, [value, self.constant(np.array([int(axis.replace("~", "-"))]))], keepdims=int(keep))
        options: dict[str, Any] = {"Softmax": {"axis": -1}, "MaxPool": {"kernel_shape": [2] * spatial, "strides": [2] * spatial}}
        return self.add(kind, [value], **options.get(kind, {"perm": [0, *range(2, spatial + 2), 1]} if kind == "Transpose" else {}))

    def model(self, output: str, given: list[Any], made: list[Any]) -> onnx.ModelProto:
        """The graph from `x` to a value."""
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in (("x", given), (output, made)))
        stored = [numpy_helper.from_array(np.asarray(values), name) for name, values in self.weights.items()]
        graph = helper.make_graph(self.nodes, "layer", [x], [y], stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def network(kind: str, shape: tuple[int, ...], last: bool, signed: bool, path: Path) -> Path | None:
    """Write a layer with a scale along its channels or its last axis behind it; None where it has no such axis."""
    draw = Quantized(signed)
    value = draw.layer(kind, draw.rounded("x", 0.03), shape)
    made = plain_session(draw.model(value, [2, *shape], [None] * 2)).run(None, {"x": np.zeros((2, *shape), np.float32)})[0].shape
    axis = len(made) - 1 if last else 1
    if axis < 1 or (last and axis == 1):
        return None
    sizes = [size if place == axis else 1 for place, size in enumerate(made)]
    scaled = draw.add("Mul", [value, draw.constant(draw.random.uniform(0.4, 2, sizes).astype(np.float32))])
    moved = draw.add("Add", [scaled, draw.constant(draw.random.standard_normal(sizes).astype(np.float32))])
    onnx.save(draw.model(draw.rounded(moved, 0.05), ["batch", *shape], ["batch", *(f"size{place}" for place in range(1, len(made)))]), path)
    return path


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{len(shape) + 1}d")
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_in_int8(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    far = {}
    for last, signed in itertools.product((False, True), (False, True)):
        path = network(kind, shape, last, signed, tmp_path / f"{last}{signed}.onnx")
        if path is None:
            continue
        x = np.random.default_rng(1).standard_normal((5, *shape)).astype(np.float32)
        session, executable = plain_session(path), backends()["openvino"].compile(rt.load(path), "cpu", 1)
        for rows, told in ((5, False), (1, False), (2, True), (5, True)):
            if told:
                executable.specialise({"x": x[:rows]})
            output = next(iter(executable.run({"x": x[:rows]}).values()))
            if (error := relative_difference(output, session.run(None, {"x": x[:rows]})[0])) > NEAR:
                far["last axis" if last else "channels", "signed" if signed else "with a zero point", rows, told] = round(error, 2)
    assert far == {}
