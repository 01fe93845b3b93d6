"""Data sets in the MVTec layout: `train/good`, `test/KIND`, `ground_truth/KIND/NAME_mask.png`; boxes and labels alone as well."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from apps.common.files import visible
from apps.industrial.errors import InputError
from apps.industrial.features import MAP
from apps.industrial.images import Pixels, image_files, read_image

GOOD, TRUTH = "good", "ground_truth"
BOXES_FILE = "boxes.csv"
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """One image of a data set. `mask`: its file, or None; `boxes`: x, y, width, height in pixels where there is no mask; `decided`: whether
    an operator found it good at the line; `called`: its name for the operator, where that is not the file's."""

    path: Path
    kind: str
    mask: Path | None = None
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    decided: bool = False
    called: str = ""

    @property
    def name(self) -> str:
        """What the operator calls it."""
        return self.called or self.path.name

    @property
    def defective(self) -> bool:
        """Whether it is labelled as defective."""
        return self.kind != GOOD

    def read(self, white: float | None = None) -> Pixels:
        """The image, `white` as in `decode_image`."""
        return read_image(self.path, white)

    def cells(self, shape: tuple[int, ...]) -> Array | None:
        """The defect on the map's grid (MAP, MAP), 0..1, for an image of `shape`; None where only the label is known.

        An empty mask of a defective image counts as unknown: a defect that no one outlined.
        """
        if not self.defective:
            return np.zeros((MAP, MAP), np.float32)
        if self.mask is not None:
            mask = read_image(self.mask)
            levels = mask if mask.ndim == 2 else mask.max(axis=2)
            outline = levels >= 128 if levels.max() >= 128 else levels > 0  # 0 and 1, or numbers of kinds
            if outline.shape != tuple(shape[:2]):
                raise InputError(f"mask {self.mask} has shape {list(outline.shape)}, its image {list(shape[:2])}; expected equal ones")
        elif self.boxes:
            outline = np.zeros(shape[:2], bool)
            for x, y, w, h in self.boxes:
                outline[max(0, round(y)) : max(0, round(y + h)), max(0, round(x)) : max(0, round(x + w))] = True
            if not outline.any():
                raise InputError(f"the boxes of {self.path.name} {list(self.boxes)} lie outside of its {shape[1]} x {shape[0]} pixels")
        else:
            return None
        if not outline.any():
            return None
        return np.asarray(cv2.resize(outline.astype(np.float32), (MAP, MAP), interpolation=cv2.INTER_AREA), np.float32)


def good_samples(folder: Path) -> list[Sample]:
    """The images in a folder of good parts. Raises InputError where there is none."""
    found = [Sample(path, GOOD) for path in image_files(folder)]
    if not found:
        raise InputError(f"{folder} holds no image; expected pictures of good parts")
    return found


def labelled_samples(dataset: Path, *, defects_only: bool = False) -> list[Sample]:
    """`test/KIND` of a data set, sorted by kind and name, with masks from `ground_truth` or boxes from `boxes.csv`.

    `boxes.csv`: file (as KIND/NAME), x, y, width, height. Raises InputError where there are no images.
    """
    root = dataset / "test"
    if not root.is_dir():
        raise InputError(f"{dataset} has no folder 'test'; expected test/KIND with images, ground_truth/KIND with masks")
    boxes = _boxes(dataset / BOXES_FILE)
    found = []
    for folder in visible(p for p in root.iterdir() if p.is_dir()):
        if defects_only and folder.name == GOOD:
            continue
        images = image_files(folder)
        masks = {} if folder.name == GOOD else _masks(dataset / TRUTH / folder.name, images)
        found += [Sample(path, folder.name, masks.get(path.name), boxes.get(f"{folder.name}/{path.name}", ())) for path in images]
    if not found:
        raise InputError(f"{root} holds no images; expected test/KIND with images")
    if astray := sorted(name for name in boxes if not (root / name).is_file()):
        raise InputError(
            f"{dataset / BOXES_FILE} names {len(astray)} files that are not below {root}, such as {astray[0]}; expected KIND/NAME"
        )
    return found


def digest(path: Path) -> bytes:
    """What a copy of the file under another name shares with it; its path where it can't be read: who reads the image says why."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return str(path).encode()


def _masks(folder: Path, images: Sequence[Path]) -> dict[str, Path]:
    """The outlines of images by name: NAME_mask or NAME with any suffix of an image. Raises InputError where there are outlines, and of
    none of the images."""
    files = {path.stem: path for path in image_files(folder)} if folder.is_dir() else {}
    found = {image.name: files.get(f"{image.stem}_mask", files.get(image.stem)) for image in images}
    masks = {name: path for name, path in found.items() if path is not None}
    if files and images and not masks:
        raise InputError(
            f"{folder} holds {len(files)} outlines, such as {next(iter(files.values())).name}, and none of an image of its kind; "
            f"expected {images[0].stem}_mask.png for {images[0].name}"
        )
    return masks


def _boxes(path: Path) -> dict[str, tuple[tuple[float, float, float, float], ...]]:
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error}; expected the columns file, x, y, width, height") from error
    separator = max(",;\t", key=text.partition("\n")[0].count)
    found: dict[str, tuple[tuple[float, float, float, float], ...]] = {}
    for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator), 2):
        try:
            box = (float(row["x"]), float(row["y"]), float(row["width"]), float(row["height"]))
            name = row["file"].replace("\\", "/").removeprefix("test/")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}, line {number}: {error!r}; expected the columns file, x, y, width, height") from error
        if not np.isfinite(box).all() or min(box[2:]) <= 0:
            raise InputError(f"{path}, line {number}: box {list(box)}; expected x, y, width, height in pixels, the last two above 0")
        found[name] = (*found.get(name, ()), box)
    return found
