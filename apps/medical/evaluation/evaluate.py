"""`triscope medical evaluate`: a model against reference label maps, case by case."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import shared_runtime as rt
from apps.common.files import visible
from apps.medical.errors import InputError
from apps.medical.evaluation.metrics import bootstrap_interval, dice, hd95_mm, volume_error_percent
from apps.medical.segmentation.hippocampus import CROP_STRUCTURES, segment_hippocampi
from apps.medical.volume import Volume, read_labels, read_nifti, write_nifti

NAMES = {1: "anterior", 2: "posterior"}
METRICS = ("dice", "hd95_mm", "volume_error_percent")


def case_files(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Pairs of equal file name. Raises InputError where there are none, naming what was seen."""
    for folder in (images, labels):
        if not folder.is_dir():
            raise InputError(f"no folder at {folder}; expected NIfTI files with equal names in both folders")
    pairs = [(path, labels / path.name) for path in visible(images.glob("*.nii*")) if (labels / path.name).is_file()]
    if not pairs:
        counts = [len(visible(folder.glob("*.nii*"))) for folder in (images, labels)]
        raise InputError(
            f"no NIfTI file name stands in both {images} ({counts[0]} files) and {labels} ({counts[1]} files); expected pairs of equal name"
        )
    return pairs


def evaluate_case(image: Path, label: Path, session: rt.Session, out: Path | None) -> dict[str, Any]:
    """Metrics of one case by structure, its seconds, and its label map in `out`.

    An image that the model refuses counts as an empty answer, with the reason as a flag. Raises InputError where a file can't be read or
    the two do not fit.
    """
    start = time.monotonic()
    volume = read_nifti(image)
    try:
        result = segment_hippocampi(volume, session)
        labels, structures, flags = result.labels, result.structures, list(result.flags)
    except InputError as error:
        labels, structures, flags = np.zeros(volume.voxels.shape, np.uint8), CROP_STRUCTURES, [f"refused: {error}"]
    seconds = time.monotonic() - start
    reference = read_labels(label, volume, NAMES)
    predicted = _parts(labels, len(structures))
    if out is not None:
        write_nifti(labels, volume.affine, out / f"{image.name.removesuffix('.gz').removesuffix('.nii')}.nii.gz")
    case: dict[str, Any] = {"case": image.name, "seconds": round(seconds, 4), "flags": flags}
    scores = {name: _score(predicted == value, reference == value, volume) for value, name in NAMES.items()}
    scores["whole"] = _score(predicted > 0, reference > 0, volume)
    for metric in METRICS:
        case[metric] = {name: round(values[metric], 5) for name, values in scores.items()}
        case[metric]["mean"] = round(float(np.mean([case[metric][name] for name in NAMES.values()])), 5)
    return case


def _parts(labels: NDArray[np.uint8], structures: int) -> NDArray[np.uint8]:
    """A head's four labels as the two parts, both sides together."""
    return labels if structures == 2 else np.where(labels > 2, labels - 2, labels).astype(np.uint8)


def _score(prediction: NDArray[np.bool_], reference: NDArray[np.bool_], volume: Volume) -> dict[str, float]:
    box = np.argwhere(prediction | reference)
    if len(box):
        cut = tuple(slice(max(0, a - 1), b + 2) for a, b in zip(box.min(0), box.max(0), strict=True))
        prediction, reference = prediction[cut], reference[cut]
    return {
        "dice": dice(prediction, reference),
        "hd95_mm": hd95_mm(prediction, reference, volume.spacing_mm),
        "volume_error_percent": volume_error_percent(prediction, reference),
    }


def summarise(cases: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """`metrics` of the evaluation's JSON: for each metric the mean and one entry a label, with intervals.

    Volume errors enter as absolute values. A metric that is infinite in a case (nothing found) is
    averaged over the other cases; `failed` counts them.
    """
    rows = list(cases)
    metrics: dict[str, Any] = {}
    for metric in METRICS:
        metrics[metric], metrics[f"{metric}_interval"] = {}, {}
        for name in ("mean", *NAMES.values(), "whole"):
            values = np.abs([row[metric][name] for row in rows])
            finite = values[np.isfinite(values)]
            metrics[metric][name] = round(float(finite.mean()), 5) if finite.size else None
            metrics[f"{metric}_interval"][name] = [round(v, 5) for v in bootstrap_interval(values.tolist())]
    worst = min(rows, key=lambda row: row["dice"]["mean"])
    metrics["worst_case"] = {"case": worst["case"], "dice": worst["dice"]["mean"]}
    metrics["failed"] = sum(not np.isfinite(row["hd95_mm"]["mean"]) for row in rows)
    metrics["seconds_per_case"] = round(float(np.median([row["seconds"] for row in rows])), 4)
    return metrics
