"""Trains and cross-validates `hippocampus-t1` on NIfTI pairs in the layout of the Decathlon's Task04."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.losses import DiceCELoss
from numpy.typing import NDArray
from scipy import ndimage

from apps.common.files import visible
from apps.medical.errors import InputError
from apps.medical.evaluation.evaluate import NAMES
from apps.medical.evaluation.metrics import dice, hd95_mm, volume_error_percent
from apps.medical.preprocessing.normalise import normalise_mr
from apps.medical.segmentation.network import hippocampus_network
from apps.medical.segmentation.views import merged, views
from apps.medical.segmentation.window import centred_placement, place_in_window
from apps.medical.training.augment import augment, standardise
from apps.medical.volume import read_labels, read_nifti


@dataclass(frozen=True)
class Recipe:
    """What a training run does; recorded in the model's card."""

    steps: int
    batch: int = 8
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    average_decay: float = 0.998
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """One training pair on the window's grid, and its file name.

    `image` has zeros around the crop; `filled` has the crop's reflection there, so that a network that is
    trained on both does not depend on what lies around a crop.
    """

    name: str
    image: NDArray[np.float32]
    filled: NDArray[np.float32]
    label: NDArray[np.uint8]
    shape: tuple[int, ...]


def read_cases(data: Path) -> list[Case]:
    """All pairs `images/NAME.nii.gz`, `labels/NAME.nii.gz` below `data`, 1 mm RAS, sorted by name.

    Raises InputError where there are none, and for a pair that can't be learned from.
    """
    cases = []
    for path in visible((data / "images").glob("*.nii*")):
        if not (data / "labels" / path.name).is_file():
            raise InputError(f"{path} has no label map {data / 'labels' / path.name}; expected pairs of equal name")
        volume = read_nifti(path)
        found = read_labels(data / "labels" / path.name, volume, NAMES)
        voxels, labels = (_canonical(array, volume.affine) for array in (volume.voxels, found))
        window = place_in_window(normalise_mr(voxels))
        cases.append(Case(path.name, window, _filled(window, labels.shape), place_in_window(labels, np.uint8), labels.shape))
    if not cases:
        raise InputError(f"no images/*.nii.gz below {data}; expected the layout images/NAME, labels/NAME")
    return cases


