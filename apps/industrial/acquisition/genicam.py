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
TIMEOUT_SECONDS = 3.0


def _harvester() -> Any:
    try:
        from harvesters.core import Harvester
    except ImportError as error:
        raise SourceError(f"GenICam cameras need harvesters ({error}); install it with pip install 'triscope[genicam]'") from error
    return Harvester()


class GenicamSource:
    """The first camera, or the one with serial number `serial`, of a GenTL producer (a .cti file). Mono8 and RGB8 frames."""

    def __init__(self, producer: Path, serial: str = "", make: Callable[[], Any] = _harvester) -> None:
        self._producer, self._serial, self._make = producer, serial, make

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Every frame. Raises SourceError where there is no such camera."""
        harvester = self._make()
        try:
            harvester.add_file(str(self._producer))
            harvester.update()
            wanted = {"serial_number": self._serial} if self._serial else 0
            try:
                acquirer = harvester.create(wanted)
            except (ValueError, IndexError) as error:
                raise SourceError(
                    f"no camera {self._serial or 'at all'} behind {self._producer}: {error}; check cable and producer"
                ) from error
            acquirer.start()
            try:
                yield from self._fetched(acquirer, stop)
            finally:
                acquirer.stop()
                acquirer.destroy()
        finally:
            harvester.reset()

    def _fetched(self, acquirer: Any, stop: threading.Event) -> Iterator[Frame]:
        number = 0
        while not stop.is_set():
            try:
                buffer = acquirer.fetch(timeout=TIMEOUT_SECONDS)
            except Exception as error:  # harvesters raises its producer's own classes
                if "timeout" not in type(error).__name__.lower():
                    raise SourceError(f"the camera behind {self._producer} failed: {error}; check cable and producer") from error
                logger.warning("no frame within %.0f s", TIMEOUT_SECONDS)
                continue
            with buffer:
                part = buffer.payload.components[0]
                channels = max(1, part.data.size // (part.width * part.height))
                shape = (part.height, part.width) if channels == 1 else (part.height, part.width, channels)
                pixels = np.array(part.data, np.uint8).reshape(shape)
            number += 1
            yield Frame(png(pixels), now_rfc3339(), f"{number:08d}")
