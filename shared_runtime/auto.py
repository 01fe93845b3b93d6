"""`rt.auto_optimize`: graph passes, variants and plan as one search, with what each step gained."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from shared_runtime.backends.base import backends, refuse_unknown_device, specialise
from shared_runtime.graph.check import read_whole
from shared_runtime.graph.passes.base import passes, run_pass
from shared_runtime.host import asked_cores
from shared_runtime.importers.base import needs
from shared_runtime.model import Model, load
from shared_runtime.optimize import MAX_DROP, loaded_with, optimize
from shared_runtime.planning.measure import Timed, interleave
from shared_runtime.planning.plan import Plan
from shared_runtime.planning.planner import plan_and_compile
from shared_runtime.quantization.guard import Report
from shared_runtime.quantization.metrics import Metric
from shared_runtime.quantization.samples import read_calibration
from shared_runtime.rewritten import apply_passes, compare, rewritten, valid_inputs
from shared_runtime.signature import Tensors
from shared_runtime.variants import VariantStore

logger = logging.getLogger(__name__)
SEARCHED = (
    "constant-folding",
    "cancel-casts",
    "cancel-transposes",
    "fold-pads",
    "conv-batchnorm",
    "common-subexpressions",
    "linear-layernorm",
    "gelu",
    "attention",
    "tree-regressor",
    "einsum-to-matmul",
)
TRIALS = 24


@dataclass(frozen=True)
class Gain:
    """One step of the search: how many times as fast as before it the model is, with a 95 % interval, and what was done."""

    step: str
    ratio: float
    interval: tuple[float, float]
    detail: str


@dataclass(frozen=True)
class Search:
    """The model with its variants, its plan, and the gains in order."""

    model: Model
    plan: Plan
    gains: tuple[Gain, ...]

    def table(self) -> str:
        """A line a step."""
        return "\n".join(f"{g.step:10} {g.ratio:6.2f}x ({g.interval[0]:.2f} to {g.interval[1]:.2f})  {g.detail}" for g in self.gains)

    def __str__(self) -> str:
        return self.table()


def auto_optimize(
    model: Model | str | Path | Any,
    *,
    calibration: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    metric: Metric | str | None = None,
    max_drop: float = MAX_DROP,
    budget_s: float = 600.0,
    device: str = "auto",
    threads: int | None = None,
    plans: Path | str | None = None,
    store: VariantStore | None = None,
    report: Report | None = None,
) -> Search:
    """Search passes (which of them, by optuna), reduced variants (each guarded) and the plan within `budget_s`.

    Without `calibration` no precision is reduced. Errors as those of `rt.optimize`.
    """
    if calibration is None:
        loaded = model if isinstance(model, Model) else load(model)
    else:
        loaded, calibration = loaded_with(model, calibration)
    say = report or (lambda text: logger.info("%s", text))
    refuse_unknown_device(device)
    if not budget_s > 0:
        raise ValueError(f"budget_s is {budget_s}; expected seconds above 0")
    cores = asked_cores(threads)
    end = time.monotonic() + budget_s
    store = store or VariantStore()
    data = None if calibration is None else read_calibration(calibration, loaded.signature, loaded.name)
    if data is not None:
        loaded = replace(loaded, dims=loaded.signature.dims_of(data[0]), sample=loaded.signature.row(data[0], 0))
    probe = loaded.probe()
    gains = []
    found = loaded
    if device != "cuda":  # torch takes the graph apart by itself
        found, gain = _search_passes(loaded, probe, cores, store, budget_s / 4, say)
        gains.append(gain)
    if data is not None:
        before = _runner(found, device, cores, probe)
        made = optimize(
            found,
            calibration=data,
            validation=validation,
            metric=metric,
            max_drop=max_drop,
            device=device,
            threads=threads,
            budget_s=max(10.0, (end - time.monotonic()) * 2 / 3),
            store=store,
            report=say,
        )
        after = _runner(made, device, cores, probe)
        ratio, interval = compare(before, after, probe)
        gains.append(Gain("variants", ratio, interval, ", ".join(made.variants) or "; ".join(made.refused.values())))
        found = made
    thorough, cache = end - time.monotonic() > 60, None if plans is None else Path(plans)
    first = backends()["onnxruntime"].compile(loaded, "cpu", cores) if device != "cuda" else _runner(loaded, device, cores, probe)
    plan, ladder = plan_and_compile(
        found, device, cores, cache, budget_s=max(3.0, (end - time.monotonic()) / 4), thorough=thorough, probe=probe
    )
    ratio, interval = compare(first, ladder, probe)
    gains.append(Gain("plan", ratio, interval, f"against the engine as installed: {plan.describe()}"))
    for gain in gains:
        say(f"{gain.step}: {gain.ratio:.2f} times as fast ({gain.interval[0]:.2f} to {gain.interval[1]:.2f}): {gain.detail}")
    return Search(found, plan, tuple(gains))


def _runner(model: Model, device: str, threads: int, probe: Tensors) -> Any:
    return plan_and_compile(model, device, threads, None, ladder=(1,), budget_s=2.0, probe=probe)[1]


def _search_passes(model: Model, probe: Tensors, threads: int, store: VariantStore, budget: float, say: Report) -> tuple[Model, Gain]:
    """Which passes make the graph faster in which engine; the best becomes the variant `rewritten-ENGINE` where it is worth it."""
    optuna = needs("optuna", "the search over passes")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix="triscope-passes-"))
    original = read_whole(model.graph)
    probes = [valid_inputs(model), probe]
    engines = [name for name in ("onnxruntime", "openvino") if name in backends() and backends()[name].availability("cpu").available]
    useful = [name for name in SEARCHED if name in passes() and not run_pass(original, passes()[name], probes)[1].refused]
    tried: dict[tuple[str, ...], float] = {}
    try:
        if not useful:
            return model, Gain("passes", 1.0, (1.0, 1.0), "no pass applies to this graph")

        def objective(trial: Any) -> float:
            chosen = tuple(name for name in useful if trial.suggest_categorical(name, [True, False]))
            engine = trial.suggest_categorical("engine", engines)
            key = (engine, *chosen)
            if key not in tried:
                path = folder / f"{len(tried)}.onnx"
                tried[key] = _time_passes(model, original, chosen, engine, threads, probes, probe, path)
            return tried[key]

        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
        for engine in engines:
            study.enqueue_trial({**dict.fromkeys(useful, True), "engine": engine})
            study.enqueue_trial({**dict.fromkeys(useful, False), "engine": engine})
        study.optimize(objective, n_trials=TRIALS, timeout=budget)
        best = study.best_params
        chosen = tuple(name for name in useful if best[name])
        engine = str(best["engine"])
        made = rewritten(model, chosen, engine, threads, store)
        if made is None:
            return model, Gain("passes", 1.0, (1.0, 1.0), "the graph as it came is the fastest")
        gain = Gain("passes", made.ratio, made.interval, f"{', '.join(made.passes)} for {engine}")
        return replace(model, known={**model.known, made.variant.name: made.variant}), gain
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _time_passes(
    model: Model,
    original: onnx.ModelProto,
    chosen: tuple[str, ...],
    engine: str,
    threads: int,
    probes: list[Tensors],
    probe: Tensors,
    path: Path,
) -> float:
    """Median seconds of a run, infinite where the engine can't load the graph."""
    from shared_runtime.errors import SharedRuntimeError

    try:
        apply_passes(original, chosen, engine, probes, path)
        executable = backends()[engine].compile(replace(model, graph=path, sha256=""), "cpu", threads)
        specialise(executable, probe)
        executable.run(probe)
    except SharedRuntimeError:
        return float("inf")
    timed = Timed(lambda: executable.run(probe))
    interleave([timed], 1.0)
    executable.close()
    return timed.median
