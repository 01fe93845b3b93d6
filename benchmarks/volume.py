"""Peak memory and time of a 3-D U-Net of nnU-Net's size over a volume of 512 x 512 x 256 voxels, a process a contender.

Contenders see the same windows (no overlap unless TRISCOPE_BENCH_OVERLAP says so) and end with labels: ONNX Runtime as
installed in MONAI's sliding window, ONNX Runtime in rt.SlidingWindow, and Triscope's plan for memory with and without reduced forms.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import shared_runtime as rt
from shared_runtime.host import peak_resident_mib
from shared_runtime.variants import VariantStore

SHAPE = tuple(int(side) for side in os.environ.get("TRISCOPE_BENCH_VOLUME", "512,512,256").split(","))
SIDE = int(os.environ.get("TRISCOPE_BENCH_SIDE", "128"))
OVERLAP = float(os.environ.get("TRISCOPE_BENCH_OVERLAP", "0"))


def volume(model: rt.Model, store: VariantStore) -> dict[str, Any]:
    """The contenders one after the other; agreement is the share of voxels with the first one's label."""
    with tempfile.TemporaryDirectory(prefix="triscope-bench-") as name:
        folder = Path(name)
        scan(SHAPE, folder / "volume.raw")
        results: dict[str, Any] = {}
        reference = None
        for contender in CONTENDERS:
            out = folder / "figures.json"
            command = [sys.executable, "-m", "benchmarks.volume", contender, str(model.graph.parent), str(store.root), str(out)]
            subprocess.run(command, check=True)
            labels = np.fromfile(folder / "labels.raw", np.uint8)
            reference = labels if reference is None else reference
            results[contender] = msgspec.json.decode(out.read_bytes()) | {"agreement": float(np.mean(labels == reference))}
            print(f"  {contender}: {results[contender]}", flush=True)
    return {"shape": SHAPE, "window": SIDE, "overlap": OVERLAP, "contenders": results}


def scan(shape: tuple[int, ...], path: Path | None = None, seed: int = 0) -> Any:
    """Blocks of 16 voxels with noise, (1, *shape) int16 as a scanner gives them; on disk where a path is given."""
    generator = np.random.default_rng(seed)
    coarse = generator.standard_normal(tuple(-(-side // 16) for side in shape))
    image: Any = np.empty((1, *shape), np.int16) if path is None else np.memmap(path, np.int16, "w+", shape=(1, *shape))
    for plane in range(shape[0]):
        blocks = np.kron(coarse[plane // 16], np.ones((16, 16)))[: shape[1], : shape[2]]
        image[0, plane] = 3 * blocks + generator.standard_normal(shape[1:])
    return image


class _OnnxRuntime:
    """ONNX Runtime as installed, with what rt.SlidingWindow asks of a session."""

    def __init__(self, model: rt.Model) -> None:
        import onnxruntime

        self.model, self._session = model, onnxruntime.InferenceSession(str(model.graph), providers=["CPUExecutionProvider"])
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As rt.Session."""
        return dict(zip(self._names, self._session.run(self._names, inputs), strict=True))


Result = tuple[Any, float]
"""Labels, and the seconds that they took."""


def _monai(model: rt.Model, image: Any) -> Result:
    """float32 scores of the whole volume, as MONAI's sliding window leaves them."""
    import torch
    from monai.inferers import sliding_window_inference

    session = _OnnxRuntime(model)
    begin = time.perf_counter()
    tensor = torch.from_numpy(image.astype(np.float32))[None]
    scores = sliding_window_inference(
        tensor,
        (SIDE,) * 3,
        1,
        lambda window: torch.from_numpy(session.run({"image": window.numpy()})[model.signature.outputs[0].name]),
        overlap=OVERLAP,
        mode="gaussian",
    )
    labels = np.stack([scores[0, :, plane].argmax(0).numpy().astype(np.uint8) for plane in range(image.shape[1])])
    return labels, time.perf_counter() - begin


def _plain(model: rt.Model, image: Any) -> Result:
    return _timed(_OnnxRuntime(model), image)


def _timed(session: Any, image: Any) -> Result:
    begin = time.perf_counter()
    labels = rt.SlidingWindow(session, (SIDE,) * 3, overlap=OVERLAP).labels(image)
    return labels, time.perf_counter() - begin


def _triscope(model: rt.Model, image: Any, variant: str | None = None) -> Result:
    probe = {"image": np.zeros((1, 1, *(SIDE,) * 3), np.float32)}
    plans = Path(sys.argv[4]).parent / "plans"
    with rt.Session(model, "cpu", variant=variant, objective="memory", plans=plans, probe=probe, ladder=(1,), budget_s=30) as session:
        begin = time.perf_counter()
        session.prepare()
        print(f"  planned in {time.perf_counter() - begin:.0f} s: {session.plan.describe()}", flush=True)
        return _timed(session, image)


CONTENDERS: dict[str, Callable[[rt.Model, Any], Result]] = {
    "ONNX Runtime, MONAI's window": _monai,
    "ONNX Runtime, rt.SlidingWindow": _plain,
    "Triscope, planned for memory": _triscope,
    "the same in float32 alone": lambda model, image: _triscope(model, image, "float32"),
}


IMPORTS = dict(zip(CONTENDERS, (("onnxruntime", "monai.inferers"), ("onnxruntime",), ("openvino",), ("openvino",)), strict=True))


def main() -> None:
    """One contender in this process: its labels to a file, its figures to another."""
    contender, model_folder, variants, out = sys.argv[1], *map(Path, sys.argv[2:5])
    for package in IMPORTS[contender]:
        importlib.import_module(package)
    before = peak_resident_mib()
    model = rt.load(model_folder, variants=VariantStore(variants))
    image = np.memmap(out.parent / "volume.raw", np.int16, "r", shape=(1, *SHAPE))
    labels, seconds = CONTENDERS[contender](model, image)
    figures = {
        "peak_over_imports_mib": peak_resident_mib() - before,
        "peak_mib": peak_resident_mib(),
        "seconds": seconds,
    }
    labels.tofile(out.parent / "labels.raw")
    out.write_bytes(msgspec.json.encode(figures))


def report_lines(r: dict[str, Any]) -> list[str]:
    """The page's part on a whole volume."""
    first = next(iter(r["contenders"].values()))["peak_over_imports_mib"]
    lines = [
        f"A whole volume of {' x '.join(map(str, r['shape']))} voxels through the U-Net in windows of {r['window']} a side, labels out. Each "
        "contender in a process of its own; peak resident memory over what its imports took, with the volume (int16 on disk) and the labels.",
        "",
        "| contender | peak [MiB] | of the first | seconds | labels as the first |",
        "|---|---|---|---|---|",
    ]
    for name, c in r["contenders"].items():
        peak = c["peak_over_imports_mib"]
        lines.append(f"| {name} | {peak:.0f} | {peak / first:.0%} | {c['seconds']:.0f} | {c['agreement']:.2%} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
