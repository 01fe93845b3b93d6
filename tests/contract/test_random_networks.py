"""Random small networks: each engine gives ONNX Runtime's numbers for few rows and many, and none ends the process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from shared_runtime.backends.base import backends
from shared_runtime.graph.passes.base import plain_session
from shared_runtime.numeric import relative_difference

TOKENS, SEEDS, ROWS = 6, 8, (1, 2, 4, 8, 33)
RUN = """
import sys
import numpy as np
import shared_runtime as rt
from shared_runtime.backends.base import backends
folder, name, *graphs = sys.argv[1:]
for graph in graphs:
    model, given = rt.load(f"{folder}/{graph}.onnx"), np.load(f"{folder}/{graph}.npy")
    executable = backends()[name].compile(model, "cpu", 1)
    many = executable.run({"x": given})["y"]
    for rows in (1, 2, 4, 8):
        executable.specialise({"x": given[:rows]})
        np.save(f"{folder}/{graph}.{name}.{rows}.npy", executable.run({"x": given[:rows]})["y"])
    np.save(f"{folder}/{graph}.{name}.{len(given)}.npy", many)
"""


class Draw:
    """A graph that is drawn node by node; random weights are scaled to keep values near one."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def add(self, kind: str, inputs: Sequence[str], **attributes: object) -> str:
        """A node; the name of its output."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def constant(self, values: np.ndarray) -> str:
        """A constant's name."""
        name = f"c{len(self.weights)}"
        self.weights[name] = values
        return name

    def weight(self, *shape: int) -> str:
        """Random numbers, of less spread the more of them are summed."""
        return self.constant((self.random.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32))

    def dense(self, value: str, before: int, after: int) -> str:
        """A dense layer."""
        return self.add("Add", [self.add("MatMul", [value, self.weight(before, after)]), self.weight(after)])

    def blocks(self, value: str, width: int) -> str:
        """Dense layers on rows, most with a way around them."""
        for _ in range(self.random.integers(1, 5)):
            inner = self.add(self.pick("Relu", "Tanh", "Sigmoid"), [self.dense(value, width, 2 * width)])
            inner = self.dense(inner, 2 * width, width)
            value = self.add(self.pick("Add", "Sub", "Max", "Mul"), [value, inner]) if self.random.random() < 0.7 else inner
        return value

    def pick(self, *names: str) -> str:
        """One of them."""
        return str(self.random.choice(names))

    def tokens(self) -> tuple[str, list[int]]:
        """Attention over tokens, their mean, a head."""
        width, heads = int(self.random.choice([16, 32])), 2
        value = self.dense("x", 12, width)
        split, joined = (self.constant(np.array(s, np.int64)) for s in ([0, TOKENS, heads, width // heads], [0, TOKENS, width]))
        for _ in range(self.random.integers(1, 3)):
            normal = self.add("LayerNormalization", [value, self.weight(width), self.weight(width)], axis=-1)
            parts = [self.add("Reshape", [self.dense(normal, width, width), split]) for _ in range(3)]
            orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
            query, key, content = (self.add("Transpose", [part], perm=order) for part, order in zip(parts, orders, strict=True))
            share = self.add("Softmax", [self.add("MatMul", [query, key])], axis=-1)
            seen = self.add("Transpose", [self.add("MatMul", [share, content])], perm=[0, 2, 1, 3])
            value = self.add("Add", [value, self.dense(self.add("Reshape", [seen, joined]), width, width)])
        mean = self.add("ReduceMean", [value, self.constant(np.array([1]))], keepdims=0)
        return self.blocks(mean, width), [TOKENS, 12]

    def pictures(self) -> tuple[str, list[int]]:
        """Convolutions, some by channel, with ways around them and gates; their mean, a head."""
        width = int(self.random.choice([8, 16]))
        value = self.add("Conv", ["x", self.weight(width, 3, 3, 3), self.weight(width)], pads=[1] * 4)
        for _ in range(self.random.integers(2, 6)):
            groups = width if self.random.random() < 0.4 else 1
            inner = self.add("Conv", [value, self.weight(width, width // groups, 3, 3), self.weight(width)], pads=[1] * 4, group=groups)
            inner = self.add(self.pick("Relu", "HardSwish", "Sigmoid", "Elu"), [inner])
            if self.random.random() < 0.3:
                gate = self.add("Conv", [self.add("GlobalAveragePool", [inner]), self.weight(width, width, 1, 1), self.weight(width)])
                inner = self.add("Mul", [inner, self.add("Sigmoid", [gate])])
            value = self.add(self.pick("Add", "Max"), [value, inner]) if self.random.random() < 0.6 else inner
        return self.blocks(self.add("Flatten", [self.add("GlobalAveragePool", [value])]), width), [3, 12, 12]

    def rows(self) -> tuple[str, list[int]]:
        """Dense layers alone."""
        width = int(self.random.choice([16, 32]))
        return self.blocks(self.dense("x", 12, width), width), [12]


def draw(seed: int, path: Path, kind: str = "") -> list[int]:
    """Write a network of a kind (one kind after another without); the shape of one of its rows."""
    made = Draw(seed)
    value, shape = getattr(made, kind or ("tokens", "pictures", "rows")[seed % 3])()
    made.nodes.append(helper.make_node("Identity", [value], ["y"]))
    graph = helper.make_graph(
        made.nodes,
        f"random{seed}",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "width"])],
        [numpy_helper.from_array(values, name) for name, values in made.weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return shape


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch"])
def test_random_networks(name: str, tmp_path: Path) -> None:
    if not backends()[name].availability("cpu").available:
        pytest.skip(f"{name} is not there")
    graphs = [f"random{seed}" for seed in range(3 * SEEDS)]
    expected = {}
    for seed, graph in enumerate(graphs):
        shape = draw(seed, tmp_path / f"{graph}.onnx")
        x = np.random.default_rng(1000 + seed).standard_normal((max(ROWS), *shape)).astype(np.float32)
        np.save(tmp_path / f"{graph}.npy", x)
        expected[graph] = plain_session(tmp_path / f"{graph}.onnx").run(None, {"x": x})[0]
    ended = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), name, *graphs], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, f"{name} ended by {ended.returncode}: {ended.stderr[-800:]}"
    far = {
        (graph, rows): difference
        for graph in graphs
        for rows in ROWS
        if not (difference := relative_difference(np.load(tmp_path / f"{graph}.{name}.{rows}.npy"), expected[graph][:rows])) < 0.01
    }
    assert far == {}
