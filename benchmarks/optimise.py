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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import shared_runtime as rt
from benchmarks.volume import SIDE, scan, volume
from benchmarks.volume import report_lines as volume_lines
from shared_runtime.backends.base import backends
from shared_runtime.host import host
from shared_runtime.planning.measure import Timed, interleave, paired_ratio
from shared_runtime.variants import VariantStore

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
"""torch starts compile workers on all cores, which would take them from whatever is measured first."""
ROOT = Path(__file__).parent.parent
REST_SECONDS = 0.06
SECONDS = float(os.environ.get("TRISCOPE_BENCH_SECONDS", "10"))
Sample = dict[str, np.ndarray]


@dataclass
class Case:
    """One model: how it comes in, what it is calibrated and judged on, and the numbers of rows that are measured."""

    source: Any
    calibration: list[Sample]
    metric: Any = None
    rows: tuple[int, ...] = (1, 32)
    module: Any = None
    max_drop: float = 0.005
    budget: float = 60


def _data() -> Path | None:
    folder = os.environ.get("TRISCOPE_DATA_DIR")
    return None if folder is None else Path(folder)


class Recorder:
    """A session that keeps what it was asked."""

    def __init__(self, session: rt.Session) -> None:
        self._session, self.model, self.seen = session, session.model, []

    def run(self, inputs: Sample) -> Any:
        """As the session."""
        self.seen += [{name: value[i : i + 1].copy() for name, value in inputs.items()} for i in range(len(next(iter(inputs.values()))))]
        return self._session.run(inputs)


def _hippocampus() -> Case:
    """Windows that the app cuts from real crops (random ones without the data)."""
    model = rt.load("hippocampus-t1")
    folder = _data()
    if folder is None:
        return Case(model, [model.signature.random(1, i) for i in range(24)], rt.metrics.correlation, (1,))
    from apps.medical.evaluation.evaluate import case_files, evaluate_case

    files = case_files(folder / "msd_hippocampus" / "images", folder / "msd_hippocampus" / "labels")[:24]
    with rt.Session(model, variant="float32") as session:
        recorder = Recorder(session)
        for image, label in files:
            evaluate_case(image, label, recorder, None)
    return Case(model, recorder.seen[:48], rt.metrics.agreement, (1, 32))


def _sequence() -> Case:
    """Standardised histories of eight transactions, as the network sees them after its own scaling."""
    model = rt.load("fraud-sequence")
    generator = np.random.default_rng(0)
    samples = []
    for _ in range(256):
        history = np.abs(generator.standard_normal((1, 8, 26)) * np.geomspace(1, 100, 26)).astype(np.float32)
        samples.append({"sequence": history, "mask": np.ones((1, 8), np.float32)})
    return Case(model, samples, rt.metrics.correlation)


def _boosting() -> Case:
    model = rt.load("fraud-boosting")
    return Case(model, [model.signature.random(1, i) for i in range(32)], rt.metrics.correlation)


def _texture() -> Case:
    """Parts of ten textures, every other one with a defect, as the station prepares them."""
    from apps.industrial.features import prepared
    from apps.industrial.synthesis.defects import DEFECTS, add_defect
    from apps.industrial.synthesis.textures import TEXTURES, good_part

    generator, kinds = np.random.default_rng(0), list(DEFECTS)
    parts = [good_part(name, generator) for _ in range(16) for name in TEXTURES]
    parts = [add_defect(part, kinds[place % len(kinds)], generator)[0] if place % 2 else part for place, part in enumerate(parts)]
    return Case(
        rt.load("texture-features"), [{"pixels": prepared(part)[None].astype(np.float32)} for part in parts], rt.metrics.correlation
    )


def _resnet50() -> Case:
    """ResNet-50 of MONAI with two-dimensional convolutions, weights as initialised."""
    import torch
    from monai.networks.nets import resnet50

    torch.manual_seed(0)
    module = resnet50(spatial_dims=2, n_input_channels=3, num_classes=1000).eval()
    return _module(module, _pictures(24), rt.metrics.correlation)


def _mobilenet() -> Case:
    """MobileNetV2 with ImageNet weights from the data directory (as initialised without)."""
    import torch
    from torch import nn

    from apps.industrial.training.network import MOBILENET_V2, Convolution, backbone_layers, inverted_residuals

    class MobileNetV2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers, skips, _ = inverted_residuals(MOBILENET_V2)
            layers += [Convolution(320, 1280, 1, 1, 1, True), Convolution(1280, 1001, 1, 1, 1, False)]
            self.layers, self.skips = nn.ModuleList(layers), frozenset(skips)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            outputs = {-1: image}
            x = image
            for index, layer in enumerate(self.layers):
                if index == len(self.layers) - 1:
                    x = x.mean((2, 3), keepdim=True)
                x = layer(x)
                if index in self.skips:
                    x = x + outputs[index - 3]
                outputs[index] = x
            return x.flatten(1)

    torch.manual_seed(0)
    module = MobileNetV2().eval()
    folder = _data()
    if folder is not None:
        path = folder / "backbones" / "mobilenet_v2_1.0_224_imagenet_u8.safetensors"
        for layer, (_, weight, bias, _, _) in zip(module.layers, backbone_layers(path, len(module.layers)), strict=True):
            layer.conv.weight.data.copy_(weight)
            layer.conv.bias.data.copy_(bias)
    return _module(module, _pictures(64), rt.metrics.correlation)


