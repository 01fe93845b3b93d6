"""Learning a part's defects from a few labelled ones: cross-validation by tile."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from apps.industrial.evaluation.dataset import Sample, good_samples, labelled_samples
from apps.industrial.evaluation.evaluate import Judged, metrics
from apps.industrial.images import grey, read_image
from apps.industrial.inspection.inspector import Inspector
from apps.industrial.learning import LEARN_SECONDS
from apps.industrial.teaching import teach
from benchmarks.tiles import open_session, tile_folder, tile_groups

FOLDS, FOLDS_RUN = 5, int(os.environ.get("FEW_SHOT_FOLDS", "5"))
NUMBERS = (0, 5, 20, 50, None)
FEW: tuple[tuple[int | None, str, str], ...] = (
    *((number, "outlines", "split") for number in NUMBERS),
    (20, "boxes", "split"),
    (20, "labels", "split"),
    *((number, "outlines", "folds") for number in NUMBERS),
)
"""Labelled defects to learn from (None: all that the other folds have), what is known of each, and which good tiles are taught and judged:
those of the data set's own split in every fold, or those of the other folds and of this one."""
GOALS = {20: 0.95, 50: 0.98, None: 0.985}
CORES = 2


def few_shot() -> dict[str, Any]:
    """Cross-validation by tile: learn from n labelled defects of the other tiles, judge the held-out ones and good tiles.

    As `teach` does it on a GPU, or on two cores where there is none or FEW_SHOT_DEVICE=cpu. FEW_SHOT_WORKERS recipes are taught side by side;
    where they share a GPU each has as many times the time to learn. FEW_SHOT_GOOD=split or folds and FEW_SHOT_DEFECTS (as "50 all") run those
    rows alone.
    """
    import torch

    device = os.environ.get("FEW_SHOT_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
    workers = int(os.environ.get("FEW_SHOT_WORKERS", "1"))
    which = os.environ.get("FEW_SHOT_GOOD", "split folds").split()
    numbers = os.environ.get("FEW_SHOT_DEFECTS", " ".join(map(_number, NUMBERS))).split()
    few = [row for row in FEW if row[2] in which and _number(row[0]) in numbers]
    seconds = LEARN_SECONDS * max(1, workers / torch.cuda.device_count()) if device == "cuda" else None
    jobs = [(*row, fold, device, seconds) for row in few for fold in range(FOLDS_RUN)]
    context, rows = multiprocessing.get_context("spawn"), []
    turns = context.Value("i", 0)
    with ProcessPoolExecutor(workers, context, initializer=_pin, initargs=(turns, device)) as pool:
        for row in pool.map(_few_shot_row, jobs):
            print(row, flush=True)
            rows.append(row)
    gpu = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__} if device == "cuda" else None
    return {"device": device, "gpu": gpu, "cores_each": CORES, "side_by_side": workers, "rows": rows}


def _number(defects: int | None) -> str:
    return "all" if defects is None else str(defects)


def _pin(turns: Any, device: str) -> None:
    """Hold this process to CORES cores of its own, with no more threads than those, and to one GPU."""
    with turns.get_lock():
        turn, turns.value = turns.value, turns.value + 1
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[(turn * CORES + i) % len(cores)] for i in range(CORES)})
    os.environ["OMP_NUM_THREADS"] = str(CORES)
    import torch

    threadpool_limits(CORES)
    torch.set_num_threads(CORES)
    if device == "cuda":
        torch.cuda.set_device(turn % torch.cuda.device_count())


def _few_shot_row(job: tuple[int | None, str, str, int, str, float | None]) -> dict[str, Any]:
    """One recipe: taught from so many defects of the other folds, with their outlines, boxes or labels alone."""
    number, known, tiles, fold, device, learn = job
    tests, good = labelled_samples(tile_folder()), good_samples(tile_folder() / "train" / "good")
    bad, judged = [s for s in tests if s.defective], [s for s in tests if not s.defective]
    if tiles == "folds":
        every = [*good, *judged]
        held_good = _folds(every, tile_groups()) == fold
        good, judged = ([s for s, out in zip(every, held_good, strict=True) if out == held] for held in (False, True))
    fold_of = _folds(bad, tile_groups())
    pool = np.random.default_rng(100 + fold).permutation(np.flatnonzero(fold_of != fold))[:number]
    begin = time.perf_counter()
    taught = teach("tiles", good, [_known(bad[i], known) for i in pool], open_session, seconds=learn, device=device)
    seconds = time.perf_counter() - begin
    with open_session(taught.recipe.model) as session:
        held = [bad[i] for i in np.flatnonzero(fold_of == fold)] + judged
        result = metrics(_judged_together(Inspector(taught.recipe, session), held))
    keys = ("image_auroc", "pixel_auroc", "pro", "recall_at_fpr_1pct", "recall_at_fpr_5pct", "image_auroc_by_kind")
    times = {"teach_seconds": seconds, "learn_seconds": taught.seconds.get("learn", 0.0)}
    return {"defects": number, "known": known, "good": tiles, "fold": fold, **times, **{key: result[key] for key in keys}}


