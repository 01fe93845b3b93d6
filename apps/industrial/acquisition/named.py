"""Opens the source that a text names, as the command line does."""

from __future__ import annotations

import re
from pathlib import Path

from apps.industrial.acquisition.base import Source
from apps.industrial.acquisition.folder import FolderSource
from apps.industrial.acquisition.generated import GeneratedSource
from apps.industrial.acquisition.genicam import GenicamSource
from apps.industrial.acquisition.upload import LOOPBACK, UploadSource
from apps.industrial.acquisition.video import VideoSource
from apps.industrial.errors import SourceError

KNOWN = (
    "folder:DIR, video:FILE, camera:0, rtsp://..., http:[ADDRESS:]PORT, genicam:FILE.cti (#SERIAL names one of several cameras) "
    "or texture:NAME"
)


def source_named(text: str, *, follow: bool = True, per_second: float = 0.0) -> Source:
    """The source named `KIND:WHERE`. `follow`: a folder's new images; `per_second`: of a texture. Raises SourceError."""
    kind, _, where = text.partition(":")
    if kind == "folder":
        return FolderSource(Path(where), follow=follow)
    if kind in ("video", "camera"):
        return VideoSource(where)
    if kind in ("rtsp", "rtsps"):
        return VideoSource(text)
    if kind == "http":
        address, _, port = where.rpartition(":")
        if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
            raise SourceError(f"source {text[:80]!r}: {port[:40]!r} is no port; expected http:[ADDRESS:]PORT, a number from 1 to 65535")
        return UploadSource(int(port), address or LOOPBACK)
    if kind == "genicam":
        producer, _, serial = where.partition("#")
        return GenicamSource(Path(producer), serial)
    if kind == "texture":
        return GeneratedSource(where, per_second=per_second)
    raise SourceError(f"source {text[:80]!r} is unknown; expected {KNOWN}")
