"""Reads images of parts: any common format, depth and channels, with the header checked before anything is decoded."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from apps.industrial.errors import InputError

Pixels = NDArray[np.uint8]
"""(H, W) grey or (H, W, 3) RGB."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm")
MAX_PIXELS, MAX_BYTES, MIN_SIDE = 100_000_000, 512 * 2**20, 16
DARK, FLAT, BLURRED = 6.0, 1.5, 0.35
"""Below these mean grey, deviation, and share of a recipe's usual sharpness a frame says nothing about its part."""


def read_image(path: Path) -> Pixels:
    """The image in a file. Raises InputError for what is no readable image of a sensible size."""
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}; expected an image file") from error
    if size > MAX_BYTES:
        raise InputError(f"{path.name} has {size} bytes; images of up to {MAX_BYTES} are read")
    return decode_image(content, path.name)


def decode_image(content: bytes, name: str = "the image") -> Pixels:
    """The image in `content`, upright as its EXIF says; 16-bit and floats (of 0..1 too) are brought to 8 bits, transparency dropped.

    Raises InputError: no image, truncated, several frames, more than MAX_PIXELS by its header, or smaller than MIN_SIDE.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own remarks on size and metadata; the limits here are stricter
            image = Image.open(io.BytesIO(content))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(f"{name} states {width} x {height} pixels; at most {MAX_PIXELS:,} in all are decoded")
            if min(width, height) < MIN_SIDE:
                raise InputError(f"{name} has {width} x {height} pixels; expected at least {MIN_SIDE} a side")
            if (frames := _frames(image)) > 1:
                raise InputError(f"{name} holds {frames} frames; expected one image: save each to a file of its own")
            return _eight_bits(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        stated = re.search(r"\d+", str(error))
        pixels = f"{int(stated[0]):,}" if stated else "far too many"
        raise InputError(f"{name} states {pixels} pixels; at most {MAX_PIXELS:,} in all are decoded") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(
            f"{name} ({len(content)} bytes) can't be decoded: {str(error)[:120]}; expected a whole PNG, JPEG, TIFF, BMP or WebP"
        ) from error


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


def _eight_bits(image: Image.Image) -> Pixels:
    if image.mode in ("L", "1"):
        return np.asarray(image.convert("L"))
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError("the image holds values that are no numbers; expected finite grey levels")
        limits = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        top = next((limit for limit in limits if values.max() <= limit), float(values.max()))
        return np.clip(values * (255 / top), 0, 255).astype(np.uint8)
    colour = np.asarray(image.convert("RGB"))
    if (colour[..., 0] == colour[..., 1]).all() and (colour[..., 1] == colour[..., 2]).all():
        return np.ascontiguousarray(colour[..., 0])
    return colour


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
    levels = grey(pixels)
    mean, spread = float(levels.mean()), float(levels.std())
    if mean < DARK:
        return f"the frame is black (mean grey {mean:.1f}): check light and camera"
    if spread < FLAT:
        return f"the frame is empty (grey levels within {spread:.1f}): check light, camera and part"
    if usual_sharpness is not None and (sharp := sharpness(pixels)) < BLURRED * usual_sharpness:
        return f"the frame is blurred (sharpness {sharp:.3f}, usual {usual_sharpness:.3f}): check focus and motion"
    return None


def image_files(folder: Path) -> list[Path]:
    """Image files directly in `folder`, sorted by name. Raises InputError where it is no folder."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; expected one with images ({', '.join(SUFFIXES)})")
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())


def png(pixels: Pixels) -> bytes:
    """The image as PNG."""
    ordered = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".png", ordered)[1].tobytes())
