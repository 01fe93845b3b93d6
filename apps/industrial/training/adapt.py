"""Teaches the texture network a part's own defects from a few labelled ones, on a GPU or on two CPU cores."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apps.industrial.features import MAP, SIZE, prepared
from apps.industrial.images import Pixels
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
"""Share of the good images that get a defect of a labelled one: few defects are then seen in many places."""
MOST_PASTED = 4
"""Pasted in one batch at most: more than that are drawn in one of twenty."""
RATES = (1.0, 1.0, 0.5)
"""Learning rates of the heads, the late and the early layers, as shares."""
MEMBERS, PARTED = 4, 0.2
"""So many copies learn on a GPU, each from batches of its own, and the mean of their weights is what was learned: about as good as the mean
of what they say, and no larger or slower than one. They part after a share of the time: networks that never learned together
may have a mean that is worse than each.
After Wortsman et al., "Model soups", ICML 2022; Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020."""
AVERAGED = 0.99
"""What is kept of the running average of the weights with each step; the average is what was learned."""


@dataclass(frozen=True)
class Examples:
    """What a part looks like, good and defective.

    `images` (N, 3, SIZE, SIZE) float32 as `features.prepared` makes them, or (N, 1, SIZE, SIZE) where all are grey;
    `masks` (N, MAP, MAP) 0..1, all zero for good parts; `defective` (N,); `share` (N,): how often each
    is drawn.
    """

    images: NDArray[np.float32]
    masks: NDArray[np.float32]
    defective: NDArray[np.bool_]
    share: NDArray[np.float32]

    @classmethod
    def of(cls, good: Sequence[Pixels], bad: Sequence[Pixels], outlines: Sequence[NDArray[np.float32]]) -> Examples:
        """Good and defective images, each kind drawn half of the time. `outlines`: (MAP, MAP) of each defective one, as `Sample.cells`."""
        nothing, given = np.zeros((MAP, MAP), np.float32), (*good, *bad)
        grey = all(image.ndim == 2 or bool((image == image[..., :1]).all()) for image in given)
        images = np.empty((len(given), 1 if grey else 3, SIZE, SIZE), np.float32)
        for into, image in zip(images, given, strict=True):
            into[:] = prepared(image)[: len(into)]
        return cls(
            images,
            np.stack([*[nothing] * len(good), *outlines]),
            np.array([*[False] * len(good), *[True] * len(bad)]),
            np.array([*[0.5 / len(good)] * len(good), *[0.5 / len(bad)] * len(bad)], np.float32),
        )


def _windows(images: Tensor, masks: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """One random window of WINDOW pixels for the images where `cut`; the others are scaled to it."""
    free, side, device = SIZE - WINDOW, WINDOW // 4, images.device
    corner = torch.randint(-MARGIN // 4, (free + MARGIN) // 4 + 1, (2, 1), device=device).clamp(0, free // 4)
    rows, columns = corner * 4 + torch.arange(WINDOW, device=device)
    part = images.index_select(2, rows).index_select(3, columns)
    small = torch.nn.functional.interpolate(images, size=(WINDOW, WINDOW), mode="area")
    rows, columns = corner + torch.arange(side, device=device)
    mask = masks.index_select(1, rows).index_select(2, columns)
    small_mask = torch.nn.functional.interpolate(masks[:, None], size=(side, side), mode="area")[:, 0]
    return torch.where(cut[:, None, None, None], part, small), torch.where(cut[:, None, None], mask, small_mask)


class _Pool:
    """Examples on the device that learns, from which batches are drawn there: nothing that is drawn is known to the host."""

    def __init__(self, examples: Examples, device: torch.device) -> None:
        self.images, self.masks = torch.from_numpy(examples.images).to(device), torch.from_numpy(examples.masks).to(device)
        self.bad = torch.from_numpy(examples.defective).float().to(device)
        chances = torch.from_numpy(examples.share)
        self.until = (chances.cumsum(0) / chances.sum()).to(device)
        self.lifelike = min(1.0, float(self.bad.sum()) / MANY)
        self.donors = torch.nonzero((self.bad > 0) & (self.masks.amax(dim=(1, 2)) > 0.3)).flatten()

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images (BATCH, 3, WINDOW, WINDOW), masks (BATCH, WINDOW / 4, WINDOW / 4), and whether defective."""
        device = self.images.device
        chosen = torch.searchsorted(self.until, torch.rand(BATCH, device=device)).clamp(max=len(self.until) - 1)
        seen, target, defective = self.images[chosen], self.masks[chosen], self.bad[chosen]
        if len(self.donors):
            self._paste(seen, target, defective)
        seen, target = turned(seen, target, quarter=False, still=self.lifelike * STILL)
        cut = torch.rand(BATCH, device=device) < 0.7
        seen, target = _windows(seen, target, cut)
        defective = torch.where(cut, (target.amax(dim=(1, 2)) > 0.5).float(), defective)
        seen = light(seen, 0.7).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        return seen, target, defective

    def _paste(self, seen: Tensor, target: Tensor, defective: Tensor) -> None:
        """Defects of other images on a share PASTED of the good ones, in place; MOST_PASTED in a batch."""
        drawn, onto = (torch.rand(len(seen), device=seen.device) + defective).topk(MOST_PASTED, largest=False)
        others = self.donors[torch.randint(len(self.donors), (MOST_PASTED,), device=seen.device)]
        images, masks = pasted(seen[onto], self.images[others], self.masks[others], in_place=self.lifelike * IN_PLACE)
        take = drawn < PASTED
        seen[onto] = torch.where(take[:, None, None, None], images, seen[onto])
        target[onto] = torch.where(take[:, None, None], masks, target[onto])
        defective[onto] = torch.where(take, (masks.amax(dim=(1, 2)) > 0.5).float(), defective[onto])


