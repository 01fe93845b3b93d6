"""`triscope demo`: every app at work on the samples that travel with the distribution."""

from __future__ import annotations

import importlib.resources
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from apps.common.command_line import stop_on_signals
from apps.common.errors import TriscopeError
from apps.common.settings import Settings
from apps.common.ui.server import page_server
from apps.common.workers import reporting
from apps.finance.bootstrap import open_finance
from apps.finance.features.schema import LABEL_DELAY
from apps.finance.service import FinanceService
from apps.finance.transactions.generate import Generator, Population
from apps.finance.transactions.replay import replay_table
from apps.finance.worker import REPORTS as FINANCE_REPORTS
from apps.finance.worker import run_worker as run_finance_worker
from apps.industrial.acquisition.generated import GeneratedSource
from apps.industrial.bootstrap import open_industrial
from apps.industrial.errors import IndustrialError
from apps.industrial.evaluation.dataset import Sample
from apps.industrial.images import png
from apps.industrial.service import IndustrialService
from apps.industrial.worker import REPORTS as INDUSTRIAL_REPORTS
from apps.industrial.worker import run_worker as run_industrial_worker
from apps.medical.bootstrap import open_medical
from apps.medical.service import MedicalService
from apps.medical.store import DONE
from apps.medical.worker import REPORTS as MEDICAL_REPORTS
from apps.medical.worker import run_worker
from pipelines import Log
from pipelines.processor import Interrupted
from shared_runtime.host import host, peak_resident_mib

HEAD_SAMPLE = "head_t1_dicom.zip"
CARDS = Population(customers=150, terminals=300)
HISTORY_DAYS, LIVE_DAYS, LIVE_A_SECOND = 40, 10, 3.0
"""Simulated cards: so many days are decided at once, then more come live while the pages are open."""
PART, PART_TEXTURE, GOOD_PARTS, FIRST_PARTS, PARTS_A_SECOND = "demo-brushed", "brushed", 48, 60, 1.0
"""Generated parts of a brushed plate: so many good ones to teach from, so many inspected at once, then more come live."""
CARD_BUDGET, CARD_SEED, CARD_INTENSITY = 5, 4, 4.0


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
            _serve(settings, stop)


def _serve(settings: Settings, stop: threading.Event) -> None:
    """The workers, and live transactions for them, until `stop`."""
    medical, medical_log = open_medical(settings)
    finance, finance_log = open_finance(settings)
    _, live = _cards()
    known = finance.store.known(live["TRANSACTION_ID"].to_list())
    live = live.filter(~pl.col("TRANSACTION_ID").is_in(list(known)))  # those that an earlier demo of today decided
    speed = LIVE_A_SECOND * LIVE_DAYS * 86_400 / max(len(live), 1)
    industrial, industrial_log = open_industrial(settings)
    unfinished = settings.home_path / "unfinished"
    threads = [
        threading.Thread(
            target=run_industrial_worker,
            args=(industrial, industrial_log, stop),
            kwargs={"unfinished": unfinished},
            name="industrial-worker",
        ),
        threading.Thread(target=_live_parts, args=(industrial, stop), name="live-parts"),
        threading.Thread(target=run_finance_worker, args=(finance, finance_log, stop), name="finance-worker"),
        threading.Thread(target=replay_table, args=(live, finance_log), kwargs={"speed": speed, "stop": stop}, name="live-cards"),
    ]
    for thread in threads:
        thread.start()
    try:
        with reporting(settings, {**MEDICAL_REPORTS, **FINANCE_REPORTS, **INDUSTRIAL_REPORTS}):
            run_worker(medical, medical_log, stop, unfinished=unfinished)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        finance.close()
        finance_log.close()
        industrial.close()
        industrial_log.close()
        medical_log.close()


def _summary(settings: Settings, stop: threading.Event, started: float, report: Callable[[str], None]) -> dict[str, Any]:
    service, log = open_medical(settings)
    medical = _medical(service, log, stop, report)
    log.close()
    cards, log = open_finance(settings)
    finance = _finance(cards, log, stop, report)
    cards.close()
    log.close()
    line, log = open_industrial(settings)
    industrial = _industrial(line, log, stop, report)
    line.close()
    log.close()
    return {
        "medical": medical,
        "finance": finance,
        "industrial": industrial,
        "seconds": round(time.monotonic() - started, 2),
        "peak_memory_mib": round(peak_resident_mib(), 1),
        "host": msgspec.to_builtins(host()),
    }


def _go_on(stop: threading.Event) -> None:
    """Raises Interrupted after a worker that was interrupted: what it left undone is no result."""
    if stop.is_set():
        raise Interrupted


def _cards() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Simulated transactions: those of the demo's history, and those that come live. The last day is today."""
    start = datetime.now(UTC).date() - timedelta(days=HISTORY_DAYS + LIVE_DAYS - 1)
    days = list(Generator(CARDS, start, CARD_SEED, CARD_INTENSITY).days(HISTORY_DAYS + LIVE_DAYS))
    tables = (pl.concat(days[:HISTORY_DAYS]), pl.concat(days[HISTORY_DAYS:]))
    name = pl.lit(f"{start:%y%m%d}-") + pl.col("TRANSACTION_ID").cast(pl.String)
    history, live = (table.with_columns(name.alias("TRANSACTION_ID")) for table in tables)
    return history, live


