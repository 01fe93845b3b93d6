"""What images teach: the statistics of good parts, regions, and a network that learned from labelled defects."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

import shared_runtime as rt
from apps.industrial.anomaly import regions
from apps.industrial.anomaly.statistics import GoodParts
from apps.industrial.classification.probe import Probe
from apps.industrial.errors import InputError
from apps.industrial.images import Pixels
from apps.industrial.inspection.inspector import features, scale_of
from apps.industrial.inspection.recipe import MODEL_FOLDER

logger = logging.getLogger(__name__)
HELD_BACK, FEW = 5, 10
"""Every fifth good part is held back from what the learned network sees, in blocks of neighbours; more of few parts, FEW where there
are as many again to learn from: thresholds from one or two parts would fail every second good one."""
LEARN_SECONDS = 25.0
"""How long the network may learn from defects on a GPU; an H200 is done in less than half of it."""
WHOLE_SECONDS, LEAST_SECONDS = 250.0, 60.0
"""On a CPU it learns until so long after teaching began, LEAST_SECONDS at least: all of it ends within five minutes on two cores."""
NEAR_PEAK, SHOWN = 0.6, 2.0
"""How far about its peak a defect without an outline is supposed, and what the shipped network's map has to say there, which knows
synthetic defects alone, beside the statistics: both chosen by the outlines of magnetic tiles and generated parts."""
SHIPPED_LAYERS = ("fine", "half")
"""Layers that regions are learned from beside a network of the recipe's own: what it says as the shipped one does."""
Report = Callable[[str, float], None]
Array = NDArray[np.float32]
OpenSession = Callable[[Path | None], rt.Session]


@dataclass
class Found:
    """What images taught. `scores` and `maps`: of the good ones that are judged to find thresholds, `judged`: what the network says of
    those, `bad_seen`: of the defective ones."""

    parts: GoodParts
    regions: regions.Regions | None
    scores: np.ndarray
    maps: np.ndarray
    judged: dict[str, np.ndarray]
    network: str
    bad_seen: dict[str, np.ndarray] = field(default_factory=dict)
    probe: Probe | None = None
    folder: tempfile.TemporaryDirectory[str] | None = None


_Fitted = tuple[GoodParts, np.ndarray, np.ndarray, regions.Regions | None]


def from_good(images: Sequence[Pixels], open_session: OpenSession, times: dict[str, float], report: Report) -> Found:
    """From good images alone; all are judged."""
    with open_session(None) as session:
        seen = _with_progress(session, images, report)
        parts, scores, maps, found = _fitted(session, images, seen, tuple(regions.LAYERS), times, report)
        return Found(parts, found, scores, maps, seen, session.model.sha256)


def from_defects(
    images: Sequence[Pixels],
    bad_images: Sequence[Pixels],
    outlines: Sequence[Array | None],
    open_session: OpenSession,
    place: str,
    seconds: float | None,
    start: float,
    times: dict[str, float],
    report: Report,
) -> Found:
    """From good images as the shipped network describes them, and from a copy of it that learns the defects at `place`.

    The copy does not see the good images that are judged. `outlines`: of the defects as `Sample.cells` gives them. `seconds`: how long
    it learns; without, what is left since `start`. Defects without outlines are learned where the statistics of good parts suppose them.
    """
    unseen = held_back(len(images))
    with open_session(None) as session:
        shipped, seen = session.model, _with_progress(session, images, report)

        def fit(report: Report) -> _Fitted:
            return _fitted(session, images, seen, SHIPPED_LAYERS, times, report)

        def learn(outlines: Sequence[Array], report: Report) -> tempfile.TemporaryDirectory[str]:
            begin = time.monotonic()
            left = LEARN_SECONDS if place == "cuda" else max(LEAST_SECONDS, WHOLE_SECONDS - (begin - start))
            folder = _learned(images, ~unseen, bad_images, outlines, shipped, seconds or left, place, report)
            times["learn"] = time.monotonic() - begin
            return folder

        known = [outline for outline in outlines if outline is not None]
        if place == "cuda" and len(known) == len(outlines):
            folder, fitted = _at_once(partial(learn, known), fit, report)
        else:
            fitted = fit(report)
            folder = learn(_supposed(session, bad_images, outlines, seen, fitted), report)
    begin = time.monotonic()
    with open_session(Path(folder.name) / MODEL_FOLDER) as session:
        judged = _with_progress(session, [image for image, held in zip(images, unseen, strict=True) if held], report)
        bad_seen = features(session, bad_images)
    probe = Probe.fit(seen["whole"][~unseen], bad_seen["whole"], judged["whole"])
    times["judge"] = time.monotonic() - begin
    parts, scores, maps, found = fitted
    return Found(parts, found, scores[unseen], maps[unseen], judged, session.model.sha256, bad_seen, probe, folder)


