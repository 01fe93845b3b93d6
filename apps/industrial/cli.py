"""`triscope industrial`: teach, thresholds, inspect, evaluate, station, feed, tidy, generate, recipes, train, ui."""

from __future__ import annotations

import csv
import getpass
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast, get_args

import msgspec
import typer
from rich.progress import Progress

from apps.common.command_line import answers, console, learning_device, progress, stop_on_signals, write_json
from apps.common.errors import UsageError
from apps.common.settings import load_settings
from apps.industrial.errors import InputError
from shared_runtime.host import host

if TYPE_CHECKING:
    from apps.industrial.anomaly.calibration import Calibration, Rates

CLOSE_SECONDS = 8.0
"""How long a source may take to let go of its camera."""
app = typer.Typer(no_args_is_help=True, help="Inspection stations: taught from good parts, pass / review / fail with a defect map.")
Json = Annotated[Optional[str], typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for standard output.")]
RecipeName = Annotated[str, typer.Option("--recipe", metavar="NAME", help="Letters, digits, '-' and '_'.")]
Defects = Annotated[
    Optional[Path],
    typer.Option("--defects", metavar="DIR", help="Labelled defects: test/KIND with ground_truth/KIND, boxes.csv, or neither."),
]
Seconds = Annotated[Optional[float], typer.Option("--seconds", min=1, help="How long to learn from labelled defects.")]
ReviewRate = Annotated[
    Optional[float], typer.Option("--review-rate", metavar="PERCENT", help="Of good parts, so many may go to REVIEW or FAIL (5).")
]
FailRate = Annotated[Optional[float], typer.Option("--fail-rate", metavar="PERCENT", help="Of good parts, so many may FAIL (1).")]
Device = Annotated[str, typer.Option("--device", help="Where to learn: auto, cuda or cpu.")]


@contextmanager
def _bars() -> Iterator[Any]:
    """A progress bar a step, where standard error is a terminal."""
    with Progress(console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def report(step: str, share: float) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=1.0)
            bars.update(tasks[step], completed=share)

        yield report


@app.command()
def teach(
    recipe: RecipeName,
    good: Annotated[
        Optional[Path], typer.Option(metavar="DIR", help="Images of good parts; without them, what the recipe was taught from before.")
    ] = None,
    defects: Defects = None,
    seconds: Seconds = None,
    device: Device = "auto",
    from_line: Annotated[bool, typer.Option("--from-line", help="Add the parts that the operator decided on.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Add to --good and --defects what the recipe was taught from before.")] = False,
    review_rate: ReviewRate = None,
    fail_rate: FailRate = None,
    json: Json = None,
) -> None:
    """Teach a recipe from good parts, and from labelled defects where there are some; or again, with what came later."""
    from apps.industrial.bootstrap import open_industrial
    from apps.industrial.evaluation.dataset import good_samples, labelled_samples
    from apps.industrial.teaching import advice

    service, log = open_industrial(load_settings().settings)
    samples = good_samples(good) if good else []
    if not good:
        service.recipes.folder(recipe)
    bad = labelled_samples(defects, defects_only=True) if defects else []
    with tempfile.TemporaryDirectory() as folder, _bars() as report:
        if from_line:
            more_good, more_bad = service.learned_from_line(recipe, Path(folder))
            samples, bad = samples + more_good, bad + more_bad
        taught = service.teach(
            recipe,
            samples,
            bad,
            again=again or not good,
            rates=_rates(service.rates(recipe), review_rate, fail_rate),
            seconds=seconds,
            device=learning_device(device),
            report=report,
        )
    service.close()
    log.close()
    facts = taught.recipe.facts
    for line in _thresholds(facts.calibration):
        console.print(line)
    for name, why in taught.skipped:
        console.print(f"[yellow]left out[/yellow] {name}: {why}")
    for name in taught.outliers:
        console.print(f"[yellow]stands apart:[/yellow] {name}")
    for warning in facts.warnings:
        console.print(f"[yellow]check:[/yellow] {warning}")
    console.print(f"recipe {recipe}: {facts.good} good parts, {facts.defects} defects, {taught.seconds['total']:.1f} s")
    console.print(f"{advice(facts.good, facts.defects)} (--defects DIR)")
    write_json(
        {
            "recipe": msgspec.to_builtins(facts),
            "outliers": taught.outliers,
            "skipped": taught.skipped,
            "seconds": {k: round(v, 2) for k, v in taught.seconds.items()},
            "advice": advice(facts.good, facts.defects),
        },
        json,
    )


def _rates(known: Rates, review: float | None, fail: float | None) -> Rates:
    """Those that are given [%], and the `known` for the others."""
    return type(known)(known.review if review is None else review / 100, known.fail if fail is None else fail / 100)


def _thresholds(calibration: Calibration) -> Iterator[str]:
    for name, threshold in (("review", calibration.review), ("fail", calibration.fail)):
        low, high = threshold.interval
        expected = f"expected of good parts {100 * threshold.expected:.1f} % ({100 * low:.1f}-{100 * high:.1f} %)"
        yield f"{name:6} above {threshold.value:6.2f}: {expected}"


@app.command()
def thresholds(recipe: RecipeName, review_rate: ReviewRate = None, fail_rate: FailRate = None, json: Json = None) -> None:
    """A recipe's thresholds; moves them where a share is given. A station judges by them from its next part on."""
    from apps.industrial.bootstrap import open_industrial

    service, log = open_industrial(load_settings().settings)
    facts = service.recipes.facts(recipe)
    if review_rate is not None or fail_rate is not None:
        facts = service.set_rates(recipe, _rates(service.rates(recipe), review_rate, fail_rate), getpass.getuser())
    service.close()
    log.close()
    for line in _thresholds(facts.calibration):
        answers(json).print(line)
    write_json({"recipe": recipe, "rates": msgspec.to_builtins(facts.rates), **msgspec.to_builtins(facts.calibration)}, json)


@app.command()
def inspect(
    input: Annotated[Path, typer.Argument(metavar="INPUT", help="An image or a folder of images.")],
    recipe: RecipeName,
    out: Annotated[Optional[Path], typer.Option("--out", metavar="DIR", help="Folder for the pictures with defect map and boxes.")] = None,
    json: Json = None,
) -> None:
    """Judge one image or each of a folder: verdict, score, boxes, picture."""
    from apps.industrial.bootstrap import open_recipes, open_session
    from apps.industrial.images import image_files, png, read_image
    from apps.industrial.inspection.inspector import Inspector, overlay

    settings = load_settings().settings
    loaded = open_recipes(settings).load(recipe)
    if input.is_dir() and not image_files(input):
        raise InputError(f"{input} holds no image; expected pictures of parts")
    paths = image_files(input) if input.is_dir() else [input]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    stems = Counter(path.stem for path in paths)
    found, refused, results = [], [], answers(json)
    with open_session(settings, loaded.model) as session:
        inspector = Inspector(loaded, session)
        for path in progress(paths, "inspecting", len(paths)):
            try:
                image = read_image(path, loaded.facts.white)
            except InputError as error:
                if not input.is_dir():
                    raise
                refused.append({"path": path.name, "reason": str(error)})
                console.print(f"[yellow]refused[/yellow] {path.name}: {error}")
                continue
            result = inspector.inspect(image)
            picture = ""
            if out is not None:
                picture = f"{path.stem if stems[path.stem] == 1 else path.name}.inspected.png"
                (out / picture).write_bytes(png(overlay(image, result)))
            entry = {"path": path.name, "verdict": result.verdict, "score": round(result.score, 5), "reasons": list(result.reasons)}
            found.append(entry | {"boxes": msgspec.to_builtins(result.boxes), "kind": result.kind, "picture": picture})
            results.print(f"{path.name:40} {result.verdict.upper():7} {result.score:7.2f}  {result.kind} {'; '.join(result.reasons)}")
    write_json({"recipe": recipe, "images": found, "refused": refused}, json)


@app.command()
def evaluate(
    dataset: Annotated[Path, typer.Option(metavar="DIR", help="train/good, test/KIND, ground_truth/KIND.")],
    defects: Defects = None,
    seconds: Seconds = None,
    device: Device = "auto",
    scores: Annotated[Optional[Path], typer.Option(metavar="FILE", help="CSV with path, score, verdict.")] = None,
    json: Json = None,
) -> None:
    """Teach from train/good (and labelled defects), judge test: AUROC of images and pixels, PRO, recall, ms."""
    from apps.industrial.bootstrap import open_session
    from apps.industrial.evaluation.dataset import digest, good_samples, labelled_samples
    from apps.industrial.evaluation.evaluate import judge, metrics
    from apps.industrial.inspection.inspector import Inspector
    from apps.industrial.teaching import teach as run_teach

    settings = load_settings().settings
    tests = labelled_samples(dataset)
    bad = labelled_samples(defects, defects_only=True) if defects else []
    good = good_samples(dataset / "train" / "good")
    seen = {digest(sample.path) for sample in (*good, *bad)}
    kept = [sample for sample in tests if digest(sample.path) not in seen]
    if len(kept) < len(tests):
        console.print(f"{len(tests) - len(kept)} images that it learned from are left out of the test")
    with _bars() as report:
        taught = run_teach(
            "evaluation", good, bad, lambda m: open_session(settings, m), seconds=seconds, device=learning_device(device), report=report
        )
    refused: list[tuple[str, str]] = []
    with open_session(settings, taught.recipe.model) as session:
        judged = judge(Inspector(taught.recipe, session), kept, lambda items: progress(items, "judging", len(items)), refused)
        model = {"name": session.model.name, "sha256": session.model.sha256, "bytes": session.model.graph.stat().st_size}
        plan = msgspec.to_builtins(session.plan)
    for name, why in [*taught.skipped, *refused]:
        console.print(f"[yellow]left out[/yellow] {name}: {why}")
    if not judged:
        raise InputError(f"no image of {dataset / 'test'} can be judged; expected pictures of parts")
    result = metrics(judged)
    names = ("image_auroc", "pixel_auroc", "pro", "recall_at_fpr_1pct", "recall_at_fpr_5pct", "ms_per_image")
    for name in names:
        answers(json).print(f"{name:20} {result[name]}")
    if scores is not None:
        scores.parent.mkdir(parents=True, exist_ok=True)
        with scores.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
            writer = csv.writer(stream)
            writer.writerow(("path", "score", "verdict"))
            writer.writerows((str(j.sample.path.relative_to(dataset)), f"{j.score:.6f}", j.verdict) for j in judged)
    about = {"good": taught.recipe.facts.good, "defects": taught.recipe.facts.defects, "seconds": taught.seconds}
    write_json(
        {
            "metrics": result,
            "model": model,
            "plan": plan,
            "taught": about,
            "images": len(judged),
            "refused": [{"path": name, "reason": why} for name, why in refused],
            "host": msgspec.to_builtins(host()),
        },
        json,
    )


@app.command()
def station() -> None:
    """One worker process in the foreground: industrial.frames -> industrial.verdicts and store."""
    from apps.common.workers import reporting
    from apps.industrial.bootstrap import open_industrial
    from apps.industrial.worker import REPORTS, run_worker

    settings = load_settings().settings
    with reporting(settings, REPORTS), stop_on_signals() as stop:
        service, log = open_industrial(settings)
        run_worker(service, log, stop, unfinished=settings.home_path / "unfinished", keep_days=settings.industrial_keep_days)
        service.close()
        log.close()


app.command(name="stream", hidden=True, help="The same as station.")(station)
app.command(name="worker", hidden=True, help="The same as station.")(station)


@app.command()
def feed(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="folder:DIR, video:FILE, camera:0, rtsp://..., http:PORT, genicam:FILE.cti, texture:NAME."),
    ],
    recipe: RecipeName,
    station: Annotated[str, typer.Option(help="Name of the station.")] = "station-1",
    lot: Annotated[str, typer.Option(help="Lot of the parts.")] = "",
    policy: Annotated[str, typer.Option(help="When the log is slower: wait, drop-oldest or drop-newest.")] = "wait",
    number: Annotated[int, typer.Option(min=0, help="End after so many frames; 0 for no end.")] = 0,
    follow: Annotated[bool, typer.Option(help="folder: wait for new images.")] = True,
    per_second: Annotated[float, typer.Option(min=0, help="texture: parts a second.")] = 2.0,
    json: Json = None,
) -> None:
    """Send frames of a source to the line, through a bounded buffer."""
    from apps.industrial.acquisition.base import FrameBuffer, Policy, fill
    from apps.industrial.acquisition.named import source_named
    from apps.industrial.bootstrap import open_industrial

    if policy not in get_args(Policy):
        raise UsageError(f"--policy is {policy!r}; expected wait, drop-oldest or drop-newest")
    opened = source_named(source, follow=follow, per_second=per_second)
    service, log = open_industrial(load_settings().settings)
    service.recipes.folder(recipe)
    buffer = FrameBuffer(policy=cast(Policy, policy))
    sent = 0
    failures: list[Exception] = []

    def send() -> None:
        nonlocal sent
        while not buffer.done and not (number and sent >= number):
            frame = buffer.get(0.5)
            if frame is not None:
                service.submit(frame.content, recipe, station, frame.serial, lot, frame.time, stop)
                sent += 1

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # raised again below
            failures.append(error)
            buffer.close()

    with stop_on_signals() as stop:
        source_thread = threading.Thread(target=guarded, args=(lambda: fill(opened, buffer, stop),), name="source", daemon=True)
        sender = threading.Thread(target=guarded, args=(send,), name="sender")
        source_thread.start()
        sender.start()
        while sender.is_alive():  # a signal must not break into join, which would then take the thread for ended
            stop.wait(0.2)
    stop.set()
    sender.join()  # what the source had taken before it was told to stop is still sent
    buffer.close()
    source_thread.join(CLOSE_SECONDS)  # one that is inside a camera's library when the process ends would take it down
    service.close()
    log.close()
    if failures:
        raise failures[0]
    console.print(f"{sent} frames sent, {buffer.dropped} dropped")
    write_json({"sent": sent, "dropped": buffer.dropped}, json)


