"""Wires the industrial app together from the settings."""

from __future__ import annotations

from pathlib import Path

import shared_runtime as rt
from apps.common.blobs import BlobStore
from apps.common.database import open_database
from apps.common.settings import Settings
from apps.industrial.features import MODEL
from apps.industrial.inspection.inspector import BATCH
from apps.industrial.inspection.recipe import RecipeBook
from apps.industrial.messages import TOPICS
from apps.industrial.service import IndustrialService
from apps.industrial.store import IndustrialStore
from pipelines import Log, open_log
from shared_runtime.repository.store import ModelRepository, shipped_models


def open_session(settings: Settings, model: Path | None = None) -> rt.Session:
    """A session of a model folder, or of the texture network of this installation, on the settings' device and threads."""
    repository = ModelRepository((settings.home_path / "models", shipped_models()))
    loaded = rt.load(MODEL, repository=repository) if model is None else rt.load(model)
    plans = settings.home_path / "plans"
    return rt.Session(loaded, settings.device, threads=settings.model_threads, plans=plans, ladder=(1, BATCH))


def open_recipes(settings: Settings) -> RecipeBook:
    """The recipes of this installation."""
    return RecipeBook(settings.home_path / "recipes")


def open_industrial(settings: Settings, log: Log | None = None) -> tuple[IndustrialService, Log]:
    """The service, with its topics made, and its log."""
    log = log or open_log(settings.log_url)
    for topic in TOPICS:
        topic.create(log)
    store = IndustrialStore(open_database(settings.database_url))
    service = IndustrialService(
        log, store, BlobStore(settings.blob_url), open_recipes(settings), lambda model: open_session(settings, model)
    )
    return service, log
