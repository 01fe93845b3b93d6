"""Benchmarks of the industrial app: methods, inspection, learning from defects, kinds, golden templates."""

from __future__ import annotations

import csv
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
from numpy.typing import NDArray

from apps.industrial.classification.kinds import KindClassifier
from apps.industrial.evaluation.dataset import Sample, good_samples, labelled_samples
from apps.industrial.evaluation.evaluate import judge, metrics
from apps.industrial.features import prepared
from apps.industrial.images import grey, read_image
from apps.industrial.inspection.inspector import Inspector, features
from apps.industrial.inspection.recipe import RecipeBook
from apps.industrial.inspection.template import compare
from apps.industrial.teaching import Taught, teach
from benchmarks.few_shot import few_shot
from benchmarks.few_shot import report_lines as few_shot_lines
from benchmarks.industrial_methods import methods, steps
from benchmarks.industrial_methods import report_lines as methods_lines
from benchmarks.tiles import open_session, tile_folder, tile_groups
from benchmarks.views import report_lines as views_lines
from benchmarks.views import views

Array = NDArray[np.float32]


def _taught(name: str, good: Sequence[Sample]) -> Taught:
    return teach(name, good, (), open_session, device="cpu")


def inspection() -> dict[str, Any]:
    """Good parts only, on magnetic tiles: accuracy, and the time of an image on one thread, split."""
    good, tests = good_samples(tile_folder() / "train" / "good"), labelled_samples(tile_folder())
    begin = time.perf_counter()
    taught = _taught("tiles", good)
    seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    _taught("tiles", good[:200])
    seconds_200 = time.perf_counter() - begin
    with open_session(threads=1) as session:
        inspector = Inspector(taught.recipe, session)
        judged = judge(inspector, tests)
        images = [sample.read() for sample in tests[:40]]
        split: dict[str, list[float]] = {"prepare": [], "network": [], "whole": []}
        cv2.setNumThreads(1)
        for image in images * 3:
            start = time.perf_counter()
            pixels = prepared(image)[None]
            middle = time.perf_counter()
            session.run({"pixels": pixels})
            end = time.perf_counter()
            inspector.inspect(image)
            for key, value in (("prepare", middle - start), ("network", end - middle), ("whole", time.perf_counter() - end)):
                split[key].append(1e3 * value)
        size = session.model.graph.stat().st_size
        change_ms = []
        with tempfile.TemporaryDirectory() as folder:
            book = RecipeBook(Path(folder))
            book.save(taught.recipe)
            for image in images[:10]:
                begin = time.perf_counter()
                Inspector(book.load("tiles"), session).inspect(image)
                change_ms.append(1e3 * (time.perf_counter() - begin))
    facts, resident = taught.recipe.facts, psutil.Process().memory_info().rss / 2**20
    return {
        "metrics": metrics(judged),
        "good": facts.good,
        "expected_false_fail": facts.calibration.fail.expected,
        "teach_seconds": {str(facts.good): seconds, "200": seconds_200},
        "ms_one_thread": {key: statistics.median(values) for key, values in split.items()},
        "model_bytes": size,
        "recipe_change_ms": statistics.median(change_ms),
        "resident_mib": resident,
        "learned": _own_network(good[:200], tests, images * 3),
    }


def _own_network(good: Sequence[Sample], tests: Sequence[Sample], images: Sequence[Array]) -> dict[str, float]:
    """An image's time on one thread, and the size of the model, where a recipe learned from 20 labelled defects."""
    defects = [sample for sample in tests if sample.defective][:20]
    taught = teach("tiles", good, defects, open_session, device="cpu", seconds=5)
    with open_session(taught.recipe.model, threads=1) as session:
        inspector, times = Inspector(taught.recipe, session), []
        for image in images:
            begin = time.perf_counter()
            inspector.inspect(image)
            times.append(1e3 * (time.perf_counter() - begin))
        return {"ms": statistics.median(times), "model_bytes": session.model.graph.stat().st_size}


def kinds() -> dict[str, Any]:
    """Naming the kind of a defect from a few samples a kind, on the shipped features: accuracy, mean of ten draws."""
    groups = tile_groups()
    tiles = [s for s in labelled_samples(tile_folder()) if s.defective]
    steel_folder = Path(os.environ["TRISCOPE_DATA_DIR"]) / "neu_cls"
    steel = [
        Sample(path, folder.name) for folder in sorted(steel_folder.iterdir()) if folder.is_dir() for path in sorted(folder.glob("*.jpg"))
    ]
    sets: dict[str, tuple[list[Sample], list[str]]] = {
        "magnetic tiles, by tile": (tiles, [groups[f"test/{s.kind}", s.path.name] for s in tiles]),
        "NEU steel": (steel, [str(s.path) for s in steel]),
    }
    found: dict[str, Any] = {}
    with open_session() as session:
        for name, (samples, units) in sets.items():
            embedding = features(session, [s.read() for s in samples])["embedding"]
            labels, unit = np.array([s.kind for s in samples]), np.array(units)
            found[name] = {}
            for each in (5, 20, 100):
                scores = [_kind_accuracy(embedding, labels, unit, each, seed) for seed in range(10)]
                mean = np.mean(scores, axis=0)
                found[name][str(each)] = {"accuracy": float(mean[0]), "balanced": float(mean[1]), "tested": float(mean[2])}
    return found


