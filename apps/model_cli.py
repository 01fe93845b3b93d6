"""`triscope model`: import, optimise, plan, verify, profile and export the models of this installation."""

from __future__ import annotations

import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Annotated, Any, Optional

import msgspec
import numpy as np
import typer
from rich.table import Table

import shared_runtime as rt
from apps.common.command_line import answers, console, write_json
from apps.common.settings import load_settings
from shared_runtime.planning.objective import KINDS, Objective
from shared_runtime.quantization.metrics import METRICS
from shared_runtime.repository.store import ModelRepository

app = typer.Typer(no_args_is_help=True, help="The models of this installation.")
Json = Annotated[Optional[str], typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for standard output.")]
Arrays = Annotated[
    Optional[Path], typer.Option(metavar="NPZ", help="Arrays by input name, a sample a row; for validation also the array `target`.")
]

Example = Annotated[
    Optional[Path],
    typer.Option(metavar="NPZ", help="Valid inputs by name, a row or more, where random numbers are none (indices, say) or sizes matter."),
]


@app.command("list")
def list_models(json: Json = None) -> None:
    """The models that can be loaded by name, and those that can't be, with the reason."""
    out = answers(json)
    models, damaged = [], {}
    for name in ModelRepository.default().names():
        try:
            models.append(rt.load(name))
        except rt.ModelError as error:
            damaged[name] = str(error)
    for model in models:
        variants = f"  variants: {', '.join(model.variants)}" if model.variants else ""
        out.print(f"{model.name:24} {model.version:10} {model.card.get('task', '')}{variants}")
    for name, why in damaged.items():
        out.print(f"{name:24} [red]can't be loaded:[/red] {why}")
    rows = [{"name": m.name, "version": m.version, "sha256": m.sha256, "variants": list(m.variants)} for m in models]
    write_json({"models": rows, "damaged": damaged}, json)


@app.command()
def show(name: str, json: Json = None) -> None:
    """A model's card, signature and certificates."""
    out = answers(json)
    model = rt.load(name)
    content = {
        "name": model.name,
        "sha256": model.sha256,
        "signature": msgspec.to_builtins(model.signature),
        "card": dict(model.card),
        "certificates": {variant: msgspec.to_builtins(model.certificate(variant)) for variant in model.variants},
        "void": {variant.name: variant.why_void for variant in model.known.values() if variant.why_void},
    }
    out.print_json(msgspec.json.encode(content).decode())
    write_json(content, json)


@app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="ONNX, SavedModel, .keras, MONAI bundle, nnU-Net folder, .ubj/.json, LightGBM .txt.")],
    name: Annotated[str, typer.Option(help="The name to load it by.")],
    example: Example = None,
    json: Json = None,
) -> None:
    """Import a model that someone else trained; it is compared with its origin first."""
    folder = rt.import_model(path, name, example=None if example is None else _arrays(example))
    model = rt.load(folder)
    facts = model.card["import"]
    console.print(f"{name}: from {facts['from']}, relative difference from its origin {facts['difference']:.1e}, in {folder}")
    write_json({"name": name, "sha256": model.sha256, "folder": str(folder), **facts}, json)


@app.command()
def optimize(
    name: Annotated[str, typer.Argument(help="A model's name, folder or ONNX file.")],
    calibration: Annotated[Path, typer.Option(metavar="NPZ", help="Arrays by input name, a sample a row.")],
    validation: Arrays = None,
    metric: Annotated[str, typer.Option(help=f"One of {', '.join(METRICS)}.")] = "agreement",
    max_drop: Annotated[float, typer.Option(help="Largest drop of the metric, absolute.")] = 0.005,
    certain: Annotated[bool, typer.Option("--certain", help="The upper end of the drop's interval must be within it too.")] = False,
    precision: Annotated[Optional[list[str]], typer.Option(help="int8, bfloat16, float16, float8; without, the first three.")] = None,
    budget: Annotated[float, typer.Option(min=1, help="Seconds.")] = 900.0,
    json: Json = None,
) -> None:
    """Make every reduced form that passes its guard on this host."""
    settings = load_settings().settings
    model = rt.load(name)
    made = rt.optimize(
        model,
        calibration=_rows(calibration, model),
        validation=None if validation is None else _pairs(validation, model),
        metric=metric,
        max_drop=max_drop,
        precisions=precision,
        device=settings.device,
        threads=settings.model_threads,
        budget_s=budget,
        report=console.print,
        certain=certain,
    )
    table = Table("variant", "precision", "metric", "drop", "95 % interval", "size", "speed")
    for variant in made.variants:
        c = made.certificate(variant)
        interval = f"{c.drop_interval[0]:.4g} to {c.drop_interval[1]:.4g}"
        speed = "" if c.speedup is None else f"{c.speedup:.2f}x"
        table.add_row(
            variant, c.precision, f"{c.before:.4g} to {c.after:.4g}", f"{c.drop:.4g}", interval, f"{c.bytes / c.float_bytes:.0%}", speed
        )
    out = answers(json)
    out.print(table)
    for variant, why in made.refused.items():
        out.print(f"refused {variant}: {why}")
    certificates = {variant: msgspec.to_builtins(made.certificate(variant)) for variant in made.variants}
    write_json({"model": made.name, "variants": certificates, "refused": dict(made.refused)}, json)


