"""The worker: `industrial.frames` -> inspection -> `industrial.verdicts` and the store."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from apps.industrial.messages import FRAMES, FrameMessage
from apps.industrial.service import IndustrialService
from pipelines import Log, Message, PermanentError, Processor
from pipelines.messages import TRACEPARENT

logger = logging.getLogger(__name__)
GROUP = "industrial"
REPORTS = {GROUP: FRAMES.name}
"""The group and topic whose counts this worker reports."""


def run_worker(
    service: IndustrialService,
    log: Log,
    stop: threading.Event,
    *,
    until_idle: bool = False,
    ready: Callable[[], None] = lambda: None,
    unfinished: Path | None = None,
) -> Processor:
    """Judge frames until `stop`, or until the topic is empty; the processor, for its counts. `unfinished`: as the Processor's."""

    def handle(message: Message) -> None:
        if not isinstance(message.payload, FrameMessage):
            raise PermanentError(f"expected a FrameMessage, got {type(message.payload).__name__}")
        service.process(message.payload, TRACEPARENT.get())

    def announce() -> None:
        logger.info("ready", extra={"worker": GROUP, "topic": FRAMES.name})
        ready()

    processor = Processor(log, FRAMES, GROUP, handle, unfinished=unfinished)
    processor.run(stop, announce, until_idle=until_idle)
    return processor
