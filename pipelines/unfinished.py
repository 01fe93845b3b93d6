"""Which record a process was handling when it ended: one that ends whoever takes it must not stop the line for ever."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path

import msgspec

from pipelines.errors import NOT_JSON
from pipelines.transport.base import Record


class _Note(msgspec.Struct):
    """`times`: how often a process began with the record at `offset`, and did not come to its end."""

    offset: int
    times: int


class Unfinished:
    """Notes in `folder`, a file a partition, of the record that is being handled; none where `folder` is None.

    A note that can't be written is left out: it guards against a rare case, and nothing depends on it.
    """

    def __init__(self, folder: Path | None, group: str) -> None:
        self._folder, self._group = folder, group

    def begin(self, record: Record) -> int:
        """Note `record`; how many processes ended while they handled it."""
        if self._folder is None:
            return 0
        file = self._file(record)
        times = 0
        with contextlib.suppress(OSError, *NOT_JSON):
            note = msgspec.json.decode(file.read_bytes(), type=_Note)
            times = note.times if note.offset == record.offset else 0
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{uuid.uuid4().hex}")
            part.write_bytes(msgspec.json.encode(_Note(record.offset, times + 1)))
            part.replace(file)
        return times

    def end(self, record: Record) -> None:
        """The record was handled, or is given back alive."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._file(record).unlink(missing_ok=True)

    def _file(self, record: Record) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._group}-{record.topic}-{record.partition}.json"
