"""`optimise`: the optimiser beside its peers on eight models, single requests and batches of 32, in interleaved runs.

    triscope bench optimise        (or python benchmarks/run.py optimise)
    TRISCOPE_BENCH_MODELS=resnet50,mobilenet_v2 python benchmarks/run.py optimise        # some of the models
    TRISCOPE_BENCH_PRECISIONS=bfloat16 TRISCOPE_BENCH_PEERS=onnxruntime,openvino ...     # some of the reduced forms and peers

Every contender takes and gives numpy arrays on the host. Peers run as installed: no option is set.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import shared_runtime as rt
from benchmarks.optimise_cases import CASES, Case, Sample
from benchmarks.optimise_peers import peers
from benchmarks.volume import report_lines as volume_lines
from benchmarks.volume import volume
from shared_runtime.backends.base import backends
from shared_runtime.host import host
from shared_runtime.planning.measure import Timed, interleave, paired_ratio
from shared_runtime.variants import VariantStore

REST_SECONDS = 0.06
SECONDS = float(os.environ.get("TRISCOPE_BENCH_SECONDS", "10"))


def optimise() -> dict[str, Any]:
    """Import, optimise, plan and time every model beside the peers that this machine has."""
    names = _chosen("MODELS") or list(CASES)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="triscope-bench-") as folder:
        for name in names:
            print(f"optimise: {name}", flush=True)
            try:
                results[name] = _one(name, CASES[name](), Path(folder))
            except rt.SharedRuntimeError as error:
                print(f"  not measured: {error}", flush=True)
                continue
            print({k: v for k, v in results[name].items() if k != "candidates"}, flush=True)
            if partial := os.environ.get("TRISCOPE_BENCH_PARTIAL"):
                Path(partial).write_text(msgspec.json.encode(results).decode())
    first = [r["speed"]["1"]["ratio_onnxruntime"] for r in results.values() if "onnxruntime" in r["speed"]["1"]["peers"]]
    every = [s["ratio_onnxruntime"] for r in results.values() for s in r["speed"].values() if "onnxruntime" in s["peers"]]
    best = [s["ratio_best"] for r in results.values() for s in r["speed"].values()]
    return {
        "models": results,
        "geometric_mean_single": float(np.exp(np.mean(np.log(first)))) if first else None,
        "geometric_mean_all": float(np.exp(np.mean(np.log(every)))) if every else None,
        "lowest_ratio_to_best_peer": min(best),
    }


def _chosen(what: str) -> list[str] | None:
    """The names in an environment variable, or None for all."""
    names = os.environ.get(f"TRISCOPE_BENCH_{what}")
    return names.split(",") if names else None


def _one(name: str, case: Case, folder: Path) -> dict[str, Any]:
    device = "cuda" if backends()["torch"].availability("cuda").available and name != "fraud-boosting" else "cpu"
    begin = time.perf_counter()
    model = case.source if isinstance(case.source, rt.Model) else rt.load(case.source, example=case.calibration[0], name=name)
    imported = time.perf_counter() - begin
    begin = time.perf_counter()
    made = rt.optimize(
        model,
        calibration=case.calibration,
        metric=case.metric,
        max_drop=case.max_drop,
        certain=True,
        budget_s=case.budget * SECONDS,
        device=device,
        precisions=_chosen("PRECISIONS"),
        store=VariantStore(folder / "variants"),
        report=lambda text: print(f"  {text}", flush=True),
    )
    optimised = time.perf_counter() - begin
    probe = case.calibration[0]
    with rt.Session(
        made, device, plans=folder / "plans", ladder=case.rows, budget_s=2 * SECONDS, probe=probe, thorough=device == "cuda"
    ) as session:
        plan = session.prepare()
        print(f"  {plan.describe()}", flush=True)
        speed = {str(rows): _speed(session, model, case, model.signature.repeated(probe, rows), device) for rows in case.rows}
    certificates = {v: made.certificate(v) for v in made.variants}
    return {
        "volume": volume(made, VariantStore(folder / "variants")) if name == "unet" and device == "cpu" else None,
        "device": device,
        "import_seconds": imported,
        "import_difference": model.card.get("import", {}).get("difference"),
        "optimise_seconds": optimised,
        "plan": plan.why,
        "precision": {str(rung.rows): plan.candidates[rung.candidate].precision for rung in plan.ladder},
        "speed": speed,
        "variants": {
            v: {
                "metric": c.metric,
                "drop": c.drop,
                "interval": c.drop_interval,
                "size": c.bytes / c.float_bytes,
                "reverted": len(c.reverted),
                "layers": c.layers,
                "speedup": c.speedup,
            }
            for v, c in certificates.items()
        },
        "refused": dict(made.refused),
        "candidates": [{"label": c.label, "timings": [(t.rows, t.median_ms) for t in c.timings], "lost": c.lost} for c in plan.candidates],
    }


def _speed(session: rt.Session, model: rt.Model, case: Case, inputs: Sample, device: str) -> dict[str, Any]:
    """Medians and paired ratios of every peer over ours, in one interleaved run."""
    contenders = {"triscope": Timed(lambda: session.run(inputs))}
    wanted = _chosen("PEERS")
    contenders |= {
        name: Timed(call) for name, call in peers(model, case, inputs, device) if wanted is None or name.split(" (")[0] in wanted
    }
    for timed in contenders.values():
        timed.call()
        timed.call()
    interleave(list(contenders.values()), SECONDS * len(contenders) / 2, hopeless=float("inf"), rest=REST_SECONDS)
    ours = contenders.pop("triscope")
    ratios = {name: paired_ratio(timed.times, ours.times) for name, timed in contenders.items()}
    # What an engine reduces by default counts as a peer only where the guard would let it pass.
    fair = [name for name in contenders if "bf16 by default" not in name or "bfloat16-openvino" in session.model.variants]
    best = min(fair, key=lambda name: contenders[name].median)
    return {
        "ms": 1e3 * ours.median,
        "peers": {name: 1e3 * timed.median for name, timed in contenders.items()},
        "best_peer": best,
        "not_the_same_job": sorted(set(contenders) - set(fair)),
        "ratio_best": ratios[best][0],
        "interval_best": ratios[best][1],
        "ratio_onnxruntime": ratios["onnxruntime"][0] if "onnxruntime" in ratios else None,
        "rounds": len(ours.times),
    }


def report_lines(load: Callable[[str], Any], where: Callable[[dict[str, Any]], str]) -> list[str]:
    """The page's part on the optimiser."""
    lines: list[str] = []
    for file, title in (
        ("optimise", "The optimiser on a CPU"),
        ("optimise_avx2", "The optimiser on a CPU with AVX2 alone"),
        ("optimise_amx", "The optimiser on a CPU with AMX"),
        ("optimise_gpu", "The optimiser on a GPU"),
    ):
        if not (found := load(file)):
            continue
        r = found["result"]
        on_gpu = file == "optimise_gpu"
        place = where(found) if not on_gpu else f"{found['host']['gpus'][0]['name']}, torch 2.11"
        lines += [
            f"## {title}",
            "",
            f"`triscope bench optimise`, {place}; each model's contenders in one interleaved run, numpy arrays in and out.",
        ]
        lines += ["Ratios are medians of paired rounds with 95 % intervals, above 1 where Triscope is faster. Peers as installed.", ""]
        last = "median [ms]" if on_gpu else "ONNX Runtime / Triscope"
        lines += [f"| model | rows | runs in | best peer | peer / Triscope | {last} |", "|---|---|---|---|---|---|"]
        for name, model in r["models"].items():
            for rows, speed in model["speed"].items():
                low, high = speed["interval_best"]
                precision = model["precision"].get(rows, next(iter(model["precision"].values())))
                ort = speed["ratio_onnxruntime"]
                ratio = f"{speed['ratio_best']:.2f} ({low:.2f} to {high:.2f})"
                own = f"{speed['ms']:.2f}" if on_gpu else "" if ort is None else f"{ort:.2f}"
                lines.append(f"| {name} | {rows} | {precision} | {speed['best_peer']} | {ratio} | {own} |")
        lines += ["", *([r["note"], ""] if r.get("note") else [])]
        if r.get("geometric_mean_single"):
            lines += [
                f"Geometric mean over ONNX Runtime as installed: {r['geometric_mean_single']:.2f} (one row), {r['geometric_mean_all']:.2f} (all rows).",
                "",
            ]
        lines += ["| model | variant | metric | drop (95 % interval) | size of float32 | layers in float |", "|---|---|---|---|---|---|"]
        for name, model in r["models"].items():
            for variant, v in model["variants"].items():
                low, high = v["interval"]
                drop = f"{v['drop']:.1e} ({low:.1e} to {high:.1e})"
                lines.append(f"| {name} | {variant} | {v['metric']} | {drop} | {v['size']:.0%} | {v['reverted']} of {v['layers']} |")
        lines.append("")
        refused = [(name, variant, why) for name, model in r["models"].items() for variant, why in model["refused"].items()]
        if refused:
            lines += ["Refused by the guard or the engine:", ""]
            lines += [f"- {name}, {variant}: {' '.join(str(why).split())[:140]}" for name, variant, why in refused] + [""]
        for model in r["models"].values():
            if model.get("volume"):
                lines += volume_lines(model["volume"])
        if beside := r.get("onnxruntime_cuda"):
            lines += _cuda_lines(beside)
    return lines


