"""Wires the medical app from settings. Nothing else does."""

from __future__ import annotations

import shared_runtime as rt
from apps.common.blobs import BlobStore
from apps.common.database import open_database
from apps.common.settings import Settings
from apps.medical.messages import TOPICS
from apps.medical.segmentation.window import MODEL
from apps.medical.service import MedicalService
from apps.medical.store import MedicalStore
from pipelines import Log, open_log
from shared_runtime.repository.store import ModelRepository, shipped_models

PLAN_SECONDS = 2.0
"""A window takes tenths of a second: a few rounds of one tell the engines apart, and the first study waits for the plan."""


def open_session(settings: Settings, model: str = MODEL) -> rt.Session:
    """A session of a model by name or path, on the settings' device."""
    repository = ModelRepository((settings.home_path / "models", shipped_models()))
    loaded = rt.load(model, repository=repository)
    plans = settings.home_path / "plans"
    return rt.Session(loaded, settings.device, threads=settings.model_threads, plans=plans, ladder=(1,), budget_s=PLAN_SECONDS)


def open_medical(settings: Settings, log: Log | None = None) -> tuple[MedicalService, Log]:
    """The service, with its topics made, and its log."""
    log = log or open_log(settings.log_url)
    for topic in TOPICS:
        topic.create(log)
    store = MedicalStore(open_database(settings.database_url))
    return MedicalService(log, store, BlobStore(settings.blob_url), lambda: open_session(settings)), log