def _said(network: TextureNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the losses look at: the map's logits (N, MAP, MAP) and the image's (N,).

    The shared layers see a few images at once on a CPU: what two large layers say of them stays in its cache.
    """
    with torch.no_grad():
        parts = [network.early_features(some) for some in images.split(len(images) if images.is_cuda else 2)]
    out = network.late(*(torch.cat(some) for some in zip(*parts, strict=True)))
    return out["map"].float(), out["image"].float()


def _reduced(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; its casts are not kept, which a captured graph does not allow. On a CPU that computes in it
    steps took less time, and one of five folds of magnetic tiles learned much worse."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


class _Member:
    """A copy of a network that learns, and the running average of its weights."""

    def __init__(self, network: TextureNetwork, settings: Tensor) -> None:
        """`settings`: (4,) read at each step: learning rates of the heads, the late and the early layers, and how far the average moves."""
        self.network = copy.deepcopy(network).to(settings.device, memory_format=torch.channels_last).train()
        self.network.trunk.layers[:SHARED].requires_grad_(False)
        early, late = self.network.trunk.layers[SHARED : network.SPLIT + 1], self.network.trunk.layers[network.SPLIT + 1 :]
        heads = [p for name, p in self.network.named_parameters() if not name.startswith(("trunk.", "fine.", "coarse."))]
        parts = (heads, list(late.parameters()), list(early.parameters()))
        groups = [{"params": part, "lr": rate} for part, rate in zip(parts, settings[:-1], strict=True)]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.05, fused=True, capturable=settings.is_cuda)
        self.moved = settings[-1]
        self.weights = [p for group in groups for p in group["params"]]
        self.average = [weight.detach().clone() for weight in self.weights]

    def learn(self, pool: _Pool) -> None:
        """One step on a batch of the pool."""
        images, masks, defective = pool.batch()
        with _reduced(images.device):
            logits, whole = _said(self.network, images)
        loss = map_loss(logits, masks) + image_loss(whole, defective)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 5.0)
        self.optimiser.step()
        way = torch._foreach_sub([weight.detach() for weight in self.weights], self.average)
        torch._foreach_mul_(way, self.moved)
        torch._foreach_add_(self.average, way)

    def follow(self, other: _Member) -> None:
        """Go on from where `other` is."""
        torch._foreach_copy_(self._state(), other._state())

    def _state(self) -> list[Tensor]:
        kept = [self.optimiser.state[weight][name] for weight in self.weights for name in ("exp_avg", "exp_avg_sq")]
        return [*(weight.detach() for weight in self.weights), *self.average, *kept]


def _side_by_side(steps: Sequence[Callable[[], None]], device: torch.device) -> Callable[[], None]:
    """All `steps`, one after the other; on a GPU at the same time and as one CUDA graph: their thousands of small kernels take far less
    time than launching them, and leave most of the GPU idle. There they are taken a few times before."""
    if device.type != "cuda":

        def in_turn() -> None:
            for step in steps:
                step()

        return in_turn
    streams = [torch.cuda.Stream(device) for _ in steps]

    def together() -> None:
        main = torch.cuda.current_stream(device)
        for stream, step in zip(streams, steps, strict=True):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                step()
        for stream in streams:
            main.wait_stream(stream)

    aside, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(3):
            together()
    torch.cuda.current_stream(device).wait_stream(aside)
    with torch.cuda.graph(graph):
        together()
    done = torch.cuda.Event(blocking=True)

    def replay() -> None:
        graph.replay()
        done.record()
        done.synchronize()  # sleeps: a wait that spins would take one of two cores from what is fitted beside

    return replay


def adapt(
    network: TextureNetwork,
    examples: Examples,
    seconds: float,
    device: torch.device,
    *,
    learning_rate: float = 1e-3,
    most_steps: int = MOST_STEPS,
    members: int | None = None,
    seed: int = 0,
    report: Callable[[float], None] = lambda share: None,
) -> TextureNetwork:
    """A copy of `network` that has learned from `examples` for `seconds`, or `most_steps`; `report` gets the share that is done.

    All but the first layers are tuned. It is the mean of `members` copies: by default MEMBERS on a GPU, where they learn at the same time,
    and one on a CPU.
    """
    torch.manual_seed(seed)
    pool, settings = _Pool(examples, device), torch.zeros(len(RATES) + 1, device=device)  # 0: what is taken before changes nothing
    copies = [_Member(network, settings) for _ in range(members or (MEMBERS if device.type == "cuda" else 1))]
    advance = _side_by_side([partial(member.learn, pool) for member in copies], device)
    step, start, parted = 0, time.monotonic(), False
    while (progress := max((time.monotonic() - start) / seconds, step / most_steps)) < 1:
        if progress >= PARTED and not parted:
            parted = True
            for member in copies[1:]:
                member.follow(copies[0])
        factor = min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * progress))
        step += 1
        now = [*(learning_rate * factor * rate for rate in RATES), 1 - min(AVERAGED, step / (step + 10))]
        settings.copy_(torch.tensor(now))
        advance()
        report(progress)
    for weight, *averages in zip(copies[0].weights, *(member.average for member in copies), strict=True):
        weight.data.copy_(torch.stack(averages).mean(dim=0))
    return copies[0].network.cpu().eval()
