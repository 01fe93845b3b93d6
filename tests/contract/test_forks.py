"""Dense layers with a way around them: OpenVINO must not end the process on them, whatever the number of rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

import shared_runtime as rt
from shared_runtime.backends.openvino import forks, read_network
from shared_runtime.graph.passes.base import plain_session
from tests.networks import save

WIDTH = 16
pytest.importorskip("openvino")
RUN = """
import sys
import numpy as np
import shared_runtime as rt
from shared_runtime.backends.base import backends
model, given = rt.load(sys.argv[1]), np.load(sys.argv[2])
executable = backends()["openvino"].compile(model, "cpu", 1)
for name in given:
    executable.specialise({"x": given[name]})
    np.save(f"{sys.argv[3]}/{name}.npy", executable.run({"x": given[name]})["y"])
"""


def network(path: Path, around: str, rows: int | str = "batch") -> Path:
    """Three blocks of two dense layers; `around` joins a block's input to its output, "" does not."""
    generator, nodes, weights, value = np.random.default_rng(0), [], {}, "x"
    for block in range(3):
        start = value
        for layer in range(2):
            name = f"{block}.{layer}"
            weights[f"w{name}"] = generator.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 4
            weights[f"b{name}"] = generator.standard_normal(WIDTH).astype(np.float32)
            nodes.append(helper.make_node("MatMul", [value, f"w{name}"], [f"m{name}"]))
            nodes.append(helper.make_node("Add", [f"m{name}", f"b{name}"], [f"a{name}"]))
            value = f"a{name}"
            if layer == 0:
                nodes.append(helper.make_node("Relu", [value], [f"r{name}"]))
                value = f"r{name}"
        if around:
            nodes.append(helper.make_node(around, [start, value], [f"j{block}"]))
            value = f"j{block}"
    nodes.append(helper.make_node("Identity", [value], ["y"]))
    return save(path, nodes, weights, {"x": [rows, WIDTH]}, {"y": [rows, WIDTH]})


@pytest.mark.parametrize("around", ["Add", "Mul", "Sub"])
def test_blocks_with_a_way_around_them(around: str, tmp_path: Path) -> None:
    path = network(tmp_path / "blocks.onnx", around)
    assert forks(read_network(path))
    given = {f"rows{n}": np.random.default_rng(n).standard_normal((n, WIDTH)).astype(np.float32) for n in (1, 4, 6, 8, 32)}
    np.savez(tmp_path / "given.npz", **given)
    command = [sys.executable, "-c", RUN, str(path), str(tmp_path / "given.npz"), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, f"ended by {ended.returncode}: {ended.stderr[-500:]}"
    session = plain_session(path)
    for name, x in given.items():
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), session.run(None, {"x": x})[0], rtol=1e-3, atol=1e-3)


def test_a_chain_without_forks_is_fused_as_before(tmp_path: Path) -> None:
    assert not forks(read_network(network(tmp_path / "chain.onnx", "")))


def test_a_network_of_eight_rows_is_optimised_without_nncf(tmp_path: Path) -> None:
    model = rt.load(network(tmp_path / "eight.onnx", "Add", 8))
    data = [{"x": np.random.default_rng(i).standard_normal((8, WIDTH)).astype(np.float32)} for i in range(8)]
    options = {"metric": rt.metrics.correlation, "threads": 1, "budget_s": 10, "max_drop": 0.05}
    made = rt.optimize(model, calibration=data, precisions=["int8"], **options)
    assert "export it with a free batch" in made.refused["int8-openvino"]
