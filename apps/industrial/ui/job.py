"""A teaching that goes on while the page stays live.

A page's script can't draw anything else while it works, and is thrown away when the operator clicks: the lamp would stand
still for the minutes that a teaching takes, and a click would end the teaching.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from apps.industrial.errors import IndustrialError, InputError
from apps.industrial.learning import Report
from apps.industrial.teaching import Taught

logger = logging.getLogger(__name__)
Work = Callable[[Path, Report], Taught]
"""Teaches from what lies in a folder, which is removed afterwards."""


@dataclass
class Teaching:
    """One teaching: how far it is, then what was taught or what went wrong."""

    recipe: str
    step: str = "reading"
    share: float = 0.0
    taught: Taught | None = None
    error: str = ""

    @property
    def running(self) -> bool:
        """Whether it still goes on."""
        return self.taught is None and not self.error


class TeachingJobs:
    """The teachings of a page server, one at a time: two would share the cores that the station judges on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.latest: Teaching | None = None

    def start(self, teaching: Teaching, folder: Path, work: Work) -> None:
        """Begin; `folder` is removed at the end. Raises InputError while another teaching runs."""
        with self._lock:
            if self.latest is not None and self.latest.running:
                shutil.rmtree(folder, ignore_errors=True)
                raise InputError(f"recipe {self.latest.recipe!r} is being taught; wait for its end, then press Teach again")
            self.latest = teaching
        threading.Thread(target=_run, args=(teaching, folder, work), name="teaching", daemon=True).start()


def new_folder() -> Path:
    """A folder for the pictures of one teaching."""
    return Path(tempfile.mkdtemp(prefix="triscope-teaching-"))


def _run(teaching: Teaching, folder: Path, work: Work) -> None:
    def report(step: str, share: float) -> None:
        teaching.step, teaching.share = step, share

    try:
        teaching.taught = work(folder, report)
    except IndustrialError as error:
        teaching.error = str(error)
    except Exception as error:
        logger.exception("the teaching of recipe %s failed", teaching.recipe)
        teaching.error = f"the teaching failed: {error!r}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
