"""GenICam cameras (GigE Vision, USB3 Vision) through harvesters and the vendor's GenTL producer. Needs the extra `genicam`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from apps.industrial.acquisition.base import Frame
from apps.industrial.errors import SourceError
from apps.industrial.images import png
from pipelines.messages import now_rfc3339

logger = logging.getLogger(__name__)
TIMEOUT_SECONDS, RETRY_SECONDS = 3.0, 2.0


def _harvester() -> Any:
    try:
        from harvesters.core import Harvester
    except ImportError as error:
        raise SourceError(f"GenICam cameras need harvesters ({error}); install it with pip install 'triscope[genicam]'") from error
    return Harvester()


class _LostError(Exception):
    """The camera failed while it was at work."""


class GenicamSource:
    """The first camera, or the one with serial number `serial`, of a GenTL producer (a .cti file). Mono8 and RGB8 frames.

    A camera that fails is opened again every `retry_seconds` until it is back.
    """

    def __init__(
        self, producer: Path, serial: str = "", make: Callable[[], Any] = _harvester, *, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        self._producer, self._serial, self._make, self._retry = producer, serial, make, retry_seconds
        self._number = 0
        self.reconnects = 0

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Every frame. Raises SourceError where there is no such camera at first."""
        harvester = self._make()
        try:
            harvester.add_file(str(self._producer))
            acquirer = self._opened(harvester)
            while not stop.is_set():
                try:
                    yield from self._fetched(acquirer, stop)
                except _LostError as error:
                    logger.warning("the camera behind %s failed: %s; trying again", self._producer, error)
                    acquirer = self._again(harvester, acquirer, stop)
            if acquirer is not None:
                _closed(acquirer)
        finally:
            harvester.reset()

    def _opened(self, harvester: Any) -> Any:
        harvester.update()
        try:
            acquirer = harvester.create({"serial_number": self._serial} if self._serial else 0)
        except (ValueError, IndexError) as error:
            raise SourceError(f"no camera {self._serial or 'at all'} behind {self._producer}: {error}; check cable and producer") from error
        acquirer.start()
        return acquirer

    def _again(self, harvester: Any, acquirer: Any, stop: threading.Event) -> Any:
        _closed(acquirer)
        while not stop.wait(self._retry):
            try:
                acquirer = self._opened(harvester)
            except SourceError:
                continue
            self.reconnects += 1
            logger.info("the camera is back", extra={"camera": self._serial or str(self._producer), "reconnects": self.reconnects})
            return acquirer
        return None

    def _fetched(self, acquirer: Any, stop: threading.Event) -> Iterator[Frame]:
        while not stop.is_set():
            try:
                fetched = acquirer.fetch(timeout=TIMEOUT_SECONDS)
            except Exception as error:  # harvesters raises its producer's own classes
                if "timeout" not in type(error).__name__.lower():
                    raise _LostError(str(error)) from error
                logger.warning("no frame within %.0f s", TIMEOUT_SECONDS)
                continue
            with fetched as buffer:
                part = buffer.payload.components[0]
                channels = max(1, part.data.size // (part.width * part.height))
                shape = (part.height, part.width) if channels == 1 else (part.height, part.width, channels)
                pixels = np.array(part.data, np.uint8).reshape(shape)
            self._number += 1
            yield Frame(png(pixels), now_rfc3339(), f"{self._number:08d}")


def _closed(acquirer: Any) -> None:
    """Let go of a camera, which may be gone already."""
    for end in (acquirer.stop, acquirer.destroy):
        try:
            end()
        except Exception as error:  # the producer's own classes again
            logger.debug("closing the camera: %s", error)
