"""GenICam cameras (GigE Vision, USB3 Vision) through harvesters and the vendor's GenTL producer. Needs the extra `genicam`."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from apps.industrial.acquisition.base import Frame
from apps.industrial.errors import SourceError
from apps.industrial.images import Pixels, png
from pipelines.messages import now_rfc3339

logger = logging.getLogger(__name__)
TIMEOUT_SECONDS, RETRY_SECONDS = 3.0, 2.0
ORDERS: dict[str, tuple[int, int | None]] = {
    "Mono": (1, None),
    "RGB": (3, None),
    "RGBa": (4, cv2.COLOR_RGBA2RGB),
    "BGR": (3, cv2.COLOR_BGR2RGB),
    "BGRa": (4, cv2.COLOR_BGRA2RGB),
    "BayerRG": (1, cv2.COLOR_BayerRGGB2RGB),
    "BayerGR": (1, cv2.COLOR_BayerGRBG2RGB),
    "BayerGB": (1, cv2.COLOR_BayerGBRG2RGB),
    "BayerBG": (1, cv2.COLOR_BayerBGGR2RGB),
}
"""The pixel formats' names before the number of bits: values a pixel, and how OpenCV makes them RGB (the GenICam PFNC's names)."""
ORDERS_422: dict[str, int | None] = {"YUV422_8": cv2.COLOR_YUV2RGB_YUY2, "YUV422_8_UYVY": cv2.COLOR_YUV2RGB_UYVY}


def _harvester() -> Any:
    try:
        from harvesters.core import Harvester
    except ImportError as error:
        raise SourceError(f"GenICam cameras need harvesters ({error}); install it with pip install 'triscope[genicam]'") from error
    return Harvester()


class _LostError(Exception):
    """The camera failed while it was at work."""


class GenicamSource:
    """The first camera, or the one with serial number `serial`, of a GenTL producer (a .cti file). Frames as in `pixels_of`.

    A camera that fails is opened again every `retry_seconds` until it is back.
    """

    def __init__(
        self, producer: Path, serial: str = "", make: Callable[[], Any] = _harvester, *, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        self.producer, self.serial, self._make, self._retry = producer, serial, make, retry_seconds
        self._number = 0
        self.reconnects = 0

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Every frame. Raises SourceError where there is no such camera at first, and for a pixel format that is not read."""
        if not self.producer.is_file():
            raise SourceError(f"{self.producer} is no file; expected the GenTL producer (.cti) that the camera's maker installs")
        harvester = self._make()
        try:
            harvester.add_file(str(self.producer))
            acquirer = self._opened(harvester)
            while not stop.is_set():
                try:
                    yield from self._fetched(acquirer, stop)
                except _LostError as error:
                    logger.warning("the camera behind %s failed: %s; trying again", self.producer, error)
                    acquirer = self._again(harvester, acquirer, stop)
            if acquirer is not None:
                _closed(acquirer)
        finally:
            harvester.reset()

    def _opened(self, harvester: Any) -> Any:
        harvester.update()
        try:
            acquirer = harvester.create({"serial_number": self.serial} if self.serial else 0)
        except (ValueError, IndexError) as error:
            wanted = f"camera {self.serial}" if self.serial else "camera"
            raise SourceError(
                f"no {wanted} behind {self.producer} ({error}); check cable, power and that it is a GenTL producer"
            ) from error
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
            logger.info("the camera is back", extra={"camera": self.serial or str(self.producer), "reconnects": self.reconnects})
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
            if fetched is None:  # a frame of which parts were lost on the way
                logger.warning("an incomplete frame came; it is passed over")
                continue
            with fetched as buffer:
                parts = buffer.payload.components
                pixels = pixels_of(parts[0]) if parts and parts[0] is not None else None
            if pixels is None:
                logger.warning("a frame came without a whole picture; it is passed over")
                continue
            self._number += 1
            yield Frame(png(pixels), now_rfc3339(), f"{self._number:08d}")


def pixels_of(part: Any) -> Pixels | None:
    """(H, W) grey or (H, W, 3) RGB of 8 bits from a component of harvesters: Mono, RGB, BGR (with or without alpha) and Bayer of
    8 to 16 bits, packed or not, and YUV 4:2:2. None where its data are too few. Raises SourceError for any other pixel format.
    """
    name = str(part.data_format)
    found = re.fullmatch(r"([A-Za-z]+?)(8|10|12|14|16)(p|Packed|g\d+)?", name)
    bits = int(found[2]) if found and found[1] in ORDERS else 8
    if name in ORDERS_422:
        each, conversion = 2, ORDERS_422[name]
    elif found and found[1] in ORDERS:
        each, conversion = ORDERS[found[1]]
    else:
        raise SourceError(
            f"the camera sends pixels as {name}; read are Mono, Bayer, RGB and BGR of 8 to 16 bits and YUV422_8: set its PixelFormat"
        )
    values = np.asarray(part.data)
    height, width = int(part.height), int(part.width)
    line = width * each + int(part.x_padding) // values.itemsize
    if values.size != height * width * each:
        if values.size < height * line:
            return None
        values = values[: height * line].reshape(height, line)[:, : width * each]
    values = values.reshape((height, width) if each == 1 else (height, width, each))
    if bits > 8:
        values = np.round(values * np.float32(255 / (2**bits - 1))).clip(0, 255).astype(np.uint8)
    picture = values if conversion is None else cv2.cvtColor(np.ascontiguousarray(values), conversion)
    return np.array(picture, np.uint8)  # the camera writes its next frame where this one was


def _closed(acquirer: Any) -> None:
    """Let go of a camera, which may be gone already."""
    for end in (acquirer.stop, acquirer.destroy):
        try:
            end()
        except Exception as error:  # the producer's own classes again
            logger.debug("closing the camera: %s", error)
