"""Video files, USB cameras and network streams through OpenCV; a camera that goes away is opened again when it is back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import cv2

from apps.industrial.acquisition.base import Frame
from apps.industrial.errors import SourceError
from apps.industrial.images import png
from pipelines.messages import now_rfc3339

logger = logging.getLogger(__name__)


class VideoSource:
    """`address`: a video file, a number for a USB camera, or rtsp://... . `live`: reconnect instead of ending."""

    def __init__(
        self,
        address: str,
        *,
        live: bool | None = None,
        retry_seconds: float = 2.0,
        open_capture: Callable[[Any], Any] = cv2.VideoCapture,
    ) -> None:
        self._address: Any = int(address) if address.isdigit() else address
        self._live = (isinstance(self._address, int) or "://" in address) if live is None else live
        self._retry, self._open = retry_seconds, open_capture
        self.reconnects = 0

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Every frame; serial numbers count up. Raises SourceError where the source can't be opened at first."""
        capture = self._open(self._address)
        if not capture.isOpened():
            raise SourceError(f"can't open {self._address!r}; expected a video file, a camera number or rtsp://HOST/PATH that answers")
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
        logger.warning("the camera does not answer; trying again", extra={"camera": str(self._address)})
        while not stop.is_set():
            capture.release()
            if stop.wait(self._retry):
                break
            capture = self._open(self._address)
            if capture.isOpened():
                self.reconnects += 1
                logger.info("the camera is back", extra={"camera": str(self._address), "reconnects": self.reconnects})
                break
        return capture
