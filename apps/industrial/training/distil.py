"""Trains `texture-features`: it keeps what two ImageNet networks see, and learns what defects look like on any surface.

The trunk starts as MobileNetV2's. Linear readings of it must reproduce the middle layers of MobileNetV2 and of
MobileNetV1 (distillation); a decoder finds synthetic defects on procedural surfaces and pieces of real images.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from apps.industrial.features import COARSE, FINE, MAP, SIZE
from apps.industrial.synthesis.surfaces import example
from apps.industrial.training.augment import light, turned
from apps.industrial.training.losses import image_loss, map_loss
from apps.industrial.training.network import Convolution, TextureNetwork, Trunk, backbone_layers

V2_FILE, V1_FILE = "mobilenet_v2_1.0_224_imagenet_u8.safetensors", "mobilenet_v1_1.0_224_imagenet_u8_features.safetensors"


@dataclass(frozen=True)
class Recipe:
    """What a run does; recorded in the model's card."""

    seconds: float
    pool: int = 24_000
    """Surfaces that are drawn before training."""
    batch: int = 32
    learning_rate: float = 1e-3
    trunk_rate: float = 0.15
    """The trunk's learning rate as a share."""
    distillation: float = 3.0
    seed: int = 1


class _V1(nn.Module):  # type: ignore[misc]
    """MobileNetV1 up to layer 22; gives layers 10 (256 channels, stride 8) and 22 (512, stride 16)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        layers = []
        for kind, weight, bias, stride, activation in backbone_layers(path, 23):
            outputs, _, size, _ = weight.shape
            groups = outputs if kind == "dw" else 1
            layer = Convolution(weight.shape[1] * groups, outputs, size, stride, groups, activation == "relu6")
            layer.conv.weight.data.copy_(weight)
            layer.conv.bias.data.copy_(bias)
            layers.append(layer)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = x
        for index, layer in enumerate(self.layers):
            x = layer(x)
            fine = x if index == 10 else fine
        return fine, x


def _draw(number: int, seed: int, reals: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    cv2.setNumThreads(1)
    rng = np.random.default_rng(seed)
    images, masks = np.empty((number, SIZE, SIZE), np.uint8), np.empty((number, MAP, MAP), np.uint8)
    for i in range(number):
        images[i], mask = example(rng, SIZE, reals)
        masks[i] = cv2.resize(mask.astype(np.float32) * 255, (MAP, MAP), interpolation=cv2.INTER_AREA).astype(np.uint8)
    return images, masks


def draw_pool(number: int, seed: int, reals: Sequence[NDArray[np.uint8]], processes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """`number` surfaces (N, SIZE, SIZE) and masks (N, MAP, MAP), both uint8 0..255."""
    part = 250
    seeds = [seed * 100_003 + i for i in range(math.ceil(number / part))]
    with ProcessPoolExecutor(processes) as pool:
        parts = list(pool.map(_draw, repeat(part), seeds, repeat(list(reals))))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def normalised(image: Tensor) -> Tensor:
    """Exposure taken out, as `features.prepared` does; (N, 1, H, W) 0..1 -> (N, 3, H, W)."""
    mean, spread = image.mean(dim=(1, 2, 3), keepdim=True), image.std(dim=(1, 2, 3), keepdim=True)
    return ((image - mean) * (40 / 255) / (spread + 8 / 255) + 110 / 255).clamp(0, 1).repeat(1, 3, 1, 1)


def _alike(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference in units of each channel's own spread."""
    scale = teacher.std(dim=(0, 2, 3), keepdim=True) + 0.05
    return ((student - teacher) / scale).square().mean()


def train(
    images: NDArray[np.uint8], masks: NDArray[np.uint8], backbones: Path, recipe: Recipe, device: torch.device, log: Path | None = None
) -> TextureNetwork:
    """The averaged network after `recipe.seconds`; progress as JSON lines in `log`."""
    torch.manual_seed(recipe.seed)
    pool, truth = torch.from_numpy(images).to(device), torch.from_numpy(masks).to(device)
    network, v2 = TextureNetwork(), Trunk()
    network.trunk.load(backbones / V2_FILE)
    v1 = _V1(backbones / V1_FILE).to(device).eval()
    v2.load(backbones / V2_FILE)
    network, v2 = network.to(device), v2.to(device).eval()
    readings = nn.ModuleDict(
        {
            "v2_fine": nn.Conv2d(FINE, 192, 1),
            "v1_fine": nn.Conv2d(FINE, 256, 1),
            "v2_coarse": nn.Conv2d(COARSE, 576, 1),
            "v1_coarse": nn.Conv2d(COARSE, 512, 1),
        }
    ).to(device)
    trunk = list(network.trunk.parameters())
    rest = [p for name, p in network.named_parameters() if not name.startswith("trunk.")] + list(readings.parameters())
    rates = [recipe.learning_rate * recipe.trunk_rate, recipe.learning_rate]
    optimiser = torch.optim.AdamW([{"params": trunk}, {"params": rest}], weight_decay=0.02, fused=device.type == "cuda")
    average = {k: v.detach().clone() for k, v in network.state_dict().items()}
    start, step = time.monotonic(), 0
    while (progress := (time.monotonic() - start) / recipe.seconds) < 1:
        factor = min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * progress))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        chosen = torch.randint(len(pool), (recipe.batch,), device=device)
        image, mask = turned(pool[chosen][:, None].float() / 255, truth[chosen].float() / 255, quarter=True, zoom=0.2)
        image = normalised(light(image))
        with torch.no_grad():
            seen = v2.run(image * 2 - 1, 0, 39)
            old_fine, old_coarse = v1(image * 2 - 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = network(image)
            read = {name: layer(out["fine" if "fine" in name else "coarse"]) for name, layer in readings.items()}
        targets = {"v2_fine": seen[18], "v1_fine": old_fine, "v2_coarse": seen[39], "v1_coarse": old_coarse}
        matched = sum(_alike(read[name].float(), target) for name, target in targets.items()) + _alike(out["sixteenth"].float(), seen[39])
        defective = (mask.amax(dim=(1, 2)) > 0.3).float()
        found = map_loss(out["map"].float(), mask) + 0.5 * image_loss(out["image"].float(), defective)
        loss = found + recipe.distillation * matched / 5
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        step += 1
        keep = min(0.998, step / (step + 10))
        torch._foreach_lerp_(list(average.values()), list(network.state_dict().values()), 1 - keep)
        if step % 200 == 0 and log is not None:
            line = {"step": step, "seconds": time.monotonic() - start, "found": float(found.detach()), "matched": float(matched.detach())}
            with log.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
    network.load_state_dict(average)
    return network.eval()
