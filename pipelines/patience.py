"""Waiting for a log, a database or blobs that do not answer."""

from __future__ import annotations

import errno
import functools
import logging
import sqlite3
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
Given = TypeVar("Given")
Result = TypeVar("Result")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
AWAY = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PROTOCOL,
}


def away(error: BaseException) -> bool:
    """Whether SQLite can't read or write its file now: the disk is full or gone, or another process holds the file for long."""
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in AWAY


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


def waiting_for_room(handle: Callable[[Given], Result]) -> Callable[[Given], Result]:
    """`handle`, where a disk without room is an outage (UnavailableError) and no fault of what it was given."""

    @functools.wraps(handle)
    def handled(given: Given) -> Result:
        try:
            return handle(given)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise UnavailableError(f"no room on a disk: {error}; make some") from error

    return handled
