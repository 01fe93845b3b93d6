"""A model of windows over a volume that is larger than they are, in memory for the windows that still overlap."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import numpy as np
import numpy.typing as npt

from shared_runtime.errors import InputError, ModelError
from shared_runtime.session import Session

SIGMA = 1 / 8
"""Standard deviation of a window's weights, in windows."""
LEAST = 1e-2
"""Lowest weight along an axis, of the window's centre."""
Array = npt.NDArray[Any]


class SlidingWindow:
    """Runs `session` window by window over a volume or an image and blends the overlaps.

    `window`: its size by axis [voxels], such as (128, 128, 128). `overlap`: the least that neighbours share, 0 to below 1 of
    the window. A voxel's scores are the mean over its windows, weighted by a Gaussian about each centre (Isensee et
    al., nnU-Net, Nature Methods 2021); the weights are a product over the axes, so that their sum needs no volume.
    Windows are visited along the axis that holds most of them, and what no later window touches is given out at once:
    beside the volume only `classes * window * other axes` scores are held. `rows`: windows a call of the session; of a model that takes
    a fixed number of rows, that many.

        labels = rt.SlidingWindow(session, (128, 128, 128)).labels(volume)        # (C, D, H, W) -> (D, H, W)
    """

    def __init__(self, session: Session, window: tuple[int, ...], *, overlap: float = 0.25, rows: int = 1) -> None:
        signature = session.model.signature
        if len(signature.inputs) != 1 or not signature.outputs:
            raise ModelError(f"a sliding window needs a model of one input, and {session.model.name!r} has {len(signature.inputs)}")
        (self._input,) = signature.inputs
        if len(self._input.shape) != len(window) + 2:
            raise ModelError(
                f"{session.model.name!r} takes {self._input.name!r} of shape {list(self._input.shape)}; a window of {len(window)} axes "
                f"needs (batch, channels) and {len(window)} more"
            )
        if not 0 <= overlap < 1 or min(window) < 1 or rows < 1:
            raise ValueError(
                f"expected a window from 1 voxel on, an overlap from 0 to below 1 and rows from 1 on; got {window}, {overlap} and {rows}"
            )
        self._session, self._window, self._overlap = session, tuple(window), overlap
        self._fixed = signature.fixed_rows
        self._rows = self._fixed or rows
        self._output = signature.outputs[0].name
        self._weights = [_weights(size) for size in window]

    def slabs(self, volume: Array) -> Iterator[tuple[tuple[slice, ...], Array]]:
        """The scores of `volume` ((C, *spatial), an array or a memory map) slab by slab: where each lies in the volume, and
        its scores (classes, *slab) float32, valid until the next is asked for. Slabs come in order and cover the volume once;
        where no windows overlap, each is one window.

        Raises InputError where the volume does not fit the window, ModelError where the model's output is not one of windows.
        """
        rank = len(self._window)
        if not hasattr(volume, "ndim"):
            raise InputError(f"expected a volume as an array or a memory map, got a {type(volume).__name__}")
        if volume.ndim != rank + 1 or 0 in volume.shape:
            raise InputError(f"expected a volume of shape (channels, {rank} axes) without empty axes, got {list(volume.shape)}")
        size = volume.shape[1:]
        axis = max(range(rank), key=lambda a: size[a] / self._window[a])
        starts = [_starts(size[a], self._window[a], self._overlap) for a in range(rank)]
        if all(after - before >= w for along, w in zip(starts, self._window, strict=True) for before, after in pairwise(along)):
            yield from self._apart(volume, list(product(*starts)))
            return
        sums = [_sum(starts[a], self._weights[a], size[a]) for a in range(rank)]
        grid = list(product(*(starts[a] for a in range(rank) if a != axis)))
        buffer: Array | None = None
        for place, start in enumerate(starts[axis]):
            corners = [(*rest[:axis], start, *rest[axis:]) for rest in grid]
            for first in range(0, len(corners), self._rows):
                some = corners[first : first + self._rows]
                scores = self._weighted(volume, some)
                if buffer is None:
                    spans = [max(size[a], self._window[a]) if a != axis else self._window[a] for a in range(rank)]
                    buffer = np.zeros((scores.shape[1], *spans), np.float32)
                for one, corner in zip(scores, some, strict=True):
                    where = [slice(c, c + w) for c, w in zip(corner, self._window, strict=True)]
                    where[axis] = slice(None)
                    buffer[(slice(None), *where)] += one
            assert buffer is not None
            stop = starts[axis][place + 1] if place + 1 < len(starts[axis]) else size[axis]
            inside = tuple(slice(0, stop - start) if a == axis else slice(0, size[a]) for a in range(rank))
            done = buffer[(slice(None), *inside)]
            for a in range(rank):
                done /= _along(sums[a][start:stop] if a == axis else sums[a], a, rank)
            yield tuple(slice(start, stop) if a == axis else slice(0, size[a]) for a in range(rank)), done
            _shift(np.moveaxis(buffer, axis + 1, 0), stop - start)

    def scores(self, volume: Array) -> Array:
        """The scores of the whole volume, (classes, *spatial) float32; raises as `slabs` does."""
        found: Array | None = None
        for where, slab in self.slabs(volume):
            if found is None:
                found = np.empty((len(slab), *volume.shape[1:]), np.float32)
            found[(slice(None), *where)] = slab
        assert found is not None
        return found

    def labels(self, volume: Array, out: Array | None = None) -> Array:
        """The class of the highest score a voxel, (*spatial) uint8 (uint16 above 256 classes), or written to `out`, such as a
        memory map; raises as `slabs` does, ModelError also for a model of one class, InputError for an `out` that can't hold them."""
        labels = out
        if out is not None and (out.shape != np.shape(volume)[1:] or out.dtype.kind not in "iu"):
            raise InputError(f"expected an out of whole numbers of shape {list(np.shape(volume)[1:])}, got {out.dtype} {list(out.shape)}")
        for where, slab in self.slabs(volume):
            if len(slab) < 2:
                raise ModelError(f"{self._session.model.name!r} gives one score a voxel; labels need two classes: put a limit to `scores`")
            if labels is None:
                labels = np.empty(volume.shape[1:], np.min_scalar_type(len(slab) - 1))
            if len(slab) - 1 > np.iinfo(labels.dtype).max:
                raise InputError(f"an out of {labels.dtype} can't hold {len(slab)} classes; expected a wider type")
            target = labels[where]
            for plane in range(target.shape[0]):
                target[plane] = slab[:, plane].argmax(axis=0)
        assert labels is not None
        return labels

    def _apart(self, volume: Array, corners: list[tuple[int, ...]]) -> Iterator[tuple[tuple[slice, ...], Array]]:
        """As `slabs`, of windows that do not overlap."""
        for first in range(0, len(corners), self._rows):
            some = corners[first : first + self._rows]
            for one, corner in zip(self._scores(volume, some), some, strict=True):
                where = tuple(slice(c, min(c + w, n)) for c, w, n in zip(corner, self._window, volume.shape[1:], strict=True))
                yield where, one[(slice(None), *(slice(0, part.stop - part.start) for part in where))]

    def _weighted(self, volume: Array, corners: list[tuple[int, ...]]) -> Array:
        """`_scores`, the more the nearer to the middle of a window."""
        scores = self._scores(volume, corners)
        if not scores.flags.writeable:
            scores = scores.copy()
        for axis, weights in enumerate(self._weights):
            scores *= _along(weights, axis, len(self._window))
        return scores

    def _scores(self, volume: Array, corners: list[tuple[int, ...]]) -> Array:
        """Scores (windows, classes, *window) float32 of the windows at `corners`; what lies outside the volume is zero."""
        inputs = np.zeros((self._fixed or len(corners), volume.shape[0], *self._window), self._input.dtype)
        for row, corner in zip(inputs, corners, strict=False):
            part = volume[(slice(None), *(slice(c, c + w) for c, w in zip(corner, self._window, strict=True)))]
            row[tuple(slice(0, n) for n in part.shape)] = part
        scores = self._session.run({self._input.name: inputs})[self._output]
        if scores.ndim != inputs.ndim or scores.shape[2:] != self._window:
            raise ModelError(
                f"{self._session.model.name!r} gives {self._output!r} of shape {list(scores.shape)} for a window of {list(self._window)}; "
                "a sliding window needs scores (batch, classes, *window)"
            )
        return np.ascontiguousarray(scores[: len(corners)], np.float32)


def _weights(size: int) -> Array:
    places = np.arange(size) - (size - 1) / 2
    weights: Array = np.maximum(np.exp(-0.5 * (places / (SIGMA * size)) ** 2), LEAST).astype(np.float32)
    return weights


def _starts(size: int, window: int, overlap: float) -> list[int]:
    """Evenly spaced, the first at the beginning and the last at the end."""
    if size <= window:
        return [0]
    count = -(-(size - window) // max(1, int(window * (1 - overlap)))) + 1
    return [int(start) for start in np.linspace(0, size - window, count).round()]


def _sum(starts: list[int], weights: Array, size: int) -> Array:
    total: Array = np.zeros(max(size, len(weights)), np.float32)
    for start in starts:
        total[start : start + len(weights)] += weights
    return total[:size]


def _along(values: Array, axis: int, rank: int) -> Array:
    line: Array = values.reshape([-1 if a == axis else 1 for a in range(rank)])
    return line


def _shift(planes: Array, count: int) -> None:
    """Drop the first `count` planes in place, and begin as many at zero."""
    for plane in range(len(planes) - count):
        planes[plane] = planes[plane + count]
    planes[max(0, len(planes) - count) :] = 0
