"""Teaches the texture network a part's own defects from a few labelled ones, on a GPU or on two CPU cores."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from apps.industrial.features import SIZE
from apps.industrial.training.augment import light, pasted, turned
from apps.industrial.training.losses import image_loss, map_loss
from apps.industrial.training.network import SHARED, TextureNetwork

BATCH = 16
WINDOW = 192
"""The network learns from windows of this side: they cost a third of the whole image, and show a defect at many places.
Whole images are learned at this side too, and one view is judged at it (`export.VIEWS`)."""
MARGIN = 24
"""Windows are drawn so far beyond the image and moved back: else a defect at its edge would seldom be seen."""
STILL, IN_PLACE, MANY = 0.7, 0.5, 50
"""Shares of the images that are only mirrored (turning, zooming and moving cut their edges off), and of the pasted defects that land where
they were: small defects at an edge are the last to be learned. Below MANY labelled defects less, as variety matters more then."""
MOST_STEPS = 1500
PASTED = 0.3
"""Share of the good images that get a defect of a labelled one, where outlines are known: few defects are then seen in many places."""
RATES = {"heads": 1.0, "late": 1.0, "early": 0.5}
"""Learning rates of the parts, as shares."""
AVERAGED = 0.99
"""What is kept of the running average of the weights with each step; the average is what was learned."""


@dataclass(frozen=True)
class Examples:
    """What a part looks like, good and defective.

    `images` (N, 3, SIZE, SIZE) float32 as `features.prepared` makes them; `masks` (N, MAP, MAP) 0..1, all zero
    for good parts; `known` (N,): whether the mask is known, or the image's label alone; `defective` (N,);
    `share` (N,): how often each is drawn.
    """

    images: NDArray[np.float32]
    masks: NDArray[np.float32]
    known: NDArray[np.bool_]
    defective: NDArray[np.bool_]
    share: NDArray[np.float32]


def _windows(images: Tensor, masks: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """One random window of WINDOW pixels for the images where `cut`; the others are scaled to it."""
    free = SIZE - WINDOW
    row, column = (int(v) * 4 for v in torch.randint(-MARGIN // 4, (free + MARGIN) // 4 + 1, (2,)).clamp(0, free // 4))
    part = images[:, :, row : row + WINDOW, column : column + WINDOW]
    small = torch.nn.functional.interpolate(images, size=(WINDOW, WINDOW), mode="area")
    side = WINDOW // 4
    mask = masks[:, row // 4 : row // 4 + side, column // 4 : column // 4 + side]
    small_mask = torch.nn.functional.interpolate(masks[:, None], size=(side, side), mode="area")[:, 0]
    return torch.where(cut[:, None, None, None], part, small), torch.where(cut[:, None, None], mask, small_mask)


def _optimiser(network: TextureNetwork, device: torch.device) -> torch.optim.Optimizer:
    early, late = network.trunk.layers[SHARED : network.SPLIT + 1], network.trunk.layers[network.SPLIT + 1 :]
    heads = [p for name, p in network.named_parameters() if not name.startswith(("trunk.", "fine.", "coarse."))]
    groups = [
        {"params": heads, "share": RATES["heads"]},
        {"params": list(late.parameters()), "share": RATES["late"]},
        {"params": list(early.parameters()), "share": RATES["early"]},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.05, fused=device.type == "cuda")


class _Learned(nn.Module):  # type: ignore[misc]
    """What the losses look at: the map's logits (N, MAP, MAP) and the image's (N,).

    The shared layers see `at_once` images: what two large layers say of a few of them stays in a CPU's cache.
    """

    def __init__(self, network: TextureNetwork, at_once: int) -> None:
        super().__init__()
        self.network, self.at_once = network, at_once

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            parts = [self.network.early_features(some) for some in images.split(self.at_once)]
        quarter, last = (torch.cat(some) for some in zip(*parts, strict=True))
        out = self.network.late(quarter, last)
        return out["map"], out["image"]


def _captured(learned: _Learned, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Forward and backward as a CUDA graph each: their hundreds of kernels take less time than launching them."""
    sample = torch.zeros(BATCH, 3, WINDOW, WINDOW, device=device).contiguous(memory_format=torch.channels_last)
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # the graphs are captured on a stream of their own
    with _reduced(device):
        graphed: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.cuda.make_graphed_callables(learned, (sample,), allow_unused_input=True)
    return graphed