@app.command()
def tidy(
    older_than: Annotated[float, typer.Option("--older-than", metavar="DAYS", help="Age from which on pictures are deleted.")],
    json: Json = None,
) -> None:
    """Delete pictures of parts that passed long ago and on which no one decided. Verdicts stay."""
    from apps.industrial.bootstrap import open_industrial

    service, log = open_industrial(load_settings().settings)
    deleted = service.tidy(older_than)
    service.close()
    log.close()
    answers(json).print(f"{deleted} pictures deleted")
    write_json({"deleted": deleted}, json)


@app.command()
def generate(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for train/good, test/KIND, ground_truth/KIND.")],
    texture: Annotated[str, typer.Option(help="Which of the ten textures.")] = "brushed",
    good: Annotated[int, typer.Option(min=1)] = 60,
    each: Annotated[int, typer.Option(min=1, help="Test images of good parts and of each kind of defect.")] = 10,
    seed: int = 0,
) -> None:
    """Make a data set of procedural parts with eight kinds of defect and exact masks."""
    from apps.industrial.acquisition.generated import GeneratedSource, write_dataset

    GeneratedSource(texture)
    write_dataset(out, texture, good=good, each=each, seed=seed)
    console.print(f"data set in {out}")


@app.command()
def recipes(json: Json = None) -> None:
    """The recipes of this installation."""
    from apps.industrial.bootstrap import open_recipes

    book = open_recipes(load_settings().settings)
    facts = [book.facts(name) for name in book.names()]
    for f in facts:
        answers(json).print(f"{f.name:30} {f.good} good, {f.defects} defects, taught {f.taught[:19]}")
    write_json({"recipes": msgspec.to_builtins(facts)}, json)


