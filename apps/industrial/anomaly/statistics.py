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


def pooled(features: Array, side: int) -> Array:
    """Means over blocks of `side`, half a side apart: (N, C, H, W) -> (N, H', W', C)."""
    n, c, h, w = features.shape
    total = np.zeros((n, c, h + 1, w + 1), np.float64)
    total[:, :, 1:, 1:] = features.cumsum(2, dtype=np.float64).cumsum(3)
    rows, columns = np.arange(0, h - side + 1, side // 2), np.arange(0, w - side + 1, side // 2)
    r, q = rows[:, None], columns[None, :]
    sums = total[:, :, r + side, q + side] - total[:, :, r, q + side] - total[:, :, r + side, q] + total[:, :, r, q]
    return (sums / side**2).transpose(0, 2, 3, 1).astype(np.float32)


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
        parts = np.array_split(np.arange(n), min(5, n // 2))
        without = []
        for part in parts:
            rest = np.setdiff1d(np.arange(n), part)
            without.append(cls._fit(fine[rest], whole[rest]))
        distances = np.concatenate([some._raw(fine[part], whole[part]) for some, part in zip(without, parts, strict=True)])
        usual = np.stack([np.median(distances, axis=0), distances.std(axis=0) + 1e-3], axis=1).astype(np.float32)
        others = [cls(some.image, some.places, usual) for some in without]
        scores = np.concatenate([some.scores(fine[part], whole[part]) for some, part in zip(others, parts, strict=True)])
        maps = np.concatenate([some.maps(fine[part]) for some, part in zip(others, parts, strict=True)])
        fitted = cls._fit(fine, whole)
        return cls(fitted.image, fitted.places, usual), scores, maps

    @classmethod
    def _fit(cls, fine: Array, whole: Array) -> GoodParts:
        places = tuple(Gaussian.of_places(_flat(pooled(fine, side))) for side in BLOCKS)
        return cls(Gaussian.of_image(whole), places, np.tile(np.array([[0, 1]], np.float32), (1 + len(BLOCKS), 1)))

    def _raw(self, fine: Array, whole: Array) -> Array:
        """(N, 1 + len(BLOCKS)): the image's distance, and the largest places' of each scale."""
        columns = [self.image.distance(whole[:, None])[:, 0]]
        for side, gaussian in zip(BLOCKS, self.places, strict=True):
            distances = np.sort(gaussian.distance(_flat(pooled(fine, side))), axis=1)
            columns.append(distances[:, -max(1, distances.shape[1] // 10) :].mean(axis=1))
        return np.stack(columns, axis=1)

    def scores(self, fine: Array, whole: Array) -> Array:
        """(N,) how far each image is from good parts, in usual deviations: 0 for a usual one."""
        standard = (self._raw(fine, whole) - self.usual[:, 0]) / self.usual[:, 1]
        return np.asarray((standard[:, 0] + standard[:, 1]) / 2, np.float32)

    def maps(self, fine: Array) -> Array:
        """(N, MAP, MAP) how far each place is from good parts, in usual deviations, mean over the scales."""
        total = np.zeros((len(fine), MAP, MAP), np.float32)
        for level, (side, gaussian) in enumerate(zip(BLOCKS, self.places, strict=True)):
            blocks = pooled(fine, side)
            distances = gaussian.distance(_flat(blocks)).reshape(blocks.shape[:3])
            standard = (distances - self.usual[1 + level, 0]) / self.usual[1 + level, 1]
            total += np.stack([_spread(one, side, fine.shape[2]) for one in standard])
        return np.asarray(total / len(BLOCKS), np.float32)

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


def _flat(blocks: Array) -> Array:
    return blocks.reshape(len(blocks), -1, blocks.shape[3])


def _spread(blocks: Array, side: int, size: int) -> Array:
    """Values of blocks on the map's grid: each at its block's middle, linear between, constant beyond."""
    middles = (np.arange(MAP) + 0.5) * size / MAP
    at = ((middles - side / 2) / (side / 2)).astype(np.float32)
    x, y = np.meshgrid(at, at)
    return np.asarray(cv2.remap(blocks, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float32)


def outliers(scores: Sequence[float]) -> list[int]:
    """Positions whose score stands apart: beyond the upper quartile by three times the spread of the middle half."""
    values = np.asarray(scores)
    low, high = np.percentile(values, (25, 75))
    return [int(i) for i in np.flatnonzero(values > high + 3 * (high - low))]
