"""Regions that do not belong: small networks that learn from the part's own good images where a surface changes.

The statistics of good parts judge each place against the same place of other parts. A region whose surface is usual elsewhere, or
lies within the spread of all parts, shows only against the rest of its own image: that is what is learned here, on
good parts with patches (`synthesis.patches`). What it gives on magnetic tiles: docs/benchmarks.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

from apps.industrial.features import MAP
from apps.industrial.images import Pixels
from apps.industrial.synthesis.patches import patched
from shared_runtime.host import host

Array = NDArray[np.float32]
GRID = 16
LAYERS = {"fine": 0.25, "coarse": 0.5, "half": 0.25}
"""Outputs of `texture-features`, each judged by a network of its own, and what each has to say."""
FEWEST = 50
"""Good images below which nothing is learned: it takes half a minute, and few parts teach too little."""
EACH, PATCHED, CELLS, STEPS, BATCH = 10, 600, 128, 900, 1024
"""Patched images for each good one of a half, but at most PATCHED; places of each that are learned from; steps of learning."""
HIDDEN, PENALTY, RATE = 32, 10.0, 2e-3
CORES_FOR_BOTH, AT_ONCE = 4, 32
CLIP, SOFT, WEIGHT = 6.0, 2.5, 3.0
"""`SOFT`: sigma in cells that the map is smoothed by; `WEIGHT`: its say beside the statistics of places."""
Look = Callable[[Sequence[Pixels]], Mapping[str, Array]]


@dataclass(frozen=True)
class _Head:
    """A network of one hidden layer, and the median and deviation of its logits on good parts that it did not see."""

    first: Array
    first_bias: Array
    second: Array
    second_bias: Array
    usual: Array

    def logits(self, described: Array) -> Array:
        """(N, GRID, GRID, D) -> (N, GRID, GRID)."""
        hidden = np.maximum(described @ self.first + self.first_bias, 0)
        return np.asarray((hidden @ self.second + self.second_bias)[..., 0], np.float32)


@dataclass(frozen=True)
class Regions:
    """What was learned from one part's good images from some of LAYERS. `mean`, `deviation`: of each layer, (C, GRID, GRID)."""

    layers: tuple[str, ...]
    mean: tuple[Array, ...]
    deviation: tuple[Array, ...]
    heads: tuple[tuple[_Head, ...], ...]
    """Two for each layer; each learned from one half of the good images."""

    @classmethod
    def fit(
        cls,
        images: Sequence[Pixels],
        seen: Mapping[str, Array],
        look: Look,
        seed: int = 0,
        report: Callable[[float], None] = lambda share: None,
        names: Sequence[str] = tuple(LAYERS),
    ) -> tuple[Regions, Array]:
        """Learn from N good `images`, FEWEST at least, of which the network said `seen`; `look` asks it about others, and
        `report` gets the share of them that is done. `names`: those of LAYERS to look at.

        Neighbours in order stay in one half. Also the maps (N, MAP, MAP) of each half by what the other one taught. Where there are
        cores enough both halves learn at once: `look` is then called from two threads, `report` from the caller's alone.
        """
        mean, deviation = zip(*(_usual(_on_grid(seen[name])) for name in names), strict=True)
        plain, halves = cls(tuple(names), mean, deviation, ()), np.array_split(np.arange(len(images)), 2)
        maps, at_once = np.zeros((len(images), MAP, MAP), np.float32), host().cores >= CORES_FOR_BOTH

        def taught_by(half: int) -> list[_Head]:
            own, rest = halves[half], halves[1 - half]

            def of_half(share: float) -> None:
                if not at_once:
                    report((half + share) / 2)
                elif half == 0:
                    report(share)

            patches = _patches([images[i] for i in own], look, np.random.default_rng([seed, int(own[0])]), of_half, names)
            learned = []
            for level, name in enumerate(names):
                learned.append(_learned(partial(plain._described, level), patches[name], patches["outline"], seen[name][rest], seed))
            alone = replace(plain, heads=tuple((head,) for head in learned))
            maps[rest] = alone.maps({name: seen[name] for name in names}, rest)
            return learned

        # Products as small as these gain little from more threads, and lose much where two kinds of threads share the cores.
        with warnings.catch_warnings(), ThreadPoolExecutor(1) as pool, threadpool_limits(1 if at_once else None, "blas"):
            warnings.simplefilter("ignore", ConvergenceWarning)  # each pass is a fit of its own, at a rate that falls
            other = pool.submit(taught_by, 1) if at_once else None
            heads = [taught_by(0), other.result() if other else taught_by(1)]
        return replace(plain, heads=tuple(zip(*heads, strict=True))), maps

    def maps(self, seen: Mapping[str, Array], rows: NDArray[np.int64] | None = None) -> Array:
        """(N, MAP, MAP) how much each place looks like a region that does not belong; 0 is usual for good parts. `rows`: of which images,
        all without."""
        rows = np.arange(len(seen["fine"])) if rows is None else rows
        total = np.zeros((len(rows), GRID, GRID), np.float32)
        say = sum(LAYERS[name] for name in self.layers)
        for level, (name, heads) in enumerate(zip(self.layers, self.heads, strict=True)):
            for part in _parts(len(rows)):
                described = self._described(level, seen[name][rows[part]])
                for head in heads:
                    total[part] += (head.logits(described) - head.usual[0]) / head.usual[1] * (LAYERS[name] / say / len(heads))
        smooth = [cv2.resize(cv2.GaussianBlur(one, (0, 0), SOFT), (MAP, MAP), interpolation=cv2.INTER_LINEAR) for one in total]
        return np.asarray(smooth, np.float32).reshape(-1, MAP, MAP) * WEIGHT

    def _described(self, level: int, layer: Array) -> Array:
        """(N, C, ...) -> (N, GRID, GRID, D): each place against its image: alone, with its surroundings, its row and column."""
        standard = np.clip((_on_grid(layer) - self.mean[level]) / self.deviation[level], -CLIP, CLIP)
        own = np.ascontiguousarray((standard - standard.mean(axis=(2, 3), keepdims=True)).transpose(0, 2, 3, 1))
        spread = own.std(axis=(1, 2), keepdims=True)
        around = [own, _around(own, 3), _around(own, 7), spread, own.mean(axis=2, keepdims=True), own.mean(axis=1, keepdims=True)]
        shape = own.shape
        place = np.broadcast_to(_PLACES, (*shape[:3], _PLACES.shape[2]))
        return np.concatenate([*(np.broadcast_to(part, shape) for part in around), place], axis=3)

    def arrays(self) -> dict[str, Array]:
        """For storage."""
        found: dict[str, Array] = {}
        for name, mean, deviation, heads in zip(self.layers, self.mean, self.deviation, self.heads, strict=True):
            level = list(LAYERS).index(name)
            found |= {f"regions{level}_mean": mean, f"regions{level}_deviation": deviation}
            for number, head in enumerate(heads):
                found |= {f"regions{level}_{number}_{part}": getattr(head, part) for part in _Head.__dataclass_fields__}
        return found

    @classmethod
    def from_arrays(cls, stored: Mapping[str, Array]) -> Regions | None:
        """From what `arrays` gave; None where nothing was learned."""
        levels = [level for level in range(len(LAYERS)) if f"regions{level}_mean" in stored]
        if not levels:
            return None
        mean, deviation = (tuple(stored[f"regions{level}_{part}"] for level in levels) for part in ("mean", "deviation"))

        def head(level: int, number: int) -> _Head:
            return _Head(*(stored[f"regions{level}_{number}_{part}"] for part in _Head.__dataclass_fields__))

        heads = tuple((head(level, 0), head(level, 1)) for level in levels)
        return cls(tuple(list(LAYERS)[level] for level in levels), mean, deviation, heads)