def _reduced(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; its casts are not kept, which a captured graph does not allow. On a CPU that computes in it
    steps took less time, and one of five folds of magnetic tiles learned much worse."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def adapt(
    network: TextureNetwork,
    examples: Examples,
    seconds: float,
    device: torch.device,
    *,
    learning_rate: float = 1e-3,
    most_steps: int = MOST_STEPS,
    seed: int = 0,
    report: Callable[[float], None] = lambda share: None,
) -> TextureNetwork:
    """A copy of `network` that has learned from `examples` for `seconds`, or `most_steps`; `report` gets the share that is done.

    All but the first layers are tuned.
    """
    torch.manual_seed(seed)
    network = copy.deepcopy(network).to(device, memory_format=torch.channels_last).train()
    network.trunk.layers[:SHARED].requires_grad_(False)
    optimiser = _optimiser(network, device)
    images, masks = torch.from_numpy(examples.images), torch.from_numpy(examples.masks).to(device)
    images = (images[:, :1] if (images == images[:, :1]).all() else images).to(device)  # grey: one channel is turned and lit
    known, bad = torch.from_numpy(examples.known).float().to(device), torch.from_numpy(examples.defective).float().to(device)
    chances = torch.from_numpy(examples.share)
    lifelike = min(1.0, float(bad.sum()) / MANY)
    donors = torch.nonzero((bad > 0) & (known > 0) & (masks.amax(dim=(1, 2)) > 0.3)).flatten()
    learned = _Learned(network, BATCH if device.type == "cuda" else 2)
    forward = _captured(learned, device) if device.type == "cuda" else learned
    current = [parameter for parameter in network.parameters() if parameter.requires_grad]
    average, step, start = [parameter.detach().clone() for parameter in current], 0, time.monotonic()
    while (progress := max((time.monotonic() - start) / seconds, step / most_steps)) < 1:
        factor = min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * factor * group["share"]
        chosen = torch.multinomial(chances, BATCH, replacement=True).to(device)
        seen, target, defective = images[chosen], masks[chosen], bad[chosen]
        if len(donors):
            onto = torch.nonzero((torch.rand(BATCH, device=device) < PASTED) & (defective < 0.5)).flatten()
            if len(onto):
                others = donors[torch.randint(len(donors), (len(onto),), device=device)]
                seen[onto], target[onto] = pasted(seen[onto], images[others], masks[others], in_place=lifelike * IN_PLACE)
                defective[onto] = (target[onto].amax(dim=(1, 2)) > 0.5).float()
        seen, target = turned(seen, target, quarter=False, still=lifelike * STILL)
        cut = (torch.rand(BATCH, device=device) < 0.7) & (known[chosen] > 0)
        seen, target = _windows(seen, target, cut)
        defective = torch.where(cut, (target.amax(dim=(1, 2)) > 0.5).float(), defective)
        seen = light(seen, 0.7).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        with _reduced(device):
            logits, whole = forward(seen)
        loss = map_loss(logits.float(), target, known[chosen]) + image_loss(whole.float(), defective)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(current, 5.0)
        optimiser.step()
        step += 1
        torch._foreach_lerp_(average, [parameter.detach() for parameter in current], 1 - min(AVERAGED, step / (step + 10)))
        report(progress)
    for parameter, mean in zip(current, average, strict=True):
        parameter.data.copy_(mean)
    return network.cpu().eval()
