"""The worker: `medical.studies` -> segmentation -> `medical.results` and the store."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from apps.medical.messages import STUDIES, StudyMessage
from apps.medical.service import MedicalService
from pipelines import Log, Message, PermanentError, Processor
from pipelines.messages import TRACEPARENT

logger = logging.getLogger(__name__)
GROUP = "medical"
REPORTS = {GROUP: STUDIES.name}
"""The group and topic whose counts this worker reports."""


def run_worker(
    service: MedicalService,
    log: Log,
    stop: threading.Event,
    *,
    until_idle: bool = False,
    ready: Callable[[], None] = lambda: None,
    unfinished: Path | None = None,
) -> Processor:
    """Process studies until `stop`, or until the topic is empty; the processor, for its counts. `unfinished`: as the Processor's."""

    def handle(message: Message) -> None:
        if not isinstance(message.payload, StudyMessage):
            raise PermanentError(f"expected a StudyMessage, got {type(message.payload).__name__}")
        service.process(message.payload, TRACEPARENT.get())

    def announce() -> None:
        logger.info("ready", extra={"worker": GROUP, "topic": STUDIES.name})
        ready()

    def given_up(message: Message, reason: str) -> None:
        if isinstance(message.payload, StudyMessage):
            service.give_up(message.payload, reason, TRACEPARENT.get())

    processor = Processor(log, STUDIES, GROUP, handle, given_up=given_up, unfinished=unfinished)
    processor.run(stop, announce, until_idle=until_idle)
    return processor
