"""A folder that a camera writes into: each new image once, when it has been written whole."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISREG

from apps.common.files import hidden
from apps.industrial.acquisition.base import Frame
from apps.industrial.errors import SourceError
from apps.industrial.images import MAX_BYTES, SUFFIXES
from pipelines.messages import printable

logger = logging.getLogger(__name__)
MOST_GONE = 100_000
"""Files that were taken and are gone are remembered up to this number: a share that comes back has its files again."""


class FolderSource:
    """Watches `folder`; `follow=False` ends after what lies there now. The file's stem is the part's serial number.

    A file counts as whole once neither its size nor its time has changed between two looks, and as new again where another picture
    is written over it. A folder that goes away (a share, a disk) is waited for.
    """

    def __init__(self, folder: Path, *, follow: bool = True, every: float = 0.5) -> None:
        if not folder.is_dir():
            raise SourceError(f"{folder} is no folder; expected one that images are written into")
        self._folder, self._follow, self._every = folder, follow, every

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """New images in the order of their modification. Raises SourceError where the folder can't be read and `follow` is off."""
        taken: dict[str, tuple[int, int]] = {}
        pictures: dict[str, bytes] = {}
        before: dict[str, tuple[int, int]] = {}
        away = False
        while not stop.is_set():
            try:
                states = self._look()
            except OSError as error:
                if not self._follow:
                    raise SourceError(f"{self._folder} can't be read: {error.strerror}; expected a folder of images") from error
                if not away:
                    logger.warning("%s can't be read: %s; trying again", self._folder, error.strerror)
                away = True
                stop.wait(self._every)
                continue
            if away:
                logger.info("%s is back", self._folder)
                away = False
            fresh = [name for name, state in states.items() if taken.get(name) != state and state[1]]
            whole = [name for name in fresh if not self._follow or before.get(name) == states[name]]
            for name in sorted(whole, key=lambda name: (states[name][0], name)):
                if stop.is_set():
                    return
                taken.pop(name, None)  # to the end: the first are forgotten first
                taken[name] = states[name]
                if (frame := self._read(self._folder / name, states[name][0])) is None:
                    continue
                picture = hashlib.blake2b(frame.content, digest_size=16).digest()
                if pictures.get(name) != picture:  # a new time alone (touch, a copy that sets it late) makes no new picture
                    pictures[name] = picture
                    yield frame
            if not self._follow:
                return
            before = {name: states[name] for name in fresh}
            if len(taken) - len(states) > MOST_GONE:
                gone = [name for name in taken if name not in states]
                for name in gone[: len(gone) - MOST_GONE]:
                    del taken[name]
                    pictures.pop(name, None)
            stop.wait(self._every)

    def _look(self) -> dict[str, tuple[int, int]]:
        """Time [ns] and size of each image in the folder that is not hidden."""
        states = {}
        for path in self._folder.iterdir():
            if path.suffix.lower() in SUFFIXES and not hidden(path):
                with contextlib.suppress(OSError):  # moved away meanwhile
                    state = path.stat()
                    if S_ISREG(state.st_mode):
                        states[path.name] = (state.st_mtime_ns, state.st_size)
        return states

    def _read(self, path: Path, modified: int) -> Frame | None:
        try:
            size = path.stat().st_size
            content = path.read_bytes() if size <= MAX_BYTES else b""
        except OSError as error:
            logger.warning("%s can't be read: %s; it is passed over", path, error.strerror)
            return None
        if not content:
            logger.warning("%s has %d bytes; images of up to %d are read, it is passed over", path, size, MAX_BYTES)
            return None
        return Frame(content, datetime.fromtimestamp(modified / 1e9, UTC).isoformat().replace("+00:00", "Z"), printable(path.stem))
