"""Wires the finance app from settings. Nothing else does."""

from __future__ import annotations

import shared_runtime as rt
from apps.common.database import open_database
from apps.common.settings import Settings
from apps.finance.messages import TOPICS
from apps.finance.scoring.combination import Combination
from apps.finance.scoring.reasons import Explainer
from apps.finance.scoring.scorer import BOOSTING, SEQUENCE, FraudScorer
from apps.finance.service import FinanceService
from apps.finance.store import FinanceStore
from pipelines import Log, open_log
from shared_runtime.host import usable_cores
from shared_runtime.repository.store import ModelRepository, shipped_models

THREADS = 1
"""The models are small: a second thread costs more to wake than it computes."""


def open_scorer(settings: Settings) -> FraudScorer:
    """Both models in sessions on the settings' device: those of this installation, else the shipped ones."""
    repository = ModelRepository((settings.home_path / "models", shipped_models()))
    boosting, sequence = (rt.load(name, repository=repository) for name in (BOOSTING, SEQUENCE))
    plans = settings.home_path / "plans"
    explainer = Explainer(
        boosting.graph.parent, str(boosting.card.get("native", {}).get("sha256")), settings.model_threads or usable_cores()
    )
    return FraudScorer(
        rt.Session(boosting, settings.device, threads=THREADS, plans=plans),
        rt.Session(sequence, settings.device, threads=THREADS, plans=plans),
        Combination.read(boosting.graph.parent),
        explainer,
    )


def open_finance(settings: Settings, log: Log | None = None) -> tuple[FinanceService, Log]:
    """The service, with its topics made, and its log."""
    log = log or open_log(settings.log_url)
    for topic in TOPICS:
        topic.create(log)
    store = FinanceStore(open_database(settings.database_url))
    currencies = tuple(code.strip() for code in settings.finance_currencies.split(",") if code.strip())
    return FinanceService(log, store, lambda: open_scorer(settings), currencies), log
