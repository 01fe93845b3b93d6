"""`engine_layers`: layers in INT8, each with a scale and a quantizer behind it: how often OpenVINO gives other numbers than ONNX Runtime.

python benchmarks/run.py engine_layers
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import shared_runtime as rt
from shared_runtime.backends.base import backends
from shared_runtime.graph.passes.base import plain_session
from shared_runtime.numeric import relative_difference
from shared_runtime.signature import Tensors
from tests.contract.test_quantized_layers import KINDS, NEAR, network

SHAPES = [(16,), (8, 12), (12, 8), (8, 6, 10), (3, 16, 16), (4, 6, 10, 4), (8, 5, 5, 5)]
RUNS = ((5, False), (1, False), (2, True), (5, True))
"""Numbers of rows, and whether the engine was told the sizes before."""


def engine_layers() -> dict[str, Any]:
    """For each kind of layer: runs, and those further than NEAR from ONNX Runtime, as OpenVINO is installed and as compiled here."""
    import openvino

    results: dict[str, Any] = {}
    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        for kind, shape, last, signed in itertools.product(KINDS, SHAPES, (False, True), (False, True)):
            if len(shape) == 1 and kind not in ("dense", "Softmax", "Add", "Concat"):
                continue
            path = network(kind, shape, last, signed, Path(folder) / "layer.onnx")
            if path is None:
                continue
            x = np.random.default_rng(1).standard_normal((5, *shape)).astype(np.float32)
            session, ours = plain_session(path), backends()["openvino"].compile(rt.load(path), "cpu", 1)

            def installed(inputs: Tensors, told: bool, path: Path = path) -> Any:
                read = core.read_model(str(path))
                if told:
                    read.reshape(list(inputs["x"].shape))
                return core.compile_model(read, "CPU")(inputs)[0]

            def compiled(inputs: Tensors, told: bool, ours: Any = ours) -> Any:
                if told:
                    ours.specialise(inputs)
                return next(iter(ours.run(inputs).values()))

            count = results.setdefault(
                kind, {"runs": 0} | {name: {"wrong": 0, "most": 0.0, "refused": 0} for name in ("installed", "ours")}
            )
            for rows, told in RUNS:
                inputs = {"x": x[:rows]}
                expected = session.run(None, inputs)[0]
                count["runs"] += 1
                for name, run in (("installed", installed), ("ours", compiled)):
                    try:
                        far = float(relative_difference(run(inputs, told), expected))
                    except (RuntimeError, rt.UnsupportedModelError):
                        count[name]["refused"] += 1
                        continue
                    count[name]["wrong"] += far > NEAR
                    count[name]["most"] = max(count[name]["most"], far)
    return {"kinds": results, "openvino": openvino.__version__.split("-")[0]}


def report_lines(load: Callable[[str], Any], where: Callable[[dict[str, Any]], str]) -> list[str]:
    """The page's part on layers that an engine computes wrongly."""
    if not (found := load("engine_layers")):
        return []
    kinds = found["result"]["kinds"]
    bad = {n: k for n, k in kinds.items() if any(k[who]["wrong"] + k[who]["refused"] for who in ("installed", "ours"))}

    def cells(who: str, some: list[dict[str, Any]]) -> str:
        wrong, refused = (sum(kind[who][what] for kind in some) for what in ("wrong", "refused"))
        return f"{wrong} | {max(kind[who]['most'] for kind in some):.2g} | {refused}"

    rows = [(name, [kind]) for name, kind in bad.items()] + [(f"all {len(kinds)} kinds", list(kinds.values()))]
    return [
        "## INT8 that OpenVINO computes wrongly",
        "",
        f"A layer in INT8, then a scale and a bias a channel (or along the last axis), then a quantizer: {len(kinds)} kinds of layers, 2 to 5 axes, with and",
        f"without zero points, 1 to 5 rows of free and of known sizes, {where(found)}. Runs whose numbers are further than {NEAR:.0%} from ONNX Runtime's, and",
        f"runs that are refused: OpenVINO {found['result']['openvino']} as installed, and as Triscope compiles it (`shared_runtime/backends/openvino_mends.py`).",
        "",
        "| layer | runs | as installed: wrong | furthest | refused | as compiled here: wrong | furthest | refused |",
        "|---|---|---|---|---|---|---|---|",
        *(f"| {n} | {sum(k['runs'] for k in some)} | {cells('installed', some)} | {cells('ours', some)} |" for n, some in rows),
        "",
    ]


SUITES: dict[str, Callable[[], dict[str, Any]]] = {"engine_layers": engine_layers}
