"""The worker: `industrial.frames` -> inspection -> `industrial.verdicts` and the store."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from apps.industrial.messages import FRAMES, FrameMessage
from apps.industrial.service import IndustrialService, checked_days
from pipelines import Log, Message, PermanentError, Processor, UnavailableError
from pipelines.messages import TRACEPARENT

logger = logging.getLogger(__name__)
GROUP = "industrial"
REPORTS = {GROUP: FRAMES.name}
"""The group and topic whose counts this worker reports."""
TIDY_SECONDS = 3600.0


def run_worker(
    service: IndustrialService,
    log: Log,
    stop: threading.Event,
    *,
    until_idle: bool = False,
    ready: Callable[[], None] = lambda: None,
    unfinished: Path | None = None,
    keep_days: float = 0,
) -> Processor:
    """Judge frames until `stop`, or until the topic is empty; the processor, for its counts. `unfinished`: as the Processor's;
    `keep_days`: pictures of parts that passed earlier are deleted, every hour; 0 keeps them."""

    def handle(message: Message) -> None:
        if not isinstance(message.payload, FrameMessage):
            raise PermanentError(f"expected a FrameMessage, got {type(message.payload).__name__}")
        service.process(message.payload, TRACEPARENT.get())

    def announce() -> None:
        logger.info("ready", extra={"worker": GROUP, "topic": FRAMES.name})
        ready()

    processor = Processor(log, FRAMES, GROUP, handle, unfinished=unfinished)
    with _tidied(service, keep_days):
        processor.run(stop, announce, until_idle=until_idle)
    return processor


@contextmanager
def _tidied(service: IndustrialService, days: float) -> Iterator[None]:
    """Delete old pictures every hour inside the block, in a thread."""
    if not days:
        yield
        return
    checked_days(days)
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            try:
                service.tidy(days, ended)
            except UnavailableError as error:
                logger.warning("pictures were not deleted: %s", error)
            except Exception:
                logger.exception("pictures were not deleted")
            ended.wait(TIDY_SECONDS)

    thread = threading.Thread(target=work, name="tidy")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
