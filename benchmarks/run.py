"""Measures what the docs state, writes `benchmarks/results/*.json` with the host's facts, and makes docs/benchmarks.md.

    python benchmarks/run.py [demo] [head] [cases] [runtime] [install] [features] [protocol] [stream] [memory] [budget]
                             [ablation] [inspection] [one_class] [methods] [steps] [few_shot] [views] [kinds] [templates] [optimise] [tensorflow] [shared_constants] [engine_layers] [woken]
    python benchmarks/run.py report                                        # the page alone, from the results

Without a name all run but `install`, `optimise`, `tensorflow`, `few_shot` (hours on a CPU) and, without TRISCOPE_DATA_DIR, those that need it. `install` makes a fresh environment of the base dependencies and takes minutes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).parent.parent))

import shared_runtime as rt
from apps.demo import HEAD_SAMPLE, sample
from apps.medical.evaluation.evaluate import case_files, evaluate_case, summarise
from apps.medical.service import segment_file
from apps.medical.training.export import summary
from benchmarks import engine_layers, finance, industrial, optimise, shared_constants, woken
from shared_runtime.backends.base import backends
from shared_runtime.host import host
from shared_runtime.repository.store import shipped_models

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REPEATS = 5


def demo() -> dict[str, Any]:
    """`triscope demo --no-ui` in a fresh home: wall time of the whole process, its stages, its peak memory."""
    runs = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as home:
            out = Path(home) / "out.json"
            command = [str(Path(sys.executable).parent / "triscope"), "demo", "--no-ui", "--json", str(out)]
            environment = {k: v for k, v in os.environ.items() if not k.startswith("TRISCOPE_")} | {"TRISCOPE_HOME": home}
            begin = time.monotonic()
            subprocess.run(command, env=environment, check=True, capture_output=True)
            wall = time.monotonic() - begin
            result = json.loads(out.read_text())
            runs.append(
                {
                    "wall_seconds": wall,
                    "peak_memory_mib": result["peak_memory_mib"],
                    "stages": result["medical"]["stages_seconds"],
                    "finance": result["finance"]["seconds"],
                }
            )
    return {"runs": runs, "median_wall_seconds": statistics.median(r["wall_seconds"] for r in runs)}


def head() -> dict[str, Any]:
    """The sample head again and again in one process, with the plan made: the split of a study."""
    with rt.Session(rt.load("hippocampus-t1")) as session, tempfile.TemporaryDirectory() as folder:
        splits = [segment_file(sample(HEAD_SAMPLE), session, Path(folder))["seconds"] for _ in range(REPEATS + 1)]
        plan = msgspec.to_builtins(session.plan)
    keys = splits[0]
    return {"median_seconds": {k: statistics.median(s[k] for s in splits[1:]) for k in keys}, "first": splits[0], "plan": plan}


def cases() -> dict[str, Any]:
    """Seconds a case over real crops. The shipped model was trained on them: no accuracy is stated from this."""
    folder = Path(os.environ["TRISCOPE_DATA_DIR"]) / "msd_hippocampus"
    with rt.Session(rt.load("hippocampus-t1")) as session:
        rows = [evaluate_case(i, label, session, None) for i, label in case_files(folder / "images", folder / "labels")]
    return {"cases": len(rows), "seconds_per_case": summarise(rows)["seconds_per_case"]}


def runtime() -> dict[str, Any]:
    """Every backend on the shipped network, float32, interleaved, on every core: medians [ms] of batch 2."""
    model = rt.load("hippocampus-t1")
    x = model.signature.random(rows=2)
    engines = {}
    for name, backend in backends().items():
        for device in backend.devices:
            if backend.availability(device).available:
                engines[f"{name} {device}"] = backend.compile(model, device, host().cores)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(REPEATS + 3):
        for name, engine in engines.items():
            begin = time.perf_counter()
            engine.run(x)
            if round_ > 0:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {"median_ms": {name: statistics.median(t) for name, t in times.items()}, "batch": 2}


def install() -> dict[str, Any]:
    """The wheel in a clean environment (base dependencies and postgres, as the CPU image): sizes [MB], and its demo in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", Path(folder) / "venv"], check=True)
        subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", Path(folder) / "dist", ROOT], check=True, capture_output=True)
        (wheel,) = (Path(folder) / "dist").glob("*.whl")
        constraints = ["-c", str(ROOT / "constraints.txt")]
        pip = [python, "-m", "pip"]
        subprocess.run([*pip, "install", "-q", *constraints, f"{wheel}[postgres,s3]"], check=True, capture_output=True)
        engine = importlib.metadata.version("onnxruntime-gpu")  # as in deploy/Dockerfile: the CPU build in place of the GPU build
        subprocess.run([*pip, "uninstall", "-q", "--yes", "onnxruntime-gpu"], check=True, capture_output=True)
        subprocess.run([*pip, "install", "-q", "--no-deps", f"onnxruntime=={engine}"], check=True, capture_output=True)
        site = next((Path(folder) / "venv" / "lib").glob("python3*")) / "site-packages"
        sizes = {p.name: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) / 1e6 for p in site.iterdir() if p.is_dir()}
        largest = dict(sorted(sizes.items(), key=lambda item: -item[1])[:10])
        empty = Path(folder) / "empty"
        empty.mkdir()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TRISCOPE_")} | {"TRISCOPE_HOME": str(Path(folder) / "home")}
        begin = time.monotonic()
        command = [str(python.parent / "triscope"), "demo", "--no-ui", "--json", "out.json"]
        subprocess.run(command, cwd=empty, env=environment, check=True, capture_output=True)
        return {
            "demo_seconds": time.monotonic() - begin,
            "site_packages_mb": sum(sizes.values()),
            "wheel_mb": wheel.stat().st_size / 1e6,
            "largest_mb": largest,
        }


