"""Video files, USB cameras and network streams through OpenCV; a camera that goes away is opened again when it is back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import cv2

from apps.industrial.acquisition.base import Frame
from apps.industrial.errors import SourceError
from apps.industrial.images import png
from pipelines.messages import now_rfc3339

logger = logging.getLogger(__name__)
ANSWER_MS = 5000
"""How long a network camera may take to open, and between two frames, before it counts as gone (OpenCV's own: 30 s)."""


def open_capture(address: Any) -> Any:
    """What OpenCV reads `address` with: a number (USB camera), an address with `://` (through FFmpeg) or a file."""
    if isinstance(address, str) and "://" in address:
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, ANSWER_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, ANSWER_MS]
        return cv2.VideoCapture(address, cv2.CAP_FFMPEG, limits)
    return cv2.VideoCapture(address)


def without_password(address: str) -> str:
    """`rtsp://user:secret@host/path` as `rtsp://***@host/path`: what may stand in logs and messages."""
    scheme, mark, rest = address.partition("://")
    place = urlsplit(address).netloc if mark else ""
    return f"{scheme}://***@{rest[len(place.rpartition('@')[0]) + 1 :]}" if "@" in place else address


class VideoSource:
    """`address`: a video file, a number for a USB camera, or rtsp://... . `live`: reconnect instead of ending."""

    def __init__(
        self,
        address: str,
        *,
        live: bool | None = None,
        retry_seconds: float = 2.0,
        open_capture: Callable[[Any], Any] = open_capture,
    ) -> None:
        self._address: Any = int(address) if address.isdigit() else address
        self._shown = without_password(address)
        self._live = (isinstance(self._address, int) or "://" in address) if live is None else live
        self._retry, self._open = retry_seconds, open_capture
        self.reconnects = 0

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Every frame; serial numbers count up. Raises SourceError where the source can't be opened at first."""
        capture = self._open(self._address)
        if not capture.isOpened():
            raise SourceError(f"can't open {self._shown!r}; expected a video file, a camera number or rtsp://HOST/PATH that answers")
        number = 0
        try:
            while not stop.is_set():
                good, picture = capture.read()
                if good:
                    number += 1
                    pixels = picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
                    yield Frame(png(pixels), now_rfc3339(), f"{number:08d}")
                elif not self._live:
                    return
                else:
                    capture = self._again(capture, stop)
        finally:
            capture.release()

    def _again(self, capture: Any, stop: threading.Event) -> Any:
        logger.warning("the camera does not answer; trying again", extra={"camera": self._shown})
        while not stop.is_set():
            capture.release()
            if stop.wait(self._retry):
                break
            capture = self._open(self._address)
            if capture.isOpened():
                self.reconnects += 1
                logger.info("the camera is back", extra={"camera": self._shown, "reconnects": self.reconnects})
                break
        return capture
