"""What a network that learned from defects sees in one view of an image, in two and in three: generated parts of five textures."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from apps.industrial.acquisition.generated import write_dataset
from apps.industrial.anomaly.statistics import GoodParts
from apps.industrial.classification.probe import Probe
from apps.industrial.evaluation.dataset import good_samples, labelled_samples
from apps.industrial.evaluation.metrics import auroc
from apps.industrial.features import PEAK, SIZE, prepared
from apps.industrial.inspection.inspector import combined, features, scale_of
from apps.industrial.learning import held_back
from apps.industrial.teaching import learned_weight
from apps.industrial.training.adapt import Examples, adapt
from apps.industrial.training.export import VIEWS, network_from
from apps.industrial.training.network import TextureNetwork
from benchmarks.tiles import open_session

Array = NDArray[np.float32]
TEXTURES = ("granite", "leather", "paper", "perforated", "wood")
GOOD, EACH, LEARNED, SECONDS = 49, 60, 40, 60.0
ROWS: dict[str, tuple[tuple[int, bool], ...]] = {
    "256": ((256, False),),
    "256 and mirrored": ((256, False), (256, True)),
    "192 and 224 mirrored": ((192, False), (224, True)),
    "256 and 192 mirrored": ((256, False), (192, True)),
    "256, 224 mirrored, 192": ((256, False), (224, True), (192, False)),
}
assert VIEWS in ROWS.values()


def views() -> dict[str, Any]:
    """Image AUROC of each texture in each row, all of one network; SECONDS of learning from LEARNED defects on the CPU."""
    rows = {}
    for texture in TEXTURES:
        with tempfile.TemporaryDirectory() as folder:
            rows[texture] = _texture(texture, Path(folder))
        print(texture, rows[texture], flush=True)
    return {"good": GOOD, "defects": LEARNED, "seconds": SECONDS, "rows": rows}


def _texture(texture: str, folder: Path) -> dict[str, float]:
    write_dataset(folder, texture, good=GOOD, each=EACH, seed=5)
    tests = labelled_samples(folder)
    bad, good_tests = [s for s in tests if s.defective], [s for s in tests if not s.defective]
    order = np.random.default_rng(0).permutation(len(bad))
    defects, judged = [bad[i] for i in order[:LEARNED]], [*good_tests, *(bad[i] for i in order[LEARNED:200])]
    good, unseen = [s.read() for s in good_samples(folder / "train" / "good")], held_back(GOOD)
    images, defective = [s.read() for s in judged], [s.read() for s in defects]
    with open_session(None) as session:
        of_good, of_bad, of_judged = (features(session, some) for some in (good, defective, images))
        shipped = onnx.load(session.model.graph)
    parts, _, _ = GoodParts.fit(of_good["fine"], of_good["whole"])
    unlike, _ = parts.judged(of_judged["fine"], of_judged["whole"])
    probe = Probe.fit(of_good["whole"][~unseen], of_bad["whole"], of_good["whole"][unseen])
    taught = [image for image, held in zip(good, unseen, strict=True) if not held]
    examples = Examples.of(taught, defective, [s.cells(image.shape) for s, image in zip(defects, defective, strict=True)])
    network = adapt(network_from(shipped), examples, SECONDS, torch.device("cpu"))
    held = [image for image, out in zip(good, unseen, strict=True) if out]
    logits = {view: _logits(network, [*held, *images], *view) for view in {view for row in ROWS.values() for view in row}}
    truth, weight, result = [s.defective for s in judged], learned_weight(len(defects)), {}
    for name, row in ROWS.items():
        mean = np.mean([logits[view] for view in row], axis=0)
        scores = combined(unlike, mean[len(held) :], weight, scale_of(mean[: len(held)]))
        result[name] = round(float(auroc(truth, probe.joined(scores, of_judged["whole"]).tolist()) or 0.0), 5)
    return result


def _logits(network: TextureNetwork, images: Sequence[NDArray[np.uint8]], side: int, mirrored: bool) -> Array:
    """(N,) what `learned_scores` would say of this view."""
    found = []
    with torch.no_grad():
        for start in range(0, len(images), 16):
            pixels = torch.from_numpy(np.stack([prepared(image) for image in images[start : start + 16]]))
            if side != SIZE:
                pixels = torch.nn.functional.interpolate(pixels, size=(side, side), mode="bilinear")
            out = network(pixels.flip(3) if mirrored else pixels)
            found.append((out["image"] + out["map"].flatten(1).topk(PEAK).values.mean(dim=1)) / 2)
    return np.asarray(torch.cat(found).numpy(), np.float32)


def report_lines(result: dict[str, Any], host: str) -> list[str]:
    """The page's part on views."""
    textures = list(result["rows"])
    lines = [
        "What more views of an image bring: image AUROC on generated parts, all rows of one network a texture,",
        f"{result['good']} good parts and {result['defects']} outlined defects, {result['seconds']:.0f} s of learning ({host}). A recipe's own network looks as the last row does.",
        "",
        f"| side in pixels | {' | '.join(textures)} | mean |",
        "|---|" + "---|" * (len(textures) + 1),
    ]
    for name in ROWS:
        values = [result["rows"][texture][name] for texture in textures]
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} | {statistics.mean(values):.3f} |")
    return [*lines, ""]
