"""Small networks of known behaviour, as ONNX files, for the tests of the runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import shared_runtime as rt


def run(model: rt.Model, inputs: dict[str, np.ndarray], tmp_path: Path) -> dict[str, np.ndarray]:
    """The outputs in a session of its own."""
    with rt.Session(model, plans=tmp_path / "plans") as session:
        return session.run(inputs)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    inputs: dict[str, list],
    outputs: dict[str, list],
    opset: int = 17,
) -> Path:
    """Write a checked float graph."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def prototypes(classes: int = 4, side: int = 8, seed: int = 0) -> np.ndarray:
    """Patterns (classes, 3, side, side) that the classifiers tell apart."""
    return np.random.default_rng(seed).standard_normal((classes, 3, side, side)).astype(np.float32)


def samples(count: int, seed: int, noise: float = 0.5) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """(inputs, target) pairs of one row: a pattern with noise."""
    generator, patterns = np.random.default_rng(seed), prototypes()
    pairs = []
    for place in range(count):
        label = place % len(patterns)
        image = patterns[label] + noise * generator.standard_normal(patterns[label].shape)
        pairs.append(({"image": image[None].astype(np.float32)}, np.array([label])))
    return pairs


def classifier(path: Path, fragile: bool) -> Path:
    """A matched filter behind two convolutions that hand the image on. A fragile one scales its channels 10,000 times apart
    in between and back: one activation range for all of them leaves the small channel nothing in INT8."""
    scales = np.array([1.0, 1e-4, 1e4] if fragile else [1.0, 1.0, 1.0], np.float32)
    kernel = np.zeros((3, 3, 3, 3), np.float32)
    back = kernel.copy()
    for channel in range(3):
        kernel[channel, channel, 1, 1] = scales[channel]
        back[channel, channel, 1, 1] = 1 / scales[channel]
    filters = prototypes().reshape(4, -1).T.copy()
    if fragile:  # the decision rests on the small channel alone
        mask = np.zeros((3, 8, 8), np.float32)
        mask[1] = 1
        filters *= mask.reshape(-1, 1)
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["spread"], name="spread", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["spread", "back"], ["even"], name="even", pads=[1, 1, 1, 1]),
        helper.make_node("Flatten", ["even"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "filters"], ["logits"], name="filter"),
    ]
    weights = {"kernel": kernel, "back": back, "filters": filters}
    return save(path, nodes, weights, {"image": ["batch", 3, 8, 8]}, {"logits": ["batch", 4]})