@app.command()
def plan(
    name: str,
    objective: Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")] = "latency",
    p99_ms: Annotated[Optional[float], typer.Option(help="With the objective throughput: the latency limit.")] = None,
    thorough: Annotated[bool, typer.Option("--thorough", help="Also try what is slow to prepare (torch.compile).")] = False,
    example: Example = None,
    json: Json = None,
) -> None:
    """What this host runs for a model, and why the other candidates lost."""
    out = answers(json)
    settings = load_settings().settings
    if objective not in KINDS:
        raise typer.BadParameter(f"unknown objective {objective!r}; expected one of {', '.join(KINDS)}")
    if p99_ms is not None and (objective != "throughput" or not p99_ms > 0):
        raise typer.BadParameter(f"--p99-ms {p99_ms:g} with the objective {objective!r}; expected milliseconds above 0, with throughput")
    model = rt.load(name)
    session = rt.Session(
        model,
        settings.device,
        threads=settings.model_threads,
        plans=settings.home_path / "plans",
        objective=Objective(objective, p99_ms),
        thorough=thorough,
        probe=None if example is None else _inputs(example, model),
    )
    with session:
        found = session.plan
    table = Table("backend", "device", "variant", "mode", "threads", "rows: median ms (spread)", "why it lost")
    for c in found.candidates:
        times = ", ".join(f"{t.rows}: {t.median_ms:.3g} ({t.spread_ms:.2g})" for t in c.timings)
        table.add_row(c.backend, c.device, c.variant, c.mode, str(c.threads), times, c.lost or "chosen")
    out.print(found.describe())
    if found.nodes:
        out.print("operators by where they ran: " + ", ".join(f"{count} {where}" for where, count in found.nodes.items()))
    out.print(table)
    write_json(found, json)


@app.command()
def verify(
    name: str,
    variant: Annotated[Optional[str], typer.Option(help="One variant; all of them without.")] = None,
    validation: Arrays = None,
    metric: Annotated[Optional[str], typer.Option(help="The metric by name; the certificate's own without.")] = None,
    json: Json = None,
) -> None:
    """Compute certificates again: files, host, differences; with --validation the metric too. Exits 1 where one does not hold."""
    out = answers(json)
    model = rt.load(name)
    names = [variant] if variant else list(model.known)
    if not names:
        raise rt.ModelNotFoundError(f"model {name!r} has no variants to verify; run triscope model optimize {name}")
    results = []
    for one in names:
        known = model.known.get(one)
        chosen = metric or (known.certificate.metric if known is not None and known.certificate is not None else "agreement")
        pairs = None if validation is None else _pairs(validation, model)
        results.append(rt.verify(model, one, validation=pairs, metric=chosen))
        found = results[-1]
        reason = found["void"] or found.get("why") or "it gives other values"
        out.print(f"{one}: {'holds' if found['holds'] else f'does not hold: {reason}'}")
    write_json({"model": name, "variants": results}, json)
    if not all(result["holds"] for result in results):
        raise typer.Exit(1)


@app.command("passes")
def list_tools(json: Json = None) -> None:
    """Every tool of the optimiser: graph passes, quantizers, analyses."""
    out = answers(json)
    from shared_runtime.tools import tools

    found = tools()
    for tool in found:
        out.print(f"{tool.kind:10} {tool.name:28} {tool.summary}" + (f" [{tool.engine}]" if tool.engine else ""), markup=False)
    write_json({"tools": found}, json)


