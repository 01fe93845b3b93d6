"""One recipe from a trained torch network to a small one: train with L1 -> prune channels -> distil -> quantize, guarded at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.quantization import qat

Pairs = Iterable[tuple[Mapping[str, Any], Any]]


@dataclass(frozen=True)
class Compression:
    """`l1`: weight of the L1 penalty on convolution channels; `share`: channels that go; epochs of each stage;
    `temperature` and `blend` of the distillation (Hinton et al., 2015): `blend` is the teacher's part of the loss."""

    l1: float = 1e-5
    share: float = 0.25
    epochs: int = 2
    distil_epochs: int = 4
    quantized_epochs: int = 2
    learning_rate: float = 1e-3
    temperature: float = 2.0
    blend: float = 0.7


@dataclass(frozen=True)
class Step:
    """What one stage left: its name, parameters, and the mean loss of its last epoch."""

    name: str
    parameters: int
    loss: float


def compress(
    module: Any,
    pairs: Pairs,
    loss: Callable[[Any, Any], Tensor],
    example: Mapping[str, Any],
    folder: Path,
    name: str,
    recipe: Compression | None = None,
) -> tuple[Path, list[Step]]:
    """The small network's model folder (QDQ INT8) and what each stage did. `module` is not changed.

    `pairs`: (inputs, target) batches, read once and kept. Raises UnsupportedModelError where no channel can go.
    """
    recipe, data = recipe or Compression(), list(pairs)
    teacher = copy.deepcopy(module).eval()
    student = copy.deepcopy(module)
    steps: list[Step] = []

    def note(title: str, history: list[float]) -> None:
        steps.append(Step(title, sum(p.numel() for p in student.parameters()), history[-1] if history else float("nan")))

    history = qat.fit(
        student, data, loss, learning_rate=recipe.learning_rate, epochs=recipe.epochs, penalty=lambda m: recipe.l1 * channel_norm(m)
    )
    note("train with L1", history)
    if not prune_channels(student, recipe.share):
        raise UnsupportedModelError(f"no channel of {type(module).__name__} can go: expected convolutions in a row within a Sequential")
    note("prune channels", [])
    note(
        "distil",
        qat.fit(student, _taught(teacher, data), _blended(loss, recipe), learning_rate=recipe.learning_rate, epochs=recipe.distil_epochs),
    )
    student = qat.prepare(student)
    rate = recipe.learning_rate / 10
    note("quantize", qat.fit(student, _taught(teacher, data), _blended(loss, recipe), learning_rate=rate, epochs=recipe.quantized_epochs))
    return qat.export(student, example, folder, name), steps


def channel_norm(module: Any) -> Tensor:
    """Sum of the L1 norms of all convolution weights."""
    total = torch.zeros(())
    for part in module.modules():
        if isinstance(part, qat.KINDS[:3]):
            total = total + part.weight.abs().sum()
    return total


def prune_channels(module: Any, share: float) -> int:
    """Take the channels of the smallest L1 norm out of convolutions that another one follows in a Sequential; how many went."""
    gone = 0
    for parent in module.modules():
        if isinstance(parent, nn.Sequential):
            layers = list(parent)
            for place, layer in enumerate(layers):
                if isinstance(layer, qat.KINDS[:3]) and layer.groups == 1:
                    gone += _prune(layer, layers[place + 1 :], share)
    return gone


def _prune(layer: Any, following: list[Any], share: float) -> int:
    between: list[Any] = []
    target: Any = None
    for part in following:
        if isinstance(part, type(layer)) and part.groups == 1:
            target = part
            break
        normal = isinstance(part, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm))
        if not normal and any(True for _ in part.parameters()):
            return 0
        if not normal and not isinstance(
            part, (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Dropout, nn.MaxPool2d, nn.MaxPool3d, nn.Identity)
        ):
            return 0
        between.append(part)
    drop = int(share * layer.out_channels)
    if target is None or not drop:
        return 0
    norms = layer.weight.detach().abs().flatten(1).sum(1)
    kept = torch.sort(torch.argsort(norms)[drop:]).values
    with torch.no_grad():
        layer.weight = nn.Parameter(layer.weight[kept])
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias[kept])
        layer.out_channels = len(kept)
        for part in between:
            for name in ("weight", "bias"):
                if getattr(part, name, None) is not None:
                    setattr(part, name, nn.Parameter(getattr(part, name)[kept]))
            for name in ("running_mean", "running_var"):
                if getattr(part, name, None) is not None:
                    setattr(part, name, getattr(part, name)[kept])
            if hasattr(part, "num_features"):
                part.num_features = len(kept)
        target.weight = nn.Parameter(target.weight[:, kept])
        target.in_channels = len(kept)
    return drop


def _taught(teacher: Any, data: list[tuple[Mapping[str, Any], Any]]) -> list[tuple[Mapping[str, Any], Any]]:
    taught = []
    with torch.no_grad():
        for inputs, target in data:
            taught.append((inputs, (target, teacher(*(torch.as_tensor(np.asarray(value)) for value in inputs.values())))))
    return taught


def _blended(loss: Callable[[Any, Any], Tensor], recipe: Compression) -> Callable[[Any, Any], Tensor]:
    def blended(outputs: Tensor, target: Any) -> Tensor:
        wanted, teacher = target
        t = recipe.temperature
        soft = nn.functional.kl_div(
            torch.log_softmax(outputs / t, 1).flatten(1),
            torch.log_softmax(teacher / t, 1).flatten(1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - recipe.blend) * loss(outputs, wanted) + recipe.blend * t * t * soft

    return blended