def _bert() -> Case:
    """Twelve encoder layers of BERT-base's size on 128 embedded tokens, weights as initialised."""
    import torch

    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(False)
    layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True)
    module = torch.nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).eval()
    for parameter in module.parameters():  # the encoder's layers are copies of one
        if parameter.dim() > 1:
            torch.nn.init.xavier_uniform_(parameter)
    generator = np.random.default_rng(0)
    return _module(
        module, [{"tokens": generator.standard_normal((1, 128, 768)).astype(np.float32)} for _ in range(16)], rt.metrics.correlation
    )


def _unet() -> Case:
    """A 3-D U-Net of nnU-Net's size (32 to 320 channels) on 128^3 voxels, weights as initialised."""
    import torch
    from monai.networks.nets import DynUNet

    torch.manual_seed(0)
    strides = [1, 2, 2, 2, 2, 2]
    filters = [32, 64, 128, 256, 320, 320]
    module = DynUNet(3, 1, 3, [3] * 6, strides, strides[1:], filters=filters, norm_name="instance").eval()
    windows = [{"image": scan((SIDE,) * 3, seed=i)[None].astype(np.float32)} for i in range(6)]
    return Case(module, windows, rt.metrics.correlation, (1,), module, budget=300)


CASES: dict[str, Callable[[], Case]] = {
    "fraud-boosting": _boosting,
    "fraud-sequence": _sequence,
    "hippocampus-t1": _hippocampus,
    "texture-features": _texture,
    "mobilenet_v2": _mobilenet,
    "resnet50": _resnet50,
    "bert-base": _bert,
    "unet": _unet,
}


def _module(module: Any, samples: list[Sample], metric: Any, rows: tuple[int, ...] = (1, 32)) -> Case:
    return Case(module, samples, metric, rows, module)


def _pictures(count: int) -> list[Sample]:
    """Coloured pictures of textures and edges, 224 pixels, -1..1."""
    from apps.industrial.synthesis.textures import TEXTURES, good_part

    generator, names = np.random.default_rng(1), list(TEXTURES)
    samples = []
    for place in range(count):
        planes = [good_part(names[(place + shift) % len(names)], generator, 224) for shift in range(3)]
        planes = [plane if plane.ndim == 2 else plane[..., 0] for plane in planes]
        image = np.stack(planes).astype(np.float32) / 127.5 - 1
        samples.append({"image": image[None]})
    return samples


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


def peers(model: rt.Model, case: Case, inputs: Sample, device: str) -> Iterable[tuple[str, Callable[[], Any]]]:
    """What others run, as installed."""
    if device == "cpu":
        import onnxruntime as ort

        options = ort.SessionOptions()
        if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < (os.cpu_count() or 1):
            options.intra_op_num_threads = len(os.sched_getaffinity(0))  # it would leave the cores that this process may use
        session = ort.InferenceSession(str(model.graph), options, providers=["CPUExecutionProvider"])
        yield "onnxruntime", lambda: session.run(None, inputs)
        try:
            import openvino

            compiled = openvino.Core().compile_model(str(model.graph), "CPU")
            request = compiled.create_infer_request()
            chosen = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
            yield "openvino" if chosen == "f32" else f"openvino ({chosen} by default)", lambda: request.infer(inputs)
        except (ImportError, RuntimeError):
            pass
    elif backends()["onnxruntime"].availability("cuda").available:
        import onnxruntime as ort

        ort.preload_dlls()
        on_gpu = ort.InferenceSession(str(model.graph), providers=["CUDAExecutionProvider"])
        if on_gpu.get_providers()[0] == "CUDAExecutionProvider":  # it falls back to the CPU where CUDA's libraries are missing
            yield "onnxruntime", lambda: on_gpu.run(None, inputs)
    if model.name == "fraud-boosting":
        import xgboost

        booster = xgboost.XGBClassifier()
        booster.load_model(model.graph.parent / "booster.ubj")
        yield "xgboost scikit-learn predict", lambda: booster.predict_proba(inputs["features"])
    if case.module is not None or device == "cuda":
        yield from _torch_peers(model, case.module, inputs, device)


def _torch_peers(model: rt.Model, module: Any, inputs: Sample, device: str) -> Iterable[tuple[str, Callable[[], Any]]]:
    import copy

    import torch

    torch.set_num_threads(host().cores)
    if module is None:  # a model of the suite: its graph as torch calls
        from shared_runtime.backends.torch_graph import GraphProgram

        resident: Any = GraphProgram(model.graph, device).straight({n: torch.from_numpy(v).to(device) for n, v in inputs.items()})
    else:
        resident = copy.deepcopy(module).to(device).eval()
    compiled = torch.compile(copy.deepcopy(resident))

    def run(net: Any) -> Any:
        with torch.inference_mode():
            outputs = net(*(torch.from_numpy(value).to(device) for value in inputs.values()))
            return [value.cpu().numpy() for value in (outputs if isinstance(outputs, tuple) else (outputs,))]

    yield "torch eager", lambda: run(resident)
    yield "torch.compile", lambda: run(compiled)


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