def _cuda_lines(beside: dict[str, Any]) -> list[str]:
    """Runs in which ONNX Runtime's CUDA provider stood beside."""
    peers = ("onnxruntime", "torch eager", "torch.compile")
    lines = [
        f"In runs of their own with ONNX Runtime's CUDA provider ({beside['onnxruntime']}) beside, medians [ms]:",
        "",
        f"| model | GPU | rows | Triscope | {' | '.join(peers)} | best peer / Triscope |",
        f"|---|---|---|---|{'---|' * len(peers)}---|",
    ]
    for group, mark in (("models", ""), ("elsewhere", ", one machine"), ("another", ", another")):
        for name, model in beside.get(group, {}).items():
            for rows, speed in model["speed"].items():
                theirs = " | ".join(f"{speed['peers'][peer]:.2f}" for peer in peers)
                ratio = f"{speed['ratio_best']:.2f}"
                if interval := speed.get("interval_best"):
                    ratio += f" ({interval[0]:.2f} to {interval[1]:.2f})"
                lines.append(f"| {name} | {model['gpu']}{mark} | {rows} | {speed['ms']:.2f} | {theirs} | {ratio} |")
    if "another" in beside:
        lines += [
            "",
            f"{', '.join(beside['another'])} ran on three machines. On one with an H200 Triscope lost some of the races, with plans that had",
            "been measured much faster just before; on another with an H200 it won them all. There, waking 16 sleeping cores for a copy took",
            "3 ms in one case of ten; now one core copies up to 262,144 numbers and four copy more, which costs 4 to 14 % of the median there.",
        ]
    return [*lines, ""]


def tensorflow() -> dict[str, Any]:
    """A small convolutional network imported from each form that TensorFlow saves; needs TensorFlow and tf2onnx, no dependencies."""
    import importlib.metadata

    import tensorflow

    layers = tensorflow.keras.layers
    network = tensorflow.keras.Sequential(
        [
            layers.Input((16, 16, 3)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5),
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        network.export(f"{folder}/saved")
        network.save(f"{folder}/network.keras")
        sources = {"SavedModel": Path(folder) / "saved", ".keras": Path(folder) / "network.keras", "object": network}
        found = {name: rt.load(source).card["import"]["difference"] for name, source in sources.items()}
    return {"difference": found, "tensorflow": tensorflow.__version__, "tf2onnx": importlib.metadata.version("tf2onnx")}


SUITES: dict[str, Callable[[], dict[str, Any]]] = {"optimise": optimise, "tensorflow": tensorflow}


if __name__ == "__main__":
    import json

    Path(sys.argv[1]).write_text(
        json.dumps(
            {
                "suite": "optimise",
                "command": "python -m benchmarks.optimise FILE",
                "host": msgspec.to_builtins(host()),
                "result": optimise(),
            },
            indent=1,
        )
    )