def _kind_accuracy(embedding: Array, labels: NDArray[np.str_], unit: NDArray[np.str_], each: int, seed: int) -> tuple[float, float, int]:
    """Half of the units (tiles) of each kind to draw samples from, the others to test."""
    rng = np.random.default_rng(seed)
    train: list[int] = []
    test: list[int] = []
    for kind in np.unique(labels):
        own = np.flatnonzero(labels == kind)
        names = rng.permutation(np.unique(unit[own]))
        first = set(names[: len(names) // 2])
        inside = np.array([u in first for u in unit[own]])
        train += rng.permutation(own[inside])[:each].tolist()
        test += own[~inside].tolist()
    model = KindClassifier.fit(embedding[train], labels[train].tolist())
    said = np.array(model.names)[model.probabilities(embedding[test]).argmax(1)]
    right = said == labels[test]
    return float(right.mean()), float(np.mean([right[labels[test] == k].mean() for k in np.unique(labels)])), len(test)


def templates() -> dict[str, Any]:
    """Golden templates on DeepPCB: boxes beside plain XOR with a 3 x 3 opening and the same margin; recall and precision at IoU 0.33."""
    folder = Path(os.environ["TRISCOPE_DATA_DIR"]) / "deeppcb"
    truth: dict[str, list[tuple[int, int, int, int]]] = {}
    with (folder / "boxes.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            truth.setdefault(row["image"], []).append((int(row["x1"]), int(row["y1"]), int(row["x2"]), int(row["y2"])))

    def ours(template: NDArray[np.uint8], tested: NDArray[np.uint8]) -> list[tuple[int, int, int, int]]:
        return [(b.x, b.y, b.x + b.width, b.y + b.height) for b in compare(template, tested).boxes]

    def xor(template: NDArray[np.uint8], tested: NDArray[np.uint8]) -> list[tuple[int, int, int, int]]:
        different = ((template >= 128) ^ (tested >= 128)).astype(np.uint8)
        opened = cv2.morphologyEx(different, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        stats = cv2.connectedComponentsWithStats(opened, connectivity=8)[2][1:]
        return [(int(x) - 8, int(y) - 8, int(x + w) + 8, int(y + h) + 8) for x, y, w, h, _ in stats]

    totals = {"golden template": [0, 0, 0], "XOR": [0, 0, 0]}
    times: dict[str, list[float]] = {name: [] for name in totals}
    cv2.setNumThreads(1)
    for image, boxes in truth.items():
        stem = Path(image).name.replace("_test.jpg", "").replace("_temp.jpg", "").removesuffix(".jpg")
        pair = [grey(read_image(folder / "images" / f"{stem}_{part}.jpg")) for part in ("temp", "test")]
        for name, run in (("golden template", ours), ("XOR", xor)):
            begin = time.perf_counter()
            said = run(*pair)
            times[name].append(1e3 * (time.perf_counter() - begin))
            hit = _matched(said, boxes)
            for i, value in enumerate((hit, len(said), len(boxes))):
                totals[name][i] += value
    rows = {
        name: {"recall": hit / wanted, "precision": hit / max(1, said), "ms": statistics.median(times[name])}
        for name, (hit, said, wanted) in totals.items()
    }
    return {"pairs": len(truth), "boxes": sum(map(len, truth.values())), "rows": rows}


def _matched(said: Sequence[tuple[int, int, int, int]], wanted: Iterable[tuple[int, int, int, int]], least: float = 0.33) -> int:
    left, hits = list(said), 0
    for a in wanted:
        best, place = 0.0, -1
        for i, b in enumerate(left):
            across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            shared = max(0, across) * max(0, down)
            value = shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
            best, place = (value, i) if value > best else (best, place)
        if best > least:
            hits += 1
            left.pop(place)
    return hits


def one_class() -> dict[str, Any]:
    """Good parts only on NEU, which nothing was chosen on: each kind of steel surface as the good one, the other five as what must be found."""
    folder = Path(os.environ["TRISCOPE_DATA_DIR"]) / "neu_cls"
    images = {place.name: sorted(place.glob("*.jpg")) for place in sorted(folder.iterdir()) if place.is_dir()}
    rows = {}
    for kind, own in images.items():
        rng = np.random.default_rng(0)
        order = [own[i] for i in rng.permutation(len(own))]
        tests = [Sample(path, "good") for path in order[150:200]]
        for other in (name for name in images if name != kind):
            tests += [Sample(images[other][i], other) for i in rng.permutation(len(images[other]))[:15]]
        taught = _taught(kind, [Sample(path, "good") for path in order[:150]])
        with open_session() as session:
            judged = judge(Inspector(taught.recipe, session), tests)
        found = metrics(judged)
        rows[kind] = {key: found[key] for key in ("image_auroc", "image_auroc_interval", "recall_at_fpr_5pct", "verdicts")}
    return {"taught": 150, "good": 50, "others": 75, "rows": rows}


SUITES: dict[str, Callable[[], dict[str, Any]]] = {
    "inspection": inspection,
    "one_class": one_class,
    "methods": methods,
    "steps": steps,
    "few_shot": few_shot,
    "views": views,
    "kinds": kinds,
    "templates": templates,
}
NEED_DATA = set(SUITES)


def report_lines(load: Callable[[str], dict[str, Any] | None], where: Callable[[dict[str, Any]], str]) -> list[str]:
    """The industrial part of docs/benchmarks.md."""
    lines = ["# Industrial", "", *methods_lines(load)]
    if found := load("inspection"):
        lines += _inspection_lines(found, where)
    if found := load("one_class"):
        r = found["result"]
        lines += [
            "## Good parts only: surfaces that nothing was chosen on",
            "",
            f"NEU, hot-rolled steel: each of its six kinds of surface as the good one, {r['taught']} images to teach; {r['good']} others of that kind and "
            f"{r['others']} of the other five",
            "to judge. Another kind of surface is easier to find than a small defect: this says that a recipe holds on other pictures, not how small a defect may be.",
            "",
            "| good | image AUROC | good ones that passed, review, fail | others that passed, review, fail |",
            "|---|---|---|---|",
        ]
        for kind, row in r["rows"].items():
            low, high = row["image_auroc_interval"]
            cells = [", ".join(str(row["verdicts"][which][v]) for v in ("pass", "review", "fail")) for which in ("good", "defective")]
            lines.append(f"| {kind} | {row['image_auroc']:.3f} ({low:.3f}-{high:.3f}) | " + " | ".join(cells) + " |")
        lines.append("")
    if few := [found for name in ("few_shot_gpu", "few_shot", "few_shot_folds") if (found := load(name))]:
        lines += few_shot_lines(few, where)
    if found := load("views"):
        lines += views_lines(found["result"], where(found))
    if found := load("kinds"):
        lines += [
            "## The kind of a defect",
            "",
            "Logistic regression on the shipped features; accuracy (balanced accuracy), mean of ten draws; tiles in training and test are different ones.",
            "Where a kind has fewer samples, all of them are taken.",
            "",
            "| samples a kind | " + " | ".join(found["result"]) + " |",
            "|---|" + "---|" * len(found["result"]),
        ]
        for each in ("5", "20", "100"):
            cells = [f"{r[each]['accuracy']:.3f} ({r[each]['balanced']:.3f})" for r in found["result"].values()]
            lines.append(f"| {each} | " + " | ".join(cells) + " |")
        lines.append("")
    if found := load("templates"):
        r = found["result"]
        lines += [
            "## Golden templates",
            "",
            f"{r['pairs']} pairs of DeepPCB with {r['boxes']} boxes, IoU above 0.33, {where(found)}, one thread.",
            "",
            "| | recall | precision | times the quickest |",
            "|---|---|---|---|",
        ]
        quickest = min(row["ms"] for row in r["rows"].values())
        lines += [f"| {n} | {v['recall']:.3f} | {v['precision']:.3f} | {v['ms'] / quickest:.1f} |" for n, v in r["rows"].items()] + [""]
    return lines


def _inspection_lines(found: dict[str, Any], where: Callable[[dict[str, Any]], str]) -> list[str]:
    r, m = found["result"], found["result"]["metrics"]
    low, high = m["image_auroc_interval"]
    ms = r["ms_one_thread"]
    share = ms["network"] / ms["whole"]
    kinds_line = ", ".join(f"{kind} {value:.3f}" for kind, value in m["image_auroc_by_kind"].items())
    return [
        "## Good parts only: the recipe on magnetic tiles",
        "",
        f"{r['good']} good tiles; image AUROC **{m['image_auroc']:.3f}** ({low:.3f}-{high:.3f}), goal 0.88; pixel AUROC {m['pixel_auroc']:.3f}, goal 0.90;",
        f"PRO {m['pro']:.3f}; recall {m['recall_at_fpr_1pct']:.3f} at 1 % and {m['recall_at_fpr_5pct']:.3f} at 5 % false rejects.",
        f"By kind: {kinds_line}. Three of the good test tiles show marks that look like cracks; they head the list of false alarms.",
        "",
        f"One image on one thread: {ms['whole']:.0f} ms, {share:.0%} of it the network ({where(found)}). Model {r['model_bytes'] / 1e6:.2f} MB.",
        f"Where it learned from labelled defects: {r['learned']['ms']:.0f} ms, {r['learned']['model_bytes'] / 1e6:.2f} MB.",
        f"Teaching: {r['teach_seconds']['200']:.0f} s from 200 images, {r['teach_seconds'][str(r['good'])]:.0f} s from {r['good']}; resident {r['resident_mib']:.0f} MiB.",
        f"Changing to a recipe that is not in memory, first verdict included: {r['recipe_change_ms']:.0f} ms.",
        "",
    ]