@app.command()
def compare(
    template: Annotated[Path, typer.Argument(metavar="TEMPLATE", help="The golden template.")],
    tested: Annotated[Path, typer.Argument(metavar="TESTED", help="The printed pattern to test.")],
    json: Json = None,
) -> None:
    """Compare a printed pattern with its golden template: aligned, differences as boxes."""
    from apps.industrial.images import grey, read_image
    from apps.industrial.inspection.template import compare as run

    result = run(grey(read_image(template)), grey(read_image(tested)))
    for box in result.boxes:
        answers(json).print(f"{box.kind:8} at {box.x}, {box.y}: {box.width} x {box.height} pixels, area {box.area}")
    answers(json).print(f"{len(result.boxes)} differences; shift {result.shift[0]:.1f}, {result.shift[1]:.1f} pixels")
    write_json({"boxes": msgspec.to_builtins(result.boxes), "shift": result.shift}, json)


@app.command()
def train(
    backbones: Annotated[Path, typer.Option(metavar="DIR", help="MobileNetV1 and V2 as safetensors.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the model.")],
    textures: Annotated[
        Optional[Path], typer.Option(metavar="DIR", help="Grey images to take pieces of, besides the procedural textures.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1)] = 210.0,
    pool: Annotated[int, typer.Option(min=32, help="Surfaces that are drawn before training.")] = 24_000,
    device: Device = "auto",
) -> None:
    """Train texture-features by distillation and on synthetic defects. Needs the extra 'train'."""
    try:
        from apps.industrial.training.run import train_and_write
    except ImportError as error:
        raise UsageError(f"training needs torch ({error}); install it with pip install 'triscope[train]'") from error
    folder = train_and_write(backbones, textures, out, seconds, pool, learning_device(device))
    console.print(f"model in {folder}; copy it to TRISCOPE_HOME/models to use it by name")


@app.command()
def ui(port: Annotated[Optional[int], typer.Option(help="Port of the pages.")] = None) -> None:
    """Serve the pages (all apps together)."""
    from apps.common.ui.server import serve_pages

    settings = load_settings().settings
    serve_pages(settings.ui_address, port or settings.ui_port)
