"""The images that a recipe was taught from, kept beside it: it is taught again with what came later, without a folder of then.

A zip archive of pictures as the network sees them, their outlines, and `images.json`.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from apps.industrial.errors import InputError
from apps.industrial.features import MAP, SIZE
from apps.industrial.images import Pixels, png
from shared_runtime.errors import NOT_JSON

FACTS_FILE = "images.json"


@dataclass(frozen=True)
class TaughtImage:
    """What teaching keeps of an image; memory does not grow with the camera's pixels.

    `image`: as `features.shrunk` makes it; `outline`: (MAP, MAP) 0..1 as `Sample.cells`, None where the label alone is known; `aspect`:
    width over height of the whole picture; `side`: as `side_of`; `digest`: of its pixels; `decided`: as `Sample.decided`.
    """

    name: str
    kind: str
    image: Pixels
    outline: NDArray[np.float32] | None
    sharpness: float
    aspect: float
    side: float
    digest: str
    defective: bool
    decided: bool = False


class _Facts(msgspec.Struct, frozen=True):
    name: str
    kind: str
    sharpness: float
    aspect: float
    side: float
    digest: str
    defective: bool
    decided: bool
    outlined: bool


def packed(images: Sequence[TaughtImage]) -> bytes:
    """The archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # PNG is compressed already
        facts = []
        for number, one in enumerate(images):
            archive.writestr(_file(number), png(one.image))
            if one.outline is not None:
                archive.writestr(_outline_file(number), png(np.round(one.outline * 255).astype(np.uint8)))
            labels = one.digest, one.defective, one.decided, one.outline is not None
            facts.append(_Facts(one.name, one.kind, one.sharpness, one.aspect, one.side, *labels))
        archive.writestr(FACTS_FILE, msgspec.json.encode(facts))
    return buffer.getvalue()


def unpacked(content: bytes) -> list[TaughtImage]:
    """What `packed` was given. Raises InputError for what it did not make."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            facts = msgspec.json.decode(archive.read(FACTS_FILE), type=list[_Facts])
            return [_image(archive, number, one) for number, one in enumerate(facts)]
    except (*NOT_JSON, zipfile.BadZipFile, zlib.error, KeyError, EOFError, ValueError, RuntimeError, cv2.error) as error:
        raise InputError(f"the images are damaged: {error}") from error


def _image(archive: zipfile.ZipFile, number: int, facts: _Facts) -> TaughtImage:
    image, outline = _pixels(archive, _file(number), SIZE), None
    if facts.outlined:
        outline = np.asarray(_pixels(archive, _outline_file(number), MAP) / 255, np.float32)
    labels = facts.digest, facts.defective, facts.decided
    return TaughtImage(facts.name, facts.kind, image, outline, facts.sharpness, facts.aspect, facts.side, *labels)


def _pixels(archive: zipfile.ZipFile, name: str, side: int) -> Pixels:
    found = cv2.imdecode(np.frombuffer(archive.read(name), np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.shape[:2] != (side, side):
        raise ValueError(f"{name} is no picture of {side} x {side} pixels")
    return np.asarray(found if found.ndim == 2 else cv2.cvtColor(found, cv2.COLOR_BGR2RGB), np.uint8)


def _file(number: int) -> str:
    return f"{number:06d}.png"


def _outline_file(number: int) -> str:
    return f"{number:06d}_outline.png"