def held_back(parts: int) -> NDArray[np.bool_]:
    """Which of so many good parts the learned network does not see."""
    each = int(np.clip(parts // FEW, 2, HELD_BACK))
    return np.array([i // max(1, parts // 25) % each == each - 1 for i in range(parts)])


def _fitted(
    session: rt.Session,
    images: Sequence[Pixels],
    seen: dict[str, np.ndarray],
    layers: Sequence[str],
    times: dict[str, float],
    report: Report,
) -> _Fitted:
    """The statistics of good images with scores and maps of each by the others, and regions where there are enough."""
    begin = time.monotonic()
    parts, scores, maps = GoodParts.fit(seen["fine"], seen["whole"])
    found = None
    if len(images) >= regions.FEWEST:

        def look(some: Sequence[Pixels]) -> dict[str, np.ndarray]:
            return features(session, some)

        found, places = regions.Regions.fit(images, seen, look, report=lambda share: report("patching", share), names=layers)
        maps += places
    times["fit"] = time.monotonic() - begin
    return parts, scores, maps, found


def _supposed(
    session: rt.Session, images: Sequence[Pixels], outlines: Sequence[Array | None], seen: dict[str, np.ndarray], fitted: _Fitted
) -> list[Array]:
    """The `outlines`, and for None the place that looks least like good parts, of which the network said `seen`, with all
    that joins it and stands out from the image's median at least NEAR_PEAK as far. Where that is wrong the image's label is still right."""
    supposed: dict[int, Array] = {}
    if unknown := [i for i, outline in enumerate(outlines) if outline is None]:
        said, usual, (parts, _, _, found) = features(session, [images[i] for i in unknown]), scale_of(seen["map"]), fitted
        maps = parts.judged(said["fine"], said["whole"])[1] + SHOWN * np.maximum((said["map"] - usual[0]) / usual[1], 0)
        if found:
            maps += found.maps(said)
        for i, places in zip(unknown, maps - np.median(maps, axis=(1, 2), keepdims=True), strict=True):
            labels = cv2.connectedComponents((places >= NEAR_PEAK * places.max()).astype(np.uint8))[1]
            supposed[i] = (labels == labels.flat[places.argmax()]).astype(np.float32)
    return [supposed[i] if outline is None else outline for i, outline in enumerate(outlines)]


def _at_once(
    learn: Callable[[Report], tempfile.TemporaryDirectory[str]], fit: Callable[[Report], _Fitted], report: Report
) -> tuple[tempfile.TemporaryDirectory[str], _Fitted]:
    """`learn` on a GPU while `fit` runs on the CPU; the former reports."""
    with ThreadPoolExecutor(1) as pool:
        other: list[Future[_Fitted]] = []

        def learning(step: str, share: float) -> None:
            # Its first report comes when the GPU's graphs are captured: no other thread may use the GPU before.
            if not other:
                other.append(pool.submit(fit, lambda step, share: None))
            report(step, share)

        folder = learn(learning)
        return folder, other[0].result() if other else fit(report)


def _with_progress(session: rt.Session, images: Sequence[Pixels], report: Report) -> dict[str, np.ndarray]:
    parts = []
    for start in range(0, len(images), 16):
        parts.append(features(session, images[start : start + 16]))
        report("looking", min(1.0, (start + 16) / len(images)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def place_to_learn(device: str) -> str:
    """Where to learn: "cuda" or "cpu". Raises InputError without torch, and where a GPU was asked for and there is none."""
    try:
        import torch
    except ImportError as error:
        raise InputError(f"learning from labelled defects needs torch ({error}); install it with pip install 'triscope[train]'") from error
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for and torch sees no GPU; use --device cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def _learned(
    images: Sequence[Pixels],
    rows: np.ndarray,
    bad_images: Sequence[Pixels],
    outlines: Sequence[Array],
    base: rt.Model,
    seconds: float,
    place: str,
    report: Report,
) -> tempfile.TemporaryDirectory[str]:
    """Tune the network `base` on the examples; the folder with the new `model`."""
    import onnx
    import torch

    from apps.industrial.training.adapt import Examples, adapt
    from apps.industrial.training.export import network_from, taught, write_model

    good = [image for image, row in zip(images, rows, strict=True) if row]
    examples, shipped = Examples.of(good, bad_images, outlines), onnx.load(base.graph)
    network = adapt(network_from(shipped), examples, seconds, torch.device(place), report=lambda share: report("learning", share))
    folder = tempfile.TemporaryDirectory(prefix="triscope-recipe-")
    digest = write_model(
        taught(shipped, network),
        Path(folder.name) / MODEL_FOLDER,
        f"texture-features-{hashlib.sha256(str(time.time()).encode()).hexdigest()[:8]}",
        {"training": {"base": base.sha256, "good": len(good), "defects": len(outlines), "seconds": seconds}},
    )
    logger.info("learned from defects", extra={"defects": len(outlines), "device": place, "model": digest[:12]})
    return folder