SUITES: dict[str, Callable[[], dict[str, Any]]] = {
    "demo": demo,
    "head": head,
    "cases": cases,
    "runtime": runtime,
    "install": install,
    **finance.SUITES,
    **industrial.SUITES,
    **optimise.SUITES,
    **shared_constants.SUITES,
    **engine_layers.SUITES,
    **woken.SUITES,
}
NEED_DATA = {"cases", *finance.NEED_DATA, *industrial.NEED_DATA}


def load(name: str) -> dict[str, Any] | None:
    """A stored result."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def accuracy_lines() -> list[str]:
    """The cross-validation that travels with the model."""
    scores = json.loads((shipped_models() / "hippocampus-t1" / "cross_validation.json").read_text())
    s = summary(scores)
    lines = [
        "## Accuracy of `hippocampus-t1`",
        "",
        f"Five-fold cross-validation on {s['cases']} cases of the Medical Segmentation Decathlon's Task04 (1 mm MR crops, expert labels); every case was",
        "held out once; the folds and the shipped model were trained by the same code. Means over cases with 95 % bootstrap intervals.",
        "Its command: `triscope medical train --data DIR --out DIR --folds 5 --steps 8000` on 2 NVIDIA H100; scores: `data/models/hippocampus-t1/cross_validation.json`.",
        "(its runs started one by one). A prediction is the mean over eight views (mirror images, each moved by other whole voxels), in the cross-validation as",
        "in use. That mirror images help was seen on folds 0 to 3, that moving them does on folds 0 and 1, so these figures are not free of that choice.",
        "",
        "| structure | Dice | HD95 [mm] | absolute volume error [%] |",
        "|---|---|---|---|",
    ]
    for part in ("anterior", "posterior", "whole"):
        cells = []
        for metric, digits in (("dice", 3), ("hd95_mm", 2), ("volume_error_percent", 1)):
            m = s[part][metric]
            cells.append(f"{m['mean']:.{digits}f} ({m['interval'][0]:.{digits}f}-{m['interval'][1]:.{digits}f})")
        lines.append(f"| {part} | {' | '.join(cells)} |")
    m = s["mean_dice"]
    lines += [
        "",
        f"Mean of anterior and posterior: **{m['mean']:.4f}** ({m['interval'][0]:.4f}-{m['interval'][1]:.4f}). Worst case: {s['worst']['mean_dice']:.3f} "
        f"({s['worst']['case'].removesuffix('.nii.gz')}). Published",
        "nnU-Net-class results on the same source are 0.88-0.90 on other splits. Labels come from one centre; whole heads have no reference labels here, so their",
        "accuracy is not stated - only that volumes hold within 10 % under rotation, thick slices, noise, shading and cropping (`tests/integration/test_heads.py`).",
        "",
    ]
    return lines


def report() -> None:
    """Write docs/benchmarks.md."""
    lines = ["# Benchmarks", "", "Made by `python benchmarks/run.py` from `benchmarks/results/`; do not edit.", ""]
    lines += ["Times are from small shared machines: read the ratios. Each result file names its host.", "", *accuracy_lines()]
    if found := load("head"):
        s = found["result"]["median_seconds"]
        lines += ["## One whole head", "", f"Median of {REPEATS} runs, {_where(found)}; plan: {found['result']['plan']['why']}.", ""]
        lines += ["| read | locate | segment | resample | write | total |", "|---|---|---|---|---|---|"]
        lines += ["| " + " | ".join(f"{s[k]:.2f} s" for k in ("read", "locate", "segment", "resample", "write", "total")) + " |", ""]
    if found := load("cases"):
        r = found["result"]
        lines += [f"A crop takes {r['seconds_per_case']:.2f} s (median of {r['cases']} cases, {_where(found)}).", ""]
    if found := load("demo"):
        runs = found["result"]["runs"]
        memory = max(r["peak_memory_mib"] for r in runs)
        lines += [
            "## The demo",
            "",
            f"`triscope demo --no-ui` in a fresh home, planning included: {found['result']['median_wall_seconds']:.1f} s",
        ]
        lines += [f"(median of {len(runs)}), peak memory {memory:.0f} MiB, {_where(found)}.", ""]
    if found := load("runtime"):
        times = found["result"]["median_ms"]
        best = min(times.values())
        lines += [
            "## Backends on the shipped network",
            "",
            f"Float32, batch 2, interleaved runs, {_where(found)}; times relative to the fastest.",
            "",
        ]
        lines += [
            "| backend | times the fastest |",
            "|---|---|",
            *(f"| {n} | {t / best:.2f} |" for n, t in sorted(times.items(), key=lambda i: i[1])),
            "",
        ]
    if found := load("gpu"):
        r = found["result"]
        lines += [
            f"torch on an {r['gpu']} (torch {r['torch']}), the same network operator by operator with the weights of an earlier training run, float32 without TF32, copies included:",
            "",
        ]
        lines += ["| batch | median | relative error against ONNX Runtime on the CPU |", "|---|---|---|"]
        lines += [f"| {b} | {r[b]['median_ms']:.1f} ms | {r[b]['relative_error']:.1e} |" for b in ("1", "2", "8")] + [""]
    if found := load("install"):
        r = found["result"]
        lines += [
            "## Size of the installation",
            "",
            f"Base dependencies with PostgreSQL and S3 (what the CPU image installs): {r['site_packages_mb'] / 1000:.2f} GB in",
        ]
        lines += [f"`site-packages`; the wheel of Triscope with model and sample: {r['wheel_mb']:.1f} MB. Largest:", ""]
        lines += ["| package | MB |", "|---|---|", *(f"| {n} | {v:.0f} |" for n, v in r["largest_mb"].items()), ""]
    lines += optimise.report_lines(load, _where)
    lines += shared_constants.report_lines(load, _where)
    lines += engine_layers.report_lines(load, _where)
    lines += woken.report_lines(load, _where)
    lines += finance.report_lines(load, _where)
    lines += industrial.report_lines(load, _where)
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(lines).rstrip() + "\n")


def _where(found: dict[str, Any]) -> str:
    h = found["host"]
    return f"{h['cores']} cores of {h['cpu']} ({', '.join(h['vector'][:4]) or 'no vector flags read'} ...)"


def main() -> None:
    """Run the suites named on the command line, then write the page."""
    if sys.argv[1:] == ["--list"]:
        print("\n".join(SUITES))
        return
    names = sys.argv[1:] or [
        name
        for name in SUITES
        if name not in ("install", "few_shot", "optimise", "tensorflow") and (name not in NEED_DATA or "TRISCOPE_DATA_DIR" in os.environ)
    ]
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        if name != "report":
            content = {
                "suite": name,
                "command": f"python benchmarks/run.py {name}",
                "host": msgspec.to_builtins(host()),
                "result": SUITES[name](),
            }
            (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    report()


if __name__ == "__main__":
    main()
