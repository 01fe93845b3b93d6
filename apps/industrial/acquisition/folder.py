"""A folder that a camera writes into: each new image once, when it has been written whole."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from apps.industrial.acquisition.base import Frame
from apps.industrial.errors import SourceError
from apps.industrial.images import MAX_BYTES, SUFFIXES

logger = logging.getLogger(__name__)


class FolderSource:
    """Watches `folder`; `follow=False` ends after what lies there now. The file's stem is the part's serial number.

    A file counts as whole once its size has not changed between two looks.
    """

    def __init__(self, folder: Path, *, follow: bool = True, every: float = 0.5) -> None:
        if not folder.is_dir():
            raise SourceError(f"{folder} is no folder; expected one that images are written into")
        self._folder, self._follow, self._every = folder, follow, every

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """New images in the order of their modification."""
        seen: set[str] = set()
        sizes: dict[str, int] = {}
        while not stop.is_set():
            fresh = []
            for path in self._folder.iterdir():
                if path.name in seen or path.suffix.lower() not in SUFFIXES:
                    continue
                try:
                    state = path.stat()
                except OSError:
                    continue
                if state.st_size and (not self._follow or sizes.get(path.name) == state.st_size):
                    fresh.append((state.st_mtime, path))
                sizes[path.name] = state.st_size
            for modified, path in sorted(fresh):
                if stop.is_set():
                    return
                seen.add(path.name)
                sizes.pop(path.name, None)
                try:
                    size = path.stat().st_size
                    content = path.read_bytes() if size <= MAX_BYTES else b""
                except OSError as error:
                    logger.warning("%s can't be read: %s; it is passed over", path, error.strerror)
                    continue
                if not content:
                    logger.warning("%s has %d bytes; images of up to %d are read, it is passed over", path, size, MAX_BYTES)
                    continue
                yield Frame(content, datetime.fromtimestamp(modified, UTC).isoformat().replace("+00:00", "Z"), path.stem)
            if not self._follow:
                return
            stop.wait(self._every)
