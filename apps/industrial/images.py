"""Reads images of parts: any common format, depth and channels, with the header checked before anything is decoded."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from apps.common.files import visible
from apps.industrial.errors import InputError

Pixels = NDArray[np.uint8]
"""(H, W) grey or (H, W, 3) RGB."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm")
ORIENTATION = 0x112
"""EXIF's tag."""
TIFF = (b"II*\0", b"MM\0*")
MAX_PIXELS, MAX_BYTES, MIN_SIDE = 100_000_000, 512 * 2**20, 16
DEPTHS = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)
"""White of floats, and of integers of 8 to 16 bits: cameras of 10, 12 or 14 bits write files of 16."""
DARK, FLAT, BLURRED = 6.0, 1.5, 0.35
"""Below these mean grey, deviation, and share of a recipe's usual sharpness a frame says nothing about its part."""


def read_image(path: Path, white: float | None = None) -> Pixels:
    """The image in a file, `white` as in `decode_image`. Raises InputError for what is no readable image of a sensible size."""
    return decode_image(_content(path), path.name, white)


def deepest(paths: Iterable[Path]) -> float | None:
    """White of the images of more than 8 bits among these files: the least of DEPTHS that holds all of their values.

    None where there are none. Files that can't be read are passed over.
    """
    largest: float | None = None
    for path in paths:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    with Image.open(path) as image:
                        deep = _deep(image)
                except UnidentifiedImageError:
                    deep = True  # a TIFF of a kind that Pillow does not know, or no image
            if deep:
                largest = max(largest or 0.0, _depth(_opened(_content(path), path.name)))
        except Exception:  # whatever Pillow meets in damaged bytes; who reads the image says it
            continue
    return largest


def _content(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}; expected an image file") from error
    if size > MAX_BYTES:
        raise InputError(f"{path.name} has {size} bytes; images of up to {MAX_BYTES} are read")
    return content


def decode_image(content: bytes, name: str = "the image", white: float | None = None) -> Pixels:
    """The image in `content`, upright as its EXIF says, without transparency. Integers of more than 8 bits and floats are brought to
    8 bits: `white` becomes 255; without it the least of DEPTHS that holds the image's own values.

    Raises InputError: no image, truncated, several frames, more than MAX_PIXELS by its header, or smaller than MIN_SIDE.
    """
    values = _opened(content, name)
    if values.dtype == np.uint8:
        return values
    levels = values.astype(np.float32) * (255 / (white or _depth(values)))
    return np.clip(np.round(levels), 0, 255).astype(np.uint8)


def _depth(values: NDArray[Any]) -> float:
    """The least of DEPTHS that holds these values, or the largest of them; 1 is white of floats alone."""
    largest = float(values.max())
    return next((depth for depth in DEPTHS if largest <= depth and (depth > 1 or values.dtype.kind == "f")), largest)


