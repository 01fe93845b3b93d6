"""A line of procedural parts, some with a defect: for the demo, for tests and for trying a recipe without a camera."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from apps.industrial.acquisition.base import Frame
from apps.industrial.errors import SourceError
from apps.industrial.images import Pixels, png
from apps.industrial.synthesis.defects import DEFECTS, add_defect
from apps.industrial.synthesis.textures import TEXTURES, good_part
from pipelines.messages import now_rfc3339


class GeneratedSource:
    """`number` parts of a texture (0: without end), every tenth or so with a defect, `per_second` of them (0: at once)."""

    def __init__(self, texture: str, number: int = 0, *, defect_share: float = 0.1, per_second: float = 0.0, seed: int = 0) -> None:
        if texture not in TEXTURES:
            raise SourceError(f"no texture {texture!r}; known: {', '.join(TEXTURES)}")
        self._texture, self._number, self._share, self._rate, self._seed = texture, number, defect_share, per_second, seed

    def parts(self) -> Iterator[tuple[Pixels, str]]:
        """Images with the kind of their defect, or an empty word."""
        rng, made = np.random.default_rng(self._seed), 0
        while not self._number or made < self._number:
            made += 1
            image, kind = good_part(self._texture, rng), ""
            if rng.random() < self._share:
                kind = str(rng.choice(list(DEFECTS)))
                image, _ = add_defect(image, kind, rng)
            yield image, kind

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """The parts as frames; a part's serial number ends in the kind of its defect."""
        for number, (image, kind) in enumerate(self.parts(), 1):
            if stop.is_set() or (self._rate and number > 1 and stop.wait(1 / self._rate)):
                return
            yield Frame(png(image), now_rfc3339(), f"{number:06d}{'-' + kind if kind else ''}")


def write_dataset(folder: Path, texture: str, *, good: int, each: int, seed: int = 0) -> None:
    """A data set in the MVTec layout: `good` good parts to teach from, `each` good ones to test, and `each` of every defect."""
    rng = np.random.default_rng(seed)

    def put(path: Path, image: Pixels) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))

    for i in range(good):
        put(folder / "train" / "good" / f"{i:04d}.png", good_part(texture, rng))
    for i in range(each):
        put(folder / "test" / "good" / f"{i:04d}.png", good_part(texture, rng))
    for kind in DEFECTS:
        for i in range(each):
            image, mask = add_defect(good_part(texture, rng), kind, rng)
            put(folder / "test" / kind / f"{i:04d}.png", image)
            put(folder / "ground_truth" / kind / f"{i:04d}_mask.png", mask.astype(np.uint8) * 255)
