"""`triscope demo`: every app at work on the samples that travel with the distribution."""

from __future__ import annotations

import importlib.resources
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from apps.common.command_line import stop_on_signals
from apps.common.errors import TriscopeError
from apps.common.settings import Settings
from apps.common.ui.server import page_server
from apps.medical.bootstrap import open_medical
from apps.medical.service import MedicalService
from apps.medical.store import DONE
from apps.medical.worker import run_worker
from pipelines import Log
from shared_runtime.host import host

HEAD_SAMPLE = "head_t1_dicom.zip"


def sample(name: str) -> Path:
    """A sample that travels with the distribution."""
    return Path(str(importlib.resources.files("triscope_data"))) / "samples" / name


def run_demo(
    settings: Settings, *, ui: bool, port: int | None, report: Callable[[str], None], publish: Callable[[dict[str, Any]], None]
) -> None:
    """Run the apps on their samples and `publish` the summary, an entry an app; with `ui`, serve the pages until interrupted."""
    started = time.monotonic()
    with stop_on_signals() as stop:
        if not ui:
            publish(_summary(settings, stop, started, report))
            return
        with page_server(settings.ui_address, port or settings.ui_port) as address:
            publish(_summary(settings, stop, started, report))
            report(f"Triscope is at [bold]{address}[/bold] - end with Ctrl-C")
            service, log = open_medical(settings)
            run_worker(service, log, stop)
            log.close()


def _summary(settings: Settings, stop: threading.Event, started: float, report: Callable[[str], None]) -> dict[str, Any]:
    service, log = open_medical(settings)
    medical = _medical(service, log, stop, report)
    log.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "medical": medical,
        "seconds": round(time.monotonic() - started, 2),
        "peak_memory_mib": round(peak, 1),
        "host": msgspec.to_builtins(host()),
    }


def _medical(service: MedicalService, log: Log, stop: threading.Event, report: Callable[[str], None]) -> dict[str, Any]:
    start = time.monotonic()
    report("medical: a T1 head through the log, the model and the store ...")
    (study_id,) = service.receive(sample(HEAD_SAMPLE), "demo").study_ids
    run_worker(service, log, stop, until_idle=True)
    study = service.store.get(study_id)
    if study.status != DONE:
        raise TriscopeError(f"the sample head ended as {study.status!r}: {study.reason or 'interrupted'}; run 'triscope doctor'")
    volumes = study.report["volumes_ml"]
    report(f"medical: left {volumes['left hippocampus']:.2f} mL, right {volumes['right hippocampus']:.2f} mL")
    return {
        "study_id": study_id,
        "status": study.status,
        "volumes_ml": volumes,
        "flags": study.report["flags"],
        "files": study.files,
        "model": study.report["model"],
        "plan": study.report["plan"],
        "stages_seconds": study.report["seconds"],
        "seconds": round(time.monotonic() - start, 2),
    }