def _canonical(array: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    """`array` with its axes turned to RAS."""
    return np.asarray(nib.apply_orientation(array, nib.io_orientation(affine)))


def _filled(window: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The window with the empty margin around a crop of `shape` filled by reflection."""
    _, inside = centred_placement(shape)
    margins = [(part.start, size - part.stop) for part, size in zip(inside, window.shape, strict=True)]
    return np.pad(window[inside], margins, mode="reflect")


def folds(count: int, number: int, seed: int = 0) -> list[NDArray[np.int64]]:
    """Indices of the held-out cases of each fold: a seeded shuffle cut in `number` parts."""
    return [np.sort(part) for part in np.array_split(np.random.default_rng(seed).permutation(count), number)]


class _Average:
    """Exponential moving average of the weights, with the warm-up of Polyak averaging."""

    def __init__(self, network: torch.nn.Module, decay: float) -> None:
        self._decay, self._step = decay, 0
        self.state = {k: v.detach().clone() for k, v in network.state_dict().items()}

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def update(self, network: torch.nn.Module) -> None:
        self._step += 1
        keep = min(self._decay, self._step / (self._step + 10))
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1 - keep)
            else:
                self.state[key].copy_(value)


def train(cases: Sequence[Case], recipe: Recipe, device: torch.device, log: Path | None = None) -> torch.nn.Module:
    """The averaged network after `recipe.steps` on `device`; progress as JSON lines in `log`."""
    torch.manual_seed(recipe.seed)
    torch.backends.cudnn.benchmark = True
    images = torch.from_numpy(np.stack([c.image for c in cases]))[:, None].to(device)
    filled = torch.from_numpy(np.stack([c.filled for c in cases]))[:, None].to(device)
    labels = torch.from_numpy(np.stack([c.label for c in cases])).to(device)
    network = hippocampus_network(deep_supervision=True).to(device, memory_format=torch.channels_last_3d)
    average = _Average(network, recipe.average_decay)
    optimiser = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    loss_function = DiceCELoss(include_background=False, softmax=True, to_onehot_y=True, batch=True, lambda_ce=1.0)
    network.train()
    start = time.monotonic()
    for step in range(1, recipe.steps + 1):
        warm = min(1.0, step / 100)
        rate = recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * (step - 1) / recipe.steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(cases), (recipe.batch,), device=device)
        with torch.no_grad():
            fill = torch.rand(recipe.batch, 1, 1, 1, 1, device=device) < 0.5
            image, label = augment(torch.where(fill, filled[chosen], images[chosen]), labels[chosen])
        image = image.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            heads = network(image)
        target = label[:, None]
        losses = [loss_function(heads[:, i].float(), target) for i in range(heads.shape[1])]
        weights = [0.5**i for i in range(len(losses))]
        loss = torch.stack([w * part for w, part in zip(weights, losses, strict=True)]).sum() / sum(weights)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimiser.step()
        average.update(network)
        if step % 100 == 0 and log is not None:
            with log.open("a") as stream:
                stream.write(json.dumps({"step": step, "seconds": time.monotonic() - start, "loss": float(loss.detach())}) + "\n")
    network.load_state_dict(average.state)
    result = hippocampus_network().to(device)
    result.load_state_dict({k: v for k, v in average.state.items() if k in result.state_dict()})
    return result.eval()


@torch.no_grad()  # type: ignore[untyped-decorator]
def predict(network: torch.nn.Module, case: Case, device: torch.device) -> NDArray[np.uint8]:
    """Label map of a case on the window's grid: mean over its views, largest component."""
    image = standardise(torch.from_numpy(case.image)[None, None])[0, 0].numpy()
    probability = network(torch.from_numpy(views(image)).to(device)).softmax(1)
    return largest_component(merged(probability.cpu().numpy()).argmax(0).astype(np.uint8))


def largest_component(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Keep the largest connected part of the foreground; the others become background."""
    parts, count = ndimage.label(labels > 0)
    if count < 2:
        return labels
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.where(parts == sizes.argmax(), labels, 0).astype(np.uint8)


def score(case: Case, prediction: NDArray[np.uint8]) -> dict[str, Any]:
    """Dice, HD95 [mm] and volume error [%] of one case, a value a structure, within its own extent."""
    result: dict[str, Any] = {"case": case.name}
    _, inside = centred_placement(case.shape)
    for name, value in (("anterior", 1), ("posterior", 2), ("whole", None)):
        a = prediction[inside] > 0 if value is None else prediction[inside] == value
        b = case.label[inside] > 0 if value is None else case.label[inside] == value
        result[name] = {
            "dice": dice(a, b),
            "hd95_mm": hd95_mm(a, b, (1, 1, 1)),
            "volume_error_percent": volume_error_percent(a, b),
        }
    return result


def run_fold(data: Path, out: Path, fold: int | None, number: int, recipe: Recipe, device_name: str, threads: int) -> None:
    """Train one fold (or on every case where `fold` is None) and leave weights and scores in `out`."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    cases = read_cases(data)
    held: set[int] = set() if fold is None else set(folds(len(cases), number)[fold].tolist())
    name = "all" if fold is None else f"fold{fold}"
    network = train([c for i, c in enumerate(cases) if i not in held], recipe, device, out / f"{name}.log.jsonl")
    state = {k: v.half().cpu() for k, v in network.state_dict().items()}
    torch.save(state, out / f"{name}.pt")
    network.load_state_dict({k: v.float() for k, v in state.items()})
    scores = [score(cases[i], predict(network, cases[i], device)) for i in sorted(held)]
    (out / f"{name}.json").write_text(json.dumps(scores))