def _known(sample: Sample, known: str) -> Sample:
    """The same defect with less said of it."""
    if known == "outlines" or sample.mask is None:
        return sample
    if known == "labels":
        return Sample(sample.path, sample.kind)
    mask = (grey(read_image(sample.mask)) >= 128).astype(np.uint8)
    found = cv2.connectedComponentsWithStats(mask)[2][1:]
    return Sample(sample.path, sample.kind, boxes=tuple((float(x), float(y), float(w), float(h)) for x, y, w, h, _ in found))


def _folds(samples: Sequence[Sample], groups: dict[tuple[str, str], str]) -> NDArray[np.int64]:
    """The fold of each sample: all photographs of one tile are in one."""
    names = [groups["/".join(sample.path.parts[-3:-1]), sample.path.name] for sample in samples]
    order = {g: i % FOLDS for i, g in enumerate(np.random.default_rng(0).permutation(np.unique(names)))}
    return np.array([order[name] for name in names])


def _judged_together(inspector: Inspector, samples: Sequence[Sample]) -> list[Judged]:
    found = []
    for start in range(0, len(samples), 32):
        some = samples[start : start + 32]
        images = [sample.read(inspector.recipe.facts.white) for sample in some]
        for sample, image, result in zip(some, images, inspector.inspect_many(images), strict=True):
            found.append(Judged(sample, result.score, result.verdict, 0.0, result.map, sample.cells(image.shape)))
    return found


def report_lines(results: Sequence[dict[str, Any]], where: Callable[[dict[str, Any]], str]) -> list[str]:
    """The page's part on learning from defects, of the runs that there are."""
    goals = ", ".join(f"{goal} from {number or 'all'}" for number, goal in GOALS.items())
    lines = [
        "## A few labelled defects",
        "",
        f"Cross-validation by tile on magnetic tiles, {FOLDS} folds (`folds` says how many were run): a recipe is taught from all 562 good tiles and n labelled",
        "defects of the other folds' tiles, then judges the held-out defects beside all 190 good test tiles. Goals for image AUROC:",
        f"{goals}. Three good test tiles carry marks like cracks and head the false alarms.",
        "",
    ]
    for found in results:
        r = found["result"]
        learned = statistics.median(row["learn_seconds"] for row in r["rows"] if row["defects"] != 0)
        whole = max(row["teach_seconds"] for row in r["rows"])
        place = (
            f"a GPU ({r['gpu']['gpu']}) and {r['cores_each']} cores" if r["gpu"] else f"{where(found)}, {r['cores_each']} of them a recipe"
        )
        for tiles in ("split", "folds"):
            if rows := [row for row in r["rows"] if row.get("good", "split") == tiles]:
                if tiles == "folds":
                    lines += ["The good tiles in folds as well: each fold judges some 150 of all 752, taught from the others.", ""]
                lines += [
                    f"On {place}, {r['side_by_side']} recipes side by side: {learned:.0f} s of learning (median), {whole:.0f} s at most for the whole of teaching.",
                    "",
                    "| defects | folds | image AUROC (range) | pixel AUROC | recall at 5 % false rejects |",
                    "|---|---|---|---|---|",
                    *_rows(rows),
                    "",
                ]
        lines += [r["note"], ""] if "note" in r else []
    return lines


def _rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    groups = {(row["defects"], row.get("known", "outlines")) for row in rows}
    for number, known in sorted(groups, key=lambda g: (1e9 if g[0] is None else g[0], g[1] != "outlines", g[1])):
        own = [row for row in rows if (row["defects"], row.get("known", "outlines")) == (number, known)]
        image, recall = ([row[key] for row in own] for key in ("image_auroc", "recall_at_fpr_5pct"))
        pixel = [row["pixel_auroc"] for row in own if "pixel_auroc" in row]
        label = ("all (about 258)" if number is None else str(number)) + {"boxes": ", boxes", "labels": ", labels alone"}.get(known, "")
        spread = f"{statistics.mean(image):.3f} ({min(image):.3f}-{max(image):.3f})"
        lines.append(
            f"| {label} | {len(own)} | {spread} | {f'{statistics.mean(pixel):.3f}' if pixel else '-'} | {statistics.mean(recall):.3f} |"
        )
    return lines
