"""Waiting for a log or a database that does not answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pipelines.errors import UnavailableError

logger = logging.getLogger(__name__)
AGAIN_SECONDS = 1.0
"""After so long what did not answer is asked again."""
SAID_SECONDS = 30.0
"""So often it is said that something is waited for."""
Result = TypeVar("Result")


def patiently(act: Callable[[], Result], stop: threading.Event | None) -> Result:
    """What `act` returns, which is called again while something does not answer, until `stop` is set; once where there is no `stop`.

    `act` must bear a repetition. Raises UnavailableError.
    """
    said = -SAID_SECONDS
    while True:
        try:
            return act()
        except UnavailableError as error:
            if stop is None or stop.is_set():
                raise
            if time.monotonic() - said >= SAID_SECONDS:
                said = time.monotonic()
                logger.warning("waiting, nothing is lost: %s", error)
            stop.wait(AGAIN_SECONDS)