@app.command()
def profile(
    name: str,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a run.")] = 1,
    trace: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Write a Chrome trace.")] = None,
    example: Example = None,
    json: Json = None,
) -> None:
    """Where a model's time goes, an operator, and the memory that is planned for it."""
    out = answers(json)
    from shared_runtime.graph.memory import plan_memory

    settings = load_settings().settings
    model = rt.load(name)
    given = None if example is None else _inputs(example, model)
    inputs = model.signature.random(rows) if given is None else model.signature.repeated(model.signature.row(given, 0), rows)
    with rt.Session(model, settings.device, threads=settings.model_threads, plans=settings.home_path / "plans", probe=given) as session:
        found = rt.profile(session, inputs)
    memory = plan_memory(model.graph, inputs)
    out.print(found.table(), markup=False, highlight=False)
    out.print(memory.describe())
    if trace is not None:
        found.chrome_trace(trace)
    write_json({**found.json(), "planned_peak_bytes": memory.peak}, json)


@app.command()
def export(
    name: str,
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
    variant: Annotated[Optional[list[str]], typer.Option(help="Variants to take along; all certified ones without.")] = None,
) -> None:
    """Copy a model with its certified variants into a folder that can be loaded elsewhere."""
    model = rt.load(name)
    if out.exists():
        raise rt.ModelError(f"{out} exists; give a folder that does not")
    chosen = [model.variant(one) for one in (variant or model.variants)]
    if (model.graph.parent / "card.toml").is_file():
        shutil.copytree(model.graph.parent, out, ignore=shutil.ignore_patterns("variants"))
    else:
        from shared_runtime.importers import import_to_folder

        import_to_folder(model.graph, out, name=model.name)
    for one in chosen:
        shutil.copytree(one.folder, out / "variants" / one.name)
    console.print(f"{model.name} with {len(chosen)} variants in {out}")


def _rows(path: Path, model: rt.Model) -> list[dict[str, Any]]:
    """A sample a row of the file's arrays; of a model that takes a fixed number of rows, a sample as many."""
    arrays, signature = _inputs(path, model), model.signature
    at_once = signature.fixed_rows
    if at_once is not None:
        sizes = {np.shape(value)[:1] for value in arrays.values()}
        if len(sizes) != 1 or not (size := sizes.pop()) or size[0] % at_once:
            shapes = ", ".join(str(list(np.shape(value))) for value in arrays.values())
            raise rt.CalibrationError(f"{path} has arrays of shape {shapes}; expected {at_once} rows in each, or a multiple")
        starts = range(0, size[0], at_once)
        return [{name: value[start : start + at_once] for name, value in arrays.items()} for start in starts]
    try:
        checked = signature.check(arrays, model.name)
    except rt.InputError as error:
        raise rt.CalibrationError(f"{path} does not fit: {error}") from error
    return [signature.row(checked, row) for row in range(signature.rows(checked))]


def _arrays(path: Path) -> dict[str, Any]:
    if path.suffix == ".npy":
        raise rt.CalibrationError(
            f"{path} holds one array without a name; expected arrays by input name, as numpy.savez writes them (.npz)"
        )
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise rt.CalibrationError(f"{path} can't be read as named arrays (.npz without pickled objects): {error}") from error


def _inputs(path: Path, model: rt.Model) -> dict[str, Any]:
    """The file's arrays for the model's inputs."""
    stored = _arrays(path)
    arrays = {spec.name: stored[spec.name] for spec in model.signature.inputs if spec.name in stored}
    if missing := [spec.describe() for spec in model.signature.inputs if spec.name not in arrays]:
        raise rt.CalibrationError(f"{path} has no array {missing[0]}; it has {list(stored) or 'none'}")
    return arrays


def _pairs(path: Path, model: rt.Model) -> list[tuple[dict[str, Any], Any]]:
    samples, targets = _rows(path, model), _arrays(path).get("target")
    if targets is None:
        return [(inputs, None) for inputs in samples]
    each = model.signature.fixed_rows or 1
    if np.shape(targets)[:1] != (each * len(samples),):
        raise rt.CalibrationError(f"{path} has a target of shape {list(targets.shape)} for {each * len(samples)} rows; expected one a row")
    return [(inputs, targets[each * place : each * (place + 1)]) for place, inputs in enumerate(samples)]
