"""One recipe from a trained torch network to a small one: train with L1 -> prune channels -> distil -> quantize.

What is exported is compared with what was trained; whether the small network still does its job is for the user's metric to say.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared_runtime.errors import UnsupportedModelError
from shared_runtime.quantization import qat

Pairs = Iterable[tuple[Mapping[str, Any], Any]]


@dataclass(frozen=True)
class Compression:
    """`l1`: weight of the L1 penalty on convolution channels; `share`: channels that go, above 0 and below 1; epochs of each stage;
    `temperature` and `blend` of the distillation (Hinton et al., 2015): `blend` is the teacher's part of the loss. Networks of one number
    a row learn the teacher's number, others its probabilities."""

    l1: float = 1e-5
    share: float = 0.25
    epochs: int = 2
    distil_epochs: int = 4
    quantized_epochs: int = 2
    learning_rate: float = 1e-3
    temperature: float = 2.0
    blend: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or not 0 <= self.blend <= 1 or self.temperature <= 0:
            raise ValueError(
                f"expected a share above 0 and below 1, a blend from 0 to 1 and a temperature above 0; got {self.share}, {self.blend} and "
                f"{self.temperature}"
            )


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
    recipe, data = recipe or Compression(), [(inputs, qat.placed(target, module)) for inputs, target in pairs]
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
        raise UnsupportedModelError(
            f"no channel of {type(module).__name__} can go: expected convolutions or linear layers in a row within a Sequential"
        )
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
    """Sum of the L1 norms of all weights of convolutions and linear layers."""
    total = torch.zeros(())
    for part in module.modules():
        if isinstance(part, qat.KINDS):
            total = total + part.weight.abs().sum()
    return total


POOLING = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
CHANNELWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Tanh, nn.Sigmoid, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm)


def prune_channels(module: Any, share: float) -> int:
    """Take the channels of the smallest L1 norm out of convolutions and linear layers that another one follows in a Sequential, with
    norms, activations, pooling and depthwise convolutions between them; how many went."""
    gone = 0
    for parent in module.modules():
        if isinstance(parent, nn.Sequential):
            layers = list(parent)
            for place, layer in enumerate(layers):
                if isinstance(layer, qat.KINDS) and getattr(layer, "groups", 1) == 1:
                    gone += _prune(layer, layers[place + 1 :], share)
    return gone


def _prune(layer: Any, following: list[Any], share: float) -> int:
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    between: list[Any] = []
    target: Any = None
    for part in following:
        if isinstance(part, type(layer)) and getattr(part, "groups", 1) == 1:
            target = part
            break
        depthwise = isinstance(part, type(layer)) and part.groups == part.in_channels == part.out_channels
        if not depthwise and not _channelwise(part, layer, width):
            return 0
        between.append(part)
    drop = int(share * width)
    if target is None or not drop:
        return 0
    norms = layer.weight.detach().abs().flatten(1).sum(1)
    kept = torch.sort(torch.argsort(norms)[drop:]).values
    sizes = {"out_channels", "out_features"}
    with torch.no_grad():
        _keep(layer, kept, sizes)
        for part in between:
            _keep(part, kept, sizes | {"in_channels", "groups", "num_features"})
        target.weight = nn.Parameter(target.weight[:, kept])
        setattr(target, "in_features" if isinstance(target, nn.Linear) else "in_channels", len(kept))
    return drop


def _channelwise(part: Any, layer: Any, width: int) -> bool:
    """Whether `part` treats each of the channels that `layer` gives by itself: a norm may be of another axis, and pooling behind a
    linear layer is over its channels."""
    dense = isinstance(layer, nn.Linear)
    if isinstance(part, nn.LayerNorm):
        return dense and tuple(part.normalized_shape) == (width,)
    if isinstance(part, NORMS):
        return bool(part.num_features == width)
    return isinstance(part, CHANNELWISE) or (isinstance(part, POOLING) and not dense)


def _keep(part: Any, kept: Tensor, sizes: set[str]) -> None:
    """Only the channels `kept` of a layer's numbers, and its sizes with them."""
    for name in ("weight", "bias"):
        if getattr(part, name, None) is not None:
            setattr(part, name, nn.Parameter(getattr(part, name)[kept]))
    for name in ("running_mean", "running_var"):
        if getattr(part, name, None) is not None:
            setattr(part, name, getattr(part, name)[kept])
    for name in sizes & set(vars(part)):
        setattr(part, name, len(kept))
    if isinstance(part, nn.LayerNorm):
        part.normalized_shape = (len(kept),)


def _taught(teacher: Any, data: list[tuple[Mapping[str, Any], Any]]) -> list[tuple[Mapping[str, Any], Any]]:
    taught = []
    with torch.no_grad():
        for inputs, target in data:
            taught.append((inputs, (target, qat.call(teacher, inputs))))
    return taught


def _blended(loss: Callable[[Any, Any], Tensor], recipe: Compression) -> Callable[[Any, Any], Tensor]:
    def blended(outputs: Tensor, target: Any) -> Tensor:
        wanted, teacher = target
        if outputs.ndim < 2 or outputs.shape[1] == 1:
            return (1 - recipe.blend) * loss(outputs, wanted) + recipe.blend * nn.functional.mse_loss(outputs, teacher)
        t = recipe.temperature
        soft = nn.functional.kl_div(
            torch.log_softmax(outputs / t, 1).flatten(1),
            torch.log_softmax(teacher / t, 1).flatten(1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - recipe.blend) * loss(outputs, wanted) + recipe.blend * t * t * soft

    return blended
