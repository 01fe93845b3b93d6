"""Data sets in the MVTec layout: `train/good`, `test/KIND`, `ground_truth/KIND/NAME_mask.png`; boxes and labels alone as well."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from apps.industrial.errors import InputError
from apps.industrial.features import MAP
from apps.industrial.images import Pixels, image_files, read_image

GOOD, TRUTH = "good", "ground_truth"
BOXES_FILE = "boxes.csv"
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """One image of a data set. `mask`: its file, or None; `boxes`: x, y, width, height in pixels where there is no mask."""

    path: Path
    kind: str
    mask: Path | None = None
    boxes: tuple[tuple[float, float, float, float], ...] = ()

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
                outline[round(y) : round(y + h), round(x) : round(x + w)] = True
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
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        if defects_only and folder.name == GOOD:
            continue
        for path in image_files(folder):
            mask = None if folder.name == GOOD else _mask(dataset / TRUTH / folder.name, path)
            found.append(Sample(path, folder.name, mask, boxes.get(f"{folder.name}/{path.name}", ())))
    if not found:
        raise InputError(f"{root} holds no images; expected test/KIND with images")
    return found


def _mask(folder: Path, image: Path) -> Path | None:
    for name in (f"{image.stem}_mask.png", f"{image.stem}.png", f"{image.stem}_mask.bmp"):
        if (folder / name).is_file():
            return folder / name
    return None


def _boxes(path: Path) -> dict[str, tuple[tuple[float, float, float, float], ...]]:
    if not path.is_file():
        return {}
    found: dict[str, tuple[tuple[float, float, float, float], ...]] = {}
    with path.open(newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream), 2):
            try:
                box = (float(row["x"]), float(row["y"]), float(row["width"]), float(row["height"]))
                found[row["file"]] = (*found.get(row["file"], ()), box)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path}, line {number}: {error!r}; expected the columns file, x, y, width, height") from error
    return found