def _patches(
    images: Sequence[Pixels], look: Look, rng: np.random.Generator, report: Callable[[float], None], names: Sequence[str]
) -> dict[str, Array]:
    """What the network says of patched images, on the grid in half precision, and the `outline` of each (N, GRID, GRID)."""
    parts: dict[str, list[NDArray[np.float16]]] = {name: [] for name in (*names, "outline")}
    number = min(EACH * len(images), PATCHED)
    for start in range(0, number, 32):
        pairs = rng.integers(len(images), size=(min(32, number - start), 2))
        made = [patched(rng, images[a], images[b]) for a, b in pairs]
        seen = look([image for image, _ in made])
        for name in names:
            parts[name].append(_on_grid(seen[name]).astype(np.float16))
        parts["outline"].append(np.stack([cv2.resize(m, (GRID, GRID), interpolation=cv2.INTER_AREA) for _, m in made]).astype(np.float16))
        report(min(1.0, (start + 32) / number))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _usual(layer: Array) -> tuple[Array, Array]:
    """Mean and deviation of each place (C, GRID, GRID), the latter with a share of the whole channel's."""
    spread = layer.std(axis=(0, 2, 3))[:, None, None]
    return layer.mean(axis=0), np.asarray(layer.std(axis=0) + 0.1 * spread + 1e-4, np.float32)


