"""Folders that are replaced whole while others read them."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)
Read = TypeVar("Read")
MOMENT_SECONDS, ABSENT_SECONDS, MOST_SECONDS = 0.005, 0.1, 2.0
"""Between two attempts; a folder that is not there for so long is none; so long one that goes on being replaced is tried."""


def replace_folder(part: Path, target: Path) -> None:
    """Move the finished folder `part` to `target`, in place of what is there; safe beside another process that does the same."""
    for _ in range(100):
        if _moved(part, target):
            return
        old = Path(tempfile.mkdtemp(prefix=".old-", dir=target.parent))
        try:
            os.rename(target, old)
        except OSError:
            logger.debug("another process moved %s", target)
        moved = _moved(part, target)  # before the old one is taken away, which takes its time
        shutil.rmtree(old, ignore_errors=True)
        if moved:
            return
    raise OSError(f"can't replace the folder {target}: other processes keep writing it")


def _moved(part: Path, target: Path) -> bool:
    """Whether `part` became `target`; False where that is there."""
    try:
        os.rename(part, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def settled(folders: Sequence[Path], read: Callable[[], Read]) -> Read:
    """What `read` gives, which reads one of `folders`; again where that was replaced meanwhile.

    While `replace_folder` is at work there is no folder for a moment, and what is read of it may be of either. What `read` raises of a
    folder that stays is raised.
    """
    before, begun = [state_of(folder) for folder in folders], time.monotonic()
    while True:
        try:
            return read()
        except Exception:
            time.sleep(MOMENT_SECONDS)
            now, passed = [state_of(folder) for folder in folders], time.monotonic() - begun
            if passed > (MOST_SECONDS if any(now) else ABSENT_SECONDS) or (any(now) and now == before):
                raise
            before = now


def state_of(path: Path) -> tuple[int, int] | None:
    """Tells a folder, or a file, from the one that takes its place; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns
