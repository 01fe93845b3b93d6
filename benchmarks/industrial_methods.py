"""Ways to find defects from good parts alone, beside each other, and how far each step of the shipped one goes."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
from numpy.typing import NDArray

import shared_runtime as rt
from apps.industrial.acquisition.generated import write_dataset
from apps.industrial.anomaly.regions import Regions
from apps.industrial.anomaly.statistics import GoodParts, highest, pooled
from apps.industrial.evaluation.dataset import good_samples, labelled_samples
from apps.industrial.evaluation.metrics import auroc
from apps.industrial.features import BRIGHTNESS, CONTRAST, FINE, FLAT, MAP, MODEL
from apps.industrial.inspection.inspector import combined, features, learned_scores, lifted
from apps.industrial.synthesis.textures import TEXTURES
from apps.industrial.teaching import scale_of
from benchmarks.tiles import open_session, tile_folder

Array = NDArray[np.float32]


def _coreset(bank: Array, size: int) -> Array:
    """Greedy k-centre: each next member is the one farthest from those chosen."""
    rng = np.random.default_rng(0)
    chosen = [int(rng.integers(len(bank)))]
    distance = ((bank - bank[chosen[0]]) ** 2).sum(1)
    while len(chosen) < min(size, len(bank)):
        chosen.append(int(distance.argmax()))
        np.minimum(distance, ((bank - bank[chosen[-1]]) ** 2).sum(1), out=distance)
    return bank[chosen]


def _memory_bank(good: dict[str, Array], seen: dict[str, Array], patches: int = 80, size: int = 1500) -> tuple[Array, Array]:
    """PatchCore-like (Roth et al., CVPR 2022) on the shipped features: scores and maps (N, 32, 32)."""

    def described(some: dict[str, Array]) -> Array:
        return np.stack([np.stack([cv2.blur(channel, (3, 3)) for channel in image]) for image in some["fine"]])

    rng = np.random.default_rng(0)
    known = described(good).transpose(0, 2, 3, 1).reshape(len(good["fine"]), -1, FINE)
    bank = np.concatenate([image[rng.permutation(len(image))[:patches]] for image in known])
    mean, scale = bank.mean(0), bank.std(0) + 1e-4
    bank = _coreset((bank - mean) / scale, size)
    squares = (bank**2).sum(1)
    maps = []
    for image in described(seen):
        x = (image.reshape(FINE, -1).T - mean) / scale
        nearest = ((x**2).sum(1)[:, None] - 2 * x @ bank.T + squares).min(1)
        maps.append(np.sqrt(np.maximum(nearest, 0)).reshape(image.shape[1:]))
    found = np.stack(maps)
    return np.sort(found.reshape(len(found), -1), axis=1)[:, -5:].mean(1), found


def methods() -> dict[str, Any]:
    """Ways to find defects from good parts alone, all on the shipped features: AUROC of images and of pixels."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, open_session() as session:
        sets = {"magnetic tiles": tile_folder()}
        for texture in TEXTURES:
            sets[texture] = Path(folder) / texture
            write_dataset(sets[texture], texture, good=60, each=5)
        for name, place in sets.items():
            good_images = [sample.read() for sample in good_samples(place / "train" / "good")]
            good = features(session, good_images)
            tests = labelled_samples(place)
            images = [sample.read() for sample in tests]
            seen, truth = features(session, images), [sample.defective for sample in tests]
            cells = [sample.cells(image.shape) for sample, image in zip(tests, images, strict=True)]
            parts, _, _ = GoodParts.fit(good["fine"], good["whole"])
            regions, _ = Regions.fit(good_images, good, lambda some: features(session, some))
            (scores, places), inside = parts.judged(seen["fine"], seen["whole"]), regions.maps(seen)
            raw = highest(parts.distances(pooled(seen["fine"]), seen["whole"]))
            bank, bank_maps = _memory_bank(good, seen)
            rows: dict[str, tuple[Array, Array | None]] = {
                "memory bank of patches, coreset (as PatchCore)": (bank, bank_maps),
                "Gaussians of places (as PaDiM)": (raw[:, 1], places),
                "regions learned from patched good parts": (np.sort(inside.reshape(len(inside), -1), axis=1)[:, -400:].mean(1), inside),
                "Mahalanobis of the whole image": (raw[:, 0], None),
                "segmenter of synthetic defects": (learned_scores(seen), seen["map"]),
                "whole image and places together; in the map places and regions": (scores, lifted(places + inside, scores)),
                "the same, with what stands far out in the segmenter (shipped)": (
                    combined(scores, learned_scores(seen), 0.0, scale_of(learned_scores(good))),
                    combined(lifted(places + inside, scores), seen["map"], 0.0, scale_of(good["map"])),
                ),
            }
            found[name] = {
                row: {"image": auroc(truth, scores), "pixel": None if maps is None else _pixel(cells, maps)}
                for row, (scores, maps) in rows.items()
            }
    return found


def steps() -> dict[str, Any]:
    """How far each step goes on magnetic tiles from good parts alone: exposure, size, aspect, what is scored. AUROC of images."""
    import torch

    from apps.industrial.training.export import network_from

    network = network_from(onnx.load(rt.load(MODEL).graph))
    good, tests = good_samples(tile_folder() / "train" / "good"), labelled_samples(tile_folder())
    images, truth = [s.read() for s in (*good, *tests)], [s.defective for s in tests]

    def as_taken(image: NDArray[np.uint8], side: int) -> Array:
        small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        return np.broadcast_to(small.astype(np.float32) / 255, (3, side, side))

    def levelled(image: NDArray[np.uint8], side: int) -> Array:
        small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
        level = (small - small.mean()) * (CONTRAST / (float(small.std()) + FLAT)) + BRIGHTNESS
        return np.broadcast_to(np.clip(level, 0, 255) / 255, (3, side, side))

    def boxed(image: NDArray[np.uint8], side: int) -> Array:
        height, width = image.shape[:2]
        across, down = (side, max(1, side * height // width)) if width > height else (max(1, side * width // height), side)
        inner = cv2.resize(image, (across, down), interpolation=cv2.INTER_AREA)
        low, left = (side - down) // 2, (side - across) // 2
        padded = cv2.copyMakeBorder(inner, low, side - down - low, left, side - across - left, cv2.BORDER_REFLECT_101)
        return levelled(padded, side)

    variants: dict[str, tuple[Callable[[NDArray[np.uint8], int], Array], int]] = {
        "exposure as taken, 256 pixels": (as_taken, 256),
        "exposure taken out, 256 pixels": (levelled, 256),
        "the same, aspect kept, margin by reflection": (boxed, 256),
        "exposure taken out, 128 pixels": (levelled, 128),
        "exposure taken out, 192 pixels": (levelled, 192),
        "exposure taken out, 320 pixels": (levelled, 320),
    }
    found: dict[str, Any] = {}
    for name, (prepare, side) in variants.items():
        parts: dict[str, list[Array]] = {"fine": [], "coarse": []}
        with torch.no_grad():
            for start in range(0, len(images), 16):
                out = network(torch.from_numpy(np.stack([prepare(image, side) for image in images[start : start + 16]])))
                for key, values in parts.items():
                    values.append(out[key].numpy())
        fine, coarse = (np.concatenate(parts[key]) for key in ("fine", "coarse"))
        whole = np.concatenate([coarse.mean(axis=(2, 3)), coarse.std(axis=(2, 3))], axis=1)
        n = len(good)
        fitted, _, _ = GoodParts.fit(fine[:n], whole[:n])
        raw, (together, _) = highest(fitted.distances(pooled(fine[n:]), whole[n:])), fitted.judged(fine[n:], whole[n:])
        scores = {"whole image": raw[:, 0], "places": raw[:, 1], "together": together}
        kinds_of = np.array([s.kind for s in tests])
        shading = [auroc(kinds_of[keep] == "uneven", s[keep]) for keep in [np.isin(kinds_of, ("good", "uneven"))] for s in scores.values()]
        found[name] = {row: {"image": auroc(truth, s), "uneven": u} for (row, s), u in zip(scores.items(), shading, strict=True)}
    return found


def _pixel(cells: Sequence[Array | None], maps: Array) -> float | None:
    known = [(cell > 0.5, cv2.resize(one, (MAP, MAP))) for cell, one in zip(cells, maps, strict=True) if cell is not None]
    return auroc(np.stack([k for k, _ in known]).ravel(), np.stack([m for _, m in known]).ravel())


def report_lines(load: Callable[[str], dict[str, Any] | None]) -> list[str]:
    """Their tables."""
    lines = []
    if found := load("methods"):
        lines += [
            "## Good parts only: which method",
            "",
            "AUROC of images / of pixels, all on the shipped features, taught from good parts alone (562 tiles split by physical tile; 60 generated parts).",
            "",
            "| method | magnetic tiles | generated parts, mean of ten textures | worst texture |",
            "|---|---|---|---|",
        ]
        tiles, *others = found["result"].values()
        for row in tiles:
            pairs = [(r[row]["image"], r[row]["pixel"]) for r in others]
            means = [None if None in column else statistics.mean(column) for column in zip(*pairs, strict=True)]
            cells = [_pair(tiles[row]["image"], tiles[row]["pixel"]), _pair(*means), _pair(*min(pairs, key=lambda pair: pair[0]))]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        lines.append("")
    if found := load("steps"):
        lines += [
            "How far each step goes on the tiles: AUROC of images (of the kind `uneven`, shading over the whole image). Shipped: places at 256 pixels, the",
            "whole image at 128.",
            "",
            "| input | whole image | places | together |",
            "|---|---|---|---|",
        ]
        for name, row in found["result"].items():
            cells = [f"{v['image']:.3f} ({v['uneven']:.3f})" for v in row.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _pair(image: float, pixel: float | None) -> str:
    return f"{image:.3f} / " + ("-" if pixel is None else f"{pixel:.3f}")