def _parts(number: int) -> list[slice]:
    """AT_ONCE images at a time: what describes their places is some ten times as large as what the network said of them."""
    return [slice(start, start + AT_ONCE) for start in range(0, number, AT_ONCE)]


def _learned(described: Callable[[Array], Array], patches: Array, outline: Array, good: Array, seed: int) -> _Head:
    """A head from `patches`, a layer of patched images, and the `outline` of each (N, GRID, GRID), with what is usual on `good`, the same
    layer of good ones. `described`: as `Regions._described`."""
    rng = np.random.default_rng(seed)
    chosen = rng.random((len(patches), GRID * GRID)).argsort(axis=1)[:, :CELLS]
    parts = [np.take_along_axis(_rows(described(patches[part])), chosen[part, :, None], axis=1) for part in _parts(len(patches))]
    x = np.concatenate(parts).reshape(chosen.size, -1)
    y = np.take_along_axis(outline.reshape(len(outline), -1) > 0.5, chosen, axis=1).ravel()
    order = np.random.RandomState(seed)
    network = MLPClassifier((HIDDEN,), batch_size=BATCH, alpha=PENALTY, max_iter=1, warm_start=True, random_state=order)
    passes = max(1, STEPS * BATCH // len(x))
    for done in range(passes):
        network.set_params(learning_rate_init=RATE * (1 - done / passes)).fit(x, y)
    (first, second), (first_bias, second_bias) = network.coefs_, network.intercepts_
    head = _Head(*(np.asarray(v, np.float32) for v in (first, first_bias, second, second_bias, [0, 1])))
    logits = np.concatenate([head.logits(described(good[part])) for part in _parts(len(good))])
    return replace(head, usual=np.array([np.median(logits), logits.std() + 1e-3], np.float32))


def _rows(places: Array) -> Array:
    """(N, GRID, GRID, D) -> (N, GRID * GRID, D)."""
    return places.reshape(len(places), GRID * GRID, -1)


def _on_grid(layer: Array) -> Array:
    """(N, C, side, side) -> (N, C, GRID, GRID) float32: averaged where it is finer, repeated where it is coarser."""
    n, c, side, _ = layer.shape
    if side < GRID:
        return layer.repeat(GRID // side, axis=2).repeat(GRID // side, axis=3).astype(np.float32)
    return np.asarray(layer.reshape(n, c, GRID, side // GRID, GRID, side // GRID).mean(axis=(3, 5), dtype=np.float32))


def _around(places: Array, side: int) -> Array:
    """Means over `side` x `side` places, as far as they lie inside: (N, GRID, GRID, C) -> the same."""
    sums = [cv2.blur(one, (side, side), borderType=cv2.BORDER_CONSTANT) for one in places]
    return np.asarray(np.stack(sums) / _COUNTS[side], np.float32)


_AXIS = np.linspace(-1, 1, GRID, dtype=np.float32)
_ROW, _COLUMN = np.meshgrid(_AXIS, _AXIS, indexing="ij")
_PLACES = np.stack([_ROW, _COLUMN, _ROW**2, _COLUMN**2], axis=2)
_COUNTS = {side: cv2.blur(np.ones((GRID, GRID), np.float32), (side, side), borderType=cv2.BORDER_CONSTANT)[:, :, None] for side in (3, 7)}
