"""`triscope medical`: segment, evaluate, listen, worker, submit, train, ui."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Annotated, Optional

import msgspec
import typer

from apps.common.command_line import answers, console, learning_device, progress, stop_on_signals, write_json
from apps.common.errors import UsageError
from apps.common.settings import load_settings
from apps.medical.errors import InputError
from apps.medical.segmentation.window import MODEL
from shared_runtime.host import host

logger = logging.getLogger(__name__)
app = typer.Typer(no_args_is_help=True, help="CT and MR studies: segment, measure, review.")
Json = Annotated[Optional[str], typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for standard output.")]
ModelName = Annotated[str, typer.Option("--model", help="Repository name, model folder or ONNX file.")]


@app.command()
def segment(
    input: Annotated[Path, typer.Argument(metavar="INPUT", help="DICOM file, folder or zip; NIfTI file.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the results.")],
    model: ModelName = MODEL,
    series: Annotated[Optional[str], typer.Option(help="SeriesInstanceUID, where the input holds several.")] = None,
    json: Json = None,
) -> None:
    """Segment both hippocampi of a T1 head, or the one of a crop."""
    from apps.medical.bootstrap import open_session
    from apps.medical.service import segment_file

    with open_session(load_settings().settings, model) as session:
        report = segment_file(input, session, out, series)
    results = answers(json)
    for name, volume in report["volumes_ml"].items():
        results.print(f"{name:32} {volume:7.3f} mL")
    for flag in report["flags"]:
        results.print(f"[yellow]check:[/yellow] {flag}")
    console.print(f"results in {out}, {report['seconds']['total']:.1f} s; {report['plan']['backend']} on {report['plan']['device']}")
    write_json(report, json)


@app.command()
def evaluate(
    images: Annotated[Path, typer.Option(metavar="DIR", help="NIfTI images.")],
    labels: Annotated[Path, typer.Option(metavar="DIR", help="Reference label maps with the images' file names.")],
    json: Json = None,
    model: ModelName = MODEL,
    out: Annotated[Optional[Path], typer.Option("--out", metavar="DIR", help="Folder for the label maps, one <case>.nii.gz each.")] = None,
) -> None:
    """Dice, HD95 and volume error of a model against reference label maps."""
    from apps.medical.bootstrap import open_session
    from apps.medical.evaluation.evaluate import case_files, evaluate_case, summarise

    pairs = case_files(images, labels)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with open_session(load_settings().settings, model) as session:
        cases, refused = [], []
        for image, label in progress(pairs, "evaluating", len(pairs)):
            try:
                cases.append(evaluate_case(image, label, session, out))
            except InputError as error:
                refused.append({"case": image.name, "reason": str(error)})
                console.print(f"[yellow]left out[/yellow] {image.name}: {error}")
        plan = msgspec.to_builtins(session.plan)
        name = {"name": session.model.name, "version": session.model.version, "sha256": session.model.sha256}
    if not cases:
        raise InputError(f"no case of {images} can be evaluated; expected images and label maps on one grid")
    metrics = summarise(cases)
    means = metrics["dice"]
    answers(json).print(
        f"{len(cases)} cases: Dice mean {means['mean']:.4f}, anterior {means['anterior']:.4f}, posterior {means['posterior']:.4f}"
    )
    answers(json).print(f"HD95 mean {metrics['hd95_mm']['mean']} mm, volume error mean {metrics['volume_error_percent']['mean']} %")
    result = {"metrics": metrics, "cases": cases, "refused": refused, "model": name, "plan": plan, "host": msgspec.to_builtins(host())}
    write_json(result, json)


@app.command()
def listen() -> None:
    """Receive studies by C-STORE and hand each complete series to the log."""
    from apps.medical.bootstrap import open_medical
    from apps.medical.dicom.files import Instances
    from apps.medical.dicom.network import StorageProvider

    settings = load_settings().settings
    service, log = open_medical(settings)
    allowed = [title.strip() for title in settings.dicom_allowed_ae_titles.split(",") if title.strip()]

    def deliver(instances: Instances, sender: str) -> None:
        service.receive_instances(instances, f"c-store {sender}")

    provider = StorageProvider(
        deliver,
        spool=settings.home_path / "incoming",
        address=settings.dicom_address,
        port=settings.dicom_port,
        ae_title=settings.dicom_ae_title,
        allowed=allowed,
        quiet_seconds=settings.dicom_quiet_seconds,
    )
    with stop_on_signals() as stop:
        try:
            with provider:
                logger.info("ready", extra={"listener": f"{settings.dicom_ae_title}@{settings.dicom_address}:{provider.port}"})
                while not stop.wait(3600):
                    continue
        except OSError as error:
            raise UsageError(
                f"can't listen on {settings.dicom_address}:{settings.dicom_port}: {error}; choose another TRISCOPE_DICOM_PORT"
            ) from error
    log.close()


@app.command()
def worker() -> None:
    """One worker process in the foreground: medical.studies -> segmentation -> medical.results and store."""
    from apps.common.workers import reporting
    from apps.medical.bootstrap import open_medical
    from apps.medical.worker import REPORTS, run_worker

    settings = load_settings().settings
    with reporting(settings, REPORTS), stop_on_signals() as stop:
        service, log = open_medical(settings)
        run_worker(service, log, stop, unfinished=settings.home_path / "unfinished")
        log.close()


app.command(name="stream", hidden=True, help="The same as worker.")(worker)


@app.command()
def submit(
    input: Annotated[Path, typer.Argument(metavar="INPUT", help="DICOM file, folder or zip; NIfTI file.")],
    wait: Annotated[float, typer.Option(help="Seconds to wait for the result; 0 does not wait.")] = 0.0,
    json: Json = None,
) -> None:
    """Hand a study to a running worker through the log."""
    from apps.medical.bootstrap import open_medical
    from apps.medical.store import SETTLED

    service, log = open_medical(load_settings().settings)
    accepted = service.receive(input, "submit")
    deadline = time.monotonic() + wait
    studies = [service.store.get(i) for i in accepted.study_ids]
    while any(s.status not in SETTLED for s in studies) and time.monotonic() < deadline:
        time.sleep(0.2)
        studies = [service.store.get(i) for i in accepted.study_ids]
    for study in studies:
        console.print(f"{study.study_id} {study.status} {study.reason}")
    log.close()
    write_json({"studies": [{"study_id": s.study_id, "status": s.status, "reason": s.reason} for s in studies]}, json)


@app.command()
def train(
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder with images/ and labels/ (NIfTI, equal names).")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the model, the folds and their scores.")],
    folds: Annotated[int, typer.Option(min=0, help="Folds of the cross-validation; 0 for none.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run; 8,000 take 245 s on one NVIDIA H100.")] = 8000,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
) -> None:
    """Train hippocampus-t1 and cross-validate it. Needs the extra 'train'."""
    try:
        import monai  # noqa: F401
        import torch
    except ImportError as error:
        raise UsageError(f"training needs torch and MONAI ({error}); install them with pip install 'triscope[train]'") from error
    if not (data / "images").is_dir() or not (data / "labels").is_dir():
        raise UsageError(f"{data} has no images/ and labels/; expected NIfTI pairs of equal name in these two folders")
    from apps.medical.training.export import write_model
    from apps.medical.training.hippocampus import Recipe
    from apps.medical.training.run import train_all

    recipe = Recipe(steps)
    train_all(data, out / "runs", number=folds, recipe=recipe, device=learning_device(device))
    cards = torch.cuda.device_count() if device != "cpu" else 0
    where = f"{cards} {torch.cuda.get_device_name(0)}" if cards else host().cpu
    write_model(out / "runs", out / MODEL, recipe, f"{where}, torch {torch.__version__}")
    console.print(f"model in {out / MODEL}; copy it to TRISCOPE_HOME/models to use it by name")


@app.command()
def ui(port: Annotated[Optional[int], typer.Option(help="Port of the pages.")] = None) -> None:
    """Serve the pages (all apps together)."""
    from apps.common.ui.server import serve_pages

    settings = load_settings().settings
    serve_pages(settings.ui_address, port or settings.ui_port)
