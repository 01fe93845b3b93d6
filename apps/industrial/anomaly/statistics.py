"""Statistics of good parts: the whole image, and its places at three scales; distances are Mahalanobis'.

Places: Defard et al., "PaDiM" (ICPR Workshops 2021), on blocks of averaged features. The whole image: the
mean and deviation of the deep features at half its size, with Ledoit and Wolf's shrinkage (2004). Chosen among a memory bank
of patches, Gaussians of places, the whole image alone and a segmenter of synthetic defects: docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf

from apps.industrial.features import MAP

Array = NDArray[np.float32]
CLIP, SHRINKAGE = 12.0, 0.1
BLOCKS = (16, 8, 4)
"""Sides of the averaged blocks of the fine features; they overlap by half. The largest judge the image, all draw the map."""


def pooled(features: Array) -> tuple[Array, ...]:
    """Means over blocks of each of BLOCKS, half a side apart: (N, C, H, W) -> (N, H', W', C) each."""
    cells, side, found = np.ascontiguousarray(features.transpose(0, 2, 3, 1)), 1, {}
    while side < max(BLOCKS) // 2:
        cells, side = _of_four(cells, 2), side * 2
        found[side * 2] = _of_four(cells, 1)
    return tuple(found[side] for side in BLOCKS)


def _of_four(cells: Array, step: int) -> Array:
    """Means of 2 x 2 cells, `step` apart: (N, H, W, C) -> (N, H', W', C)."""
    rows = cells[:, :-1:step] + cells[:, 1::step]
    return np.asarray((rows[:, :, :-1:step] + rows[:, :, 1::step]) / 4, np.float32)


@dataclass(frozen=True)
class Gaussian:
    """Mean, scale and whitening of features at P places: (P, D), (P, D), (P, D, D)."""

    mean: Array
    scale: Array
    whitening: Array

    @classmethod
    def of_image(cls, x: Array) -> Gaussian:
        """From (N, D), shrunk after Ledoit and Wolf."""
        mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-3
        covariance = LedoitWolf(assume_centered=False).fit(np.clip((x - mean) / scale, -CLIP, CLIP)).covariance_
        covariance = covariance + np.eye(len(covariance)) * 1e-4 * np.trace(covariance) / len(covariance)
        return cls(*(np.asarray(v[None], np.float32) for v in (mean, scale, _whitening(covariance))))

    @classmethod
    def of_places(cls, x: Array) -> Gaussian:
        """From (N, P, D), each place for itself."""
        mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-4
        z = np.clip((x - mean) / scale, -CLIP, CLIP).transpose(1, 0, 2).astype(np.float64)
        covariance = z.transpose(0, 2, 1) @ z / max(1, len(x) - 1)
        covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.eye(x.shape[2])
        return cls(np.asarray(mean, np.float32), np.asarray(scale, np.float32), _whitening(covariance).astype(np.float32))

    def distance(self, x: Array) -> Array:
        """(N, P, D) -> (N, P) standard deviations."""
        z = np.clip((x - self.mean) / self.scale, -CLIP, CLIP)
        white = np.matmul(z.transpose(1, 0, 2), self.whitening)
        return np.sqrt((white**2).sum(axis=2)).T.astype(np.float32)


def _whitening(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.linalg.cholesky(np.linalg.inv(covariance))


@dataclass(frozen=True)
class GoodParts:
    """The statistics of one part's good images."""

    image: Gaussian
    places: tuple[Gaussian, ...]
    usual: Array
    """Usual distances and their deviations: (1 + len(BLOCKS), 2), found on parts that the statistics did not see."""

    @classmethod
    def fit(cls, fine: Array, whole: Array) -> tuple[GoodParts, Array, Array]:
        """The statistics of N good images, four at least, and what they say of those that they did not see.

        `fine` (N, FINE, H, W) and `whole` (N, WHOLE) are outputs of `texture-features`.

        The images are cut in five parts, each judged by the statistics of the others: scores (N,) and maps
        (N, MAP, MAP). Neighbours in order stay together, so that several images of one part fall on one side.
        """
        n = len(fine)
        blocks = pooled(fine)
        parts = np.array_split(np.arange(n), min(5, n // 2))
        found = []
        for part in parts:
            rest = np.setdiff1d(np.arange(n), part)
            others = cls._fit([some[rest] for some in blocks], whole[rest])
            found.append(others.distances([some[part] for some in blocks], whole[part]))
        distances = [np.concatenate(level) for level in zip(*found, strict=True)]
        fitted = cls._fit(blocks, whole)
        peaks = highest(distances)
        usual = np.stack([np.median(peaks, axis=0), peaks.std(axis=0) + 1e-3], axis=1).astype(np.float32)
        result = cls(fitted.image, fitted.places, usual)
        return result, *result._standard(distances)

    @classmethod
    def _fit(cls, blocks: Sequence[Array], whole: Array) -> GoodParts:
        places = tuple(Gaussian.of_places(_flat(some)) for some in blocks)
        return cls(Gaussian.of_image(whole), places, np.tile(np.array([[0, 1]], np.float32), (1 + len(BLOCKS), 1)))

    def judged(self, fine: Array, whole: Array) -> tuple[Array, Array]:
        """How far images and their places are from good parts, in usual deviations, 0 for a usual one: (N,), and (N, MAP, MAP), the mean
        over the scales."""
        return self._standard(self.distances(pooled(fine), whole))

    def distances(self, blocks: Sequence[Array], whole: Array) -> list[Array]:
        """Of images as `pooled` gives them: their own (N,), and their places' (N, H', W') of each scale."""
        places = [g.distance(_flat(some)).reshape(some.shape[:3]) for some, g in zip(blocks, self.places, strict=True)]
        return [self.image.distance(whole[:, None])[:, 0], *places]

    def _standard(self, distances: Sequence[Array]) -> tuple[Array, Array]:
        standard = (highest(distances) - self.usual[:, 0]) / self.usual[:, 1]
        maps = np.zeros((len(standard), MAP, MAP), np.float32)
        for side, level, (usual, deviation) in zip(BLOCKS, distances[1:], self.usual[1:], strict=True):
            maps += np.stack([_spread(one, side) for one in (level - usual) / deviation])
        return np.asarray((standard[:, 0] + standard[:, 1]) / 2, np.float32), np.asarray(maps / len(BLOCKS), np.float32)

    def arrays(self) -> dict[str, Array]:
        """For storage."""
        found = {"usual": self.usual}
        for name, gaussian in [("image", self.image), *((f"places{i}", g) for i, g in enumerate(self.places))]:
            found |= {f"{name}_{part}": getattr(gaussian, part) for part in ("mean", "scale", "whitening")}
        return found

    @classmethod
    def from_arrays(cls, stored: Mapping[str, Array]) -> GoodParts:
        """From what `arrays` gave."""

        def gaussian(name: str) -> Gaussian:
            return Gaussian(*(stored[f"{name}_{part}"] for part in ("mean", "scale", "whitening")))

        return cls(gaussian("image"), tuple(gaussian(f"places{i}") for i in range(len(BLOCKS))), stored["usual"])


def highest(distances: Sequence[Array]) -> Array:
    """(N, 1 + len(BLOCKS)): the images' distances, and the mean of the highest tenth of their places' of each scale."""
    columns = [distances[0]]
    for level in distances[1:]:
        ordered = np.sort(level.reshape(len(level), -1), axis=1)
        columns.append(ordered[:, -max(1, ordered.shape[1] // 10) :].mean(axis=1))
    return np.stack(columns, axis=1)


def _flat(blocks: Array) -> Array:
    return blocks.reshape(len(blocks), -1, blocks.shape[3])


def _spread(blocks: Array, side: int) -> Array:
    """Values of blocks on the map's grid: each at its block's middle, linear between, constant beyond."""
    size = (len(blocks) + 1) * side / 2
    middles = (np.arange(MAP) + 0.5) * size / MAP
    at = ((middles - side / 2) / (side / 2)).astype(np.float32)
    x, y = np.meshgrid(at, at)
    return np.asarray(cv2.remap(blocks, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float32)


def outliers(scores: Sequence[float]) -> list[int]:
    """Positions whose score stands apart: beyond the upper quartile by three times the spread of the middle half."""
    values = np.asarray(scores)
    low, high = np.percentile(values, (25, 75))
    return [int(i) for i in np.flatnonzero(values > high + 3 * (high - low))]