def _finance(service: FinanceService, log: Log, stop: threading.Event, report: Callable[[str], None]) -> dict[str, Any]:
    start = time.monotonic()
    history, _ = _cards()
    report(f"finance: {len(history):,} simulated card transactions through the log, both models and the store ...")
    if service.store.latest() is None:
        service.set_budget(CARD_BUDGET, "demo")
        replay_table(history, log, stop=stop)
    counts = run_finance_worker(service, log, stop, until_idle=True).counts
    _go_on(stop)
    seconds = time.monotonic() - start
    alerts = service.store.alerts(limit=1)
    if not alerts:
        raise TriscopeError("the simulated cards raised no alert; run 'triscope doctor', or the demo again with an empty TRISCOPE_HOME")
    newest = alerts[0].transaction
    found, frauds = service.store.matured(newest.event_us - LABEL_DELAY, 0)
    report(f"finance: {service.store.total():,} decided, {frauds} of {found} alerts with a known label are fraud")
    return {
        "transactions": service.store.total(),
        "decided_now": counts.handled,
        "dead_letters": counts.dead,
        "alerts": sum(number for _, number in service.store.alerts_by_day()),
        "alert_budget": service.store.budget(),
        "matured_alerts": found,
        "matured_alerts_fraud": frauds,
        "newest_alert": {
            "transaction_id": newest.transaction_id,
            "score": round(newest.score, 6),
            "reasons": [r.text for r in newest.message.reasons],
        },
        "model": {s.model.name: s.model.version for s in (service.scorer().boosting, service.scorer().sequence)},
        "plan": {s.model.name: msgspec.to_builtins(s.plan) for s in (service.scorer().boosting, service.scorer().sequence)},
        "stages_seconds": {k: round(v, 3) for k, v in (service.engine().seconds | service.seconds).items()},
        "seconds": round(seconds, 2),
    }


def _live_parts(service: IndustrialService, stop: threading.Event) -> None:
    for frame in GeneratedSource(PART_TEXTURE, per_second=PARTS_A_SECOND, seed=int(time.time())).frames(stop):
        service.submit(frame.content, PART, "demo", frame.serial, "demo", frame.time)


def _ready(service: IndustrialService) -> bool:
    """Whether the demo's recipe is here and was taught with this installation's network."""
    try:
        service.inspector(PART)
    except IndustrialError:
        return False
    return True


def _industrial(service: IndustrialService, log: Log, stop: threading.Event, report: Callable[[str], None]) -> dict[str, Any]:
    start = time.monotonic()
    report(f"industrial: a recipe from {GOOD_PARTS} generated good parts, then {FIRST_PARTS} parts through the log ...")
    if not _ready(service):
        with tempfile.TemporaryDirectory() as folder:
            samples = []
            for number, (image, _) in enumerate(GeneratedSource(PART_TEXTURE, GOOD_PARTS, defect_share=0.0, seed=1).parts()):
                path = Path(folder) / f"{number:03d}.png"
                path.write_bytes(png(image))
                samples.append(Sample(path, "good"))
            service.teach(PART, samples, actor="demo")
    taught = time.monotonic() - start
    sent = {}
    for frame in GeneratedSource(PART_TEXTURE, FIRST_PARTS, seed=2).frames(stop):
        sent[service.submit(frame.content, PART, "demo", frame.serial, "demo", frame.time)] = "-" in frame.serial
    counts = run_industrial_worker(service, log, stop, until_idle=True).counts
    _go_on(stop)
    found = {frame: part.verdict.verdict for frame in sent if (part := service.store.find(frame)) is not None}
    defective = [frame for frame, bad in sent.items() if bad]
    caught = sum(found.get(frame) in ("review", "fail") for frame in defective)
    passed = sum(found.get(frame) == "pass" for frame, bad in sent.items() if not bad)
    report(f"industrial: {caught} of {len(defective)} defective parts held, {passed} of {len(sent) - len(defective)} good ones passed")
    session = service.inspector(PART).session
    return {
        "recipe": PART,
        "parts": len(found),
        "dead_letters": counts.dead,
        "verdicts": {v: sum(x == v for x in found.values()) for v in ("pass", "review", "fail")},
        "defective": len(defective),
        "defective_held": caught,
        "good_passed": passed,
        "model": {session.model.name: session.model.version},
        "plan": {session.model.name: msgspec.to_builtins(session.plan)},
        "stages_seconds": {"teach": round(taught, 3), "inspect": round(time.monotonic() - start - taught, 3)},
        "seconds": round(time.monotonic() - start, 2),
    }


def _medical(service: MedicalService, log: Log, stop: threading.Event, report: Callable[[str], None]) -> dict[str, Any]:
    start = time.monotonic()
    report("medical: a T1 head through the log, the model and the store ...")
    (study_id,) = service.receive(sample(HEAD_SAMPLE), "demo").study_ids
    run_worker(service, log, stop, until_idle=True)
    _go_on(stop)
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