def _opened(content: bytes, name: str) -> NDArray[Any]:
    """(H, W) or (H, W, 3) of the depth that the file has. Raises InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own remarks on size and metadata; the limits here are stricter
            try:
                image = Image.open(io.BytesIO(content))
            except UnidentifiedImageError:
                if content[:4] not in TIFF:
                    raise
                return _wide(content, name)
            _refuse_size(*image.size, name)
            _refuse_frames(_frames(image), name)
            return _values(image, content)
    except Image.DecompressionBombError as error:
        stated = re.search(r"\d+", str(error))
        pixels = f"{int(stated[0]):,}" if stated else "far too many"
        raise InputError(f"{name} states {pixels} pixels; at most {MAX_PIXELS:,} in all are decoded") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} ({len(content)} bytes) can't be decoded: no image of a known format; expected a whole PNG, JPEG, TIFF, BMP or WebP"
        ) from error
    except InputError:
        raise
    except Exception as error:  # whatever Pillow and OpenCV meet in damaged bytes
        raise InputError(
            f"{name} ({len(content)} bytes) can't be decoded: {str(error)[:120]}; expected a whole PNG, JPEG, TIFF, BMP or WebP"
        ) from error


def _refuse_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(f"{name} states {width} x {height} pixels; at most {MAX_PIXELS:,} in all are decoded")
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{name} has {width} x {height} pixels; expected at least {MIN_SIDE} a side")


def _refuse_frames(frames: int, name: str) -> None:
    if frames > 1:
        raise InputError(f"{name} holds {frames} frames; expected one image: save each to a file of its own")


def _frames(image: Image.Image) -> int:
    """How many frames a file of a format for several holds; a second one of another size is a preview and does not count."""
    count = int(getattr(image, "n_frames", 1)) if image.format in ("TIFF", "GIF", "PNG", "WEBP") else 1
    if count == 1:
        return 1
    size = image.size
    image.seek(1)
    same = image.size == size
    image.seek(0)
    return count if same else 1


def _values(image: Image.Image, content: bytes) -> NDArray[Any]:
    if image.mode in ("RGB", "RGBA") and _deep(image):  # Pillow keeps 8 bits of each channel
        image.load()  # a truncated file is an error; OpenCV would fill it up
        read = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        if read is not None and read.dtype == np.uint16 and read.ndim == 3:
            return _plain(_upright(read[..., 2::-1], image.getexif().get(ORIENTATION, 1)))
        return _plain(np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(np.uint16) * 257)  # as bright, in coarser steps
    image = ImageOps.exif_transpose(image)
    if image.mode in ("L", "1"):
        return np.asarray(image.convert("L"))
    if image.mode.startswith("I") or image.mode == "F":
        return _levels(np.asarray(image))
    return _plain(np.asarray(image.convert("RGB")))


def _wide(content: bytes, name: str) -> NDArray[Any]:
    """A TIFF of a kind that Pillow does not know and OpenCV does: colour of 32 bits or of floats, signed colour, floats of 64 bits.

    Its directory is looked at before anything is decoded: OpenCV fills up what is cut off.
    """
    stream = io.BytesIO(content)
    try:
        directory = ImageFileDirectory_v2(content[:8])
        first = directory.next
        stream.seek(first)
        directory.load(stream)
        width, height = int(directory[TiffImagePlugin.IMAGEWIDTH]), int(directory[TiffImagePlugin.IMAGELENGTH])
        tiled = TiffImagePlugin.TILEOFFSETS in directory
        offsets = directory[TiffImagePlugin.TILEOFFSETS if tiled else TiffImagePlugin.STRIPOFFSETS]
        counts = directory[TiffImagePlugin.TILEBYTECOUNTS if tiled else TiffImagePlugin.STRIPBYTECOUNTS]
        end = max(start + size for start, size in zip(offsets, counts, strict=True))
    except Exception as error:  # whatever Pillow meets in damaged bytes
        raise UnidentifiedImageError from error
    _refuse_size(width, height, name)
    if end > len(content) or directory.next == first:
        raise OSError("image file is truncated")
    _refuse_frames(2 if directory.next else 1, name)
    try:
        read = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise UnidentifiedImageError from error
    if read is None:
        raise UnidentifiedImageError
    values = _upright(read if read.ndim == 2 else _plain(read[..., 2::-1]), directory.get(ORIENTATION, 1))
    return _levels(values)


def _levels(values: NDArray[Any]) -> NDArray[Any]:
    """Floats of 32 bits, integers without those below 0. Raises InputError for what is no number."""
    if values.dtype == np.float64:
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError("the image holds values that are no numbers; expected finite grey levels")
    return values if values.dtype.kind == "f" else np.maximum(values, 0).astype(np.uint32)


def _deep(image: Image.Image) -> bool:
    """Whether the file has more than 8 bits a channel, by its header."""
    return image.mode[0] in "IF" or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _plain(colour: NDArray[Any]) -> NDArray[Any]:
    """One channel where all three are equal."""
    if (colour[..., 0] == colour[..., 1]).all() and (colour[..., 1] == colour[..., 2]).all():
        return np.ascontiguousarray(colour[..., 0])
    return colour


def _upright(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """As ImageOps.exif_transpose, for an array."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return np.ascontiguousarray(values)


def grey(pixels: Pixels) -> Pixels:
    """(H, W) of either kind."""
    return pixels if pixels.ndim == 2 else np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)


def sharpness(pixels: Pixels) -> float:
    """Strength of fine detail relative to contrast, without noise: deviation of the Laplacian of a smoothed 256-pixel view."""
    view = cv2.resize(grey(pixels), (256, 256), interpolation=cv2.INTER_AREA).astype(np.float32)
    view = np.asarray(cv2.GaussianBlur(view, (0, 0), 1.0), np.float32)
    return float(cv2.Laplacian(view, cv2.CV_32F).std() / (view.std() + 4.0))


def unusable(pixels: Pixels, usual_sharpness: float | None = None) -> str | None:
    """Why a frame can't be judged, in words; None where it can."""
    mean, spread = (float(value[0, 0]) for value in cv2.meanStdDev(grey(pixels)))
    if mean < DARK:
        return f"the frame is black (mean grey {mean:.1f}): check light and camera"
    if spread < FLAT:
        return f"the frame is empty (grey levels within {spread:.1f}): check light, camera and part"
    if usual_sharpness is not None and (sharp := sharpness(pixels)) < BLURRED * usual_sharpness:
        return f"the frame is blurred (sharpness {sharp:.3f}, usual {usual_sharpness:.3f}): check focus and motion"
    return None


def image_files(folder: Path) -> list[Path]:
    """Image files directly in `folder` that are not hidden, sorted by name. Raises InputError where it is no folder."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; expected one with images ({', '.join(SUFFIXES)})")
    return visible(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())


def png(pixels: Pixels) -> bytes:
    """The image as PNG."""
    ordered = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".png", ordered)[1].tobytes())
