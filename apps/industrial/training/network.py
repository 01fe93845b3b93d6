"""The texture network: MobileNetV2's first blocks, a small decoder for defects, and statistics of the whole image.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as functional
from safetensors import safe_open
from torch import Tensor, nn

from apps.industrial.features import COARSE, FINE

LAYERS = 40
"""Layers of the backbone that are kept: up to the expansion of the 13th block, 576 channels at stride 16."""
TAPS = {"quarter": 8, "eighth": 17, "sixteenth": 39}
SHARED = 12
"""First layers that a network which learns defects leaves as they are: four blocks, to stride 8. They are the dearest to learn, and the
shipped network and a recipe's own share them."""


def backbone_layers(path: Path, layers: int) -> list[tuple[str, Tensor, Tensor, int, str]]:
    """Kind, weight, bias, stride and activation of the first `layers` layers of a backbone file."""
    result = []
    with safe_open(path, framework="pt") as file:
        described = file.metadata()["layers"].split(";")[:layers]
        for index, text in enumerate(described):
            _, kind, stride, activation = text.split(":")
            name = f"layer{index:02d}."
            weight = file.get_tensor(name + "weight_u8").float() - file.get_tensor(name + "zero_point").float().reshape(-1)[0]
            weight = weight * file.get_tensor(name + "scale").float().reshape(-1)[0]
            result.append((kind, weight, file.get_tensor(name + "bias").float(), int(stride[1:]), activation))
    return result


class Convolution(nn.Module):  # type: ignore[misc]
    """One folded layer: convolution with TensorFlow's SAME padding, then ReLU6 where `activated`."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, groups: int, activated: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, 0 if size == 1 or stride == 2 else 1, groups=groups)
        self.pad, self.activated = size == 3 and stride == 2, activated

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        x = self.conv(functional.pad(x, (0, 1, 0, 1)) if self.pad else x)
        return functional.relu6(x, inplace=True) if self.activated else x


MOBILENET_V2 = (
    (16, 1, 1),
    (24, 2, 6),
    (24, 1, 6),
    (32, 2, 6),
    *[(32, 1, 6)] * 2,
    (64, 2, 6),
    *[(64, 1, 6)] * 3,
    *[(96, 1, 6)] * 3,
    (160, 2, 6),
    *[(160, 1, 6)] * 2,
    (320, 1, 6),
)
"""Width, stride and expansion of each block (Sandler et al., MobileNetV2, CVPR 2018)."""


def inverted_residuals(blocks: Sequence[tuple[int, int, int]]) -> tuple[list[Convolution], set[int], int]:
    """The first layers of MobileNetV2: the stem and `blocks`; the layers that add the input of their block; the last width."""
    layers, skips, width = [Convolution(3, 32, 3, 2, 1, True)], set(), 32
    for outputs, stride, expansion in blocks:
        inner = width * expansion
        if expansion > 1:
            layers.append(Convolution(width, inner, 1, 1, 1, True))
        layers.append(Convolution(inner, inner, 3, stride, inner, True))
        layers.append(Convolution(inner, outputs, 1, 1, 1, False))
        if stride == 1 and width == outputs:
            skips.add(len(layers) - 1)
        width = outputs
    return layers, skips, width


class Trunk(nn.Module):  # type: ignore[misc]
    """The first `LAYERS` layers of MobileNetV2 1.0."""

    def __init__(self) -> None:
        super().__init__()
        layers, skips, width = inverted_residuals(MOBILENET_V2[:13])
        layers.append(Convolution(width, width * 6, 1, 1, 1, True))
        self.layers, self.skips = nn.ModuleList(layers), frozenset(skips)

    def load(self, path: Path) -> None:
        """Take the weights of a backbone file over."""
        for layer, (_, weight, bias, _, _) in zip(self.layers, backbone_layers(path, LAYERS), strict=True):
            layer.conv.weight.data.copy_(weight)
            layer.conv.bias.data.copy_(bias)

    def run(self, x: Tensor, first: int, last: int) -> dict[int, Tensor]:
        """Outputs of the layers `first` to `last`, of which `x` is the first one's input."""
        outputs: dict[int, Tensor] = {first - 1: x}
        for index in range(first, last + 1):
            x = self.layers[index](x)
            if index in self.skips:
                x = x + outputs[index - 3]
            outputs[index] = x
        return outputs


class TextureNetwork(nn.Module):  # type: ignore[misc]
    """(N, 3, SIZE, SIZE) float32 RGB 0..1 -> map (N, MAP, MAP) and image (N,) of defect logits, fine, coarse and embedding.

    `fine` (N, FINE, SIZE/8, SIZE/8) and `coarse` (N, COARSE, SIZE/16, SIZE/16) describe places, `embedding`
    the whole image: mean, deviation and peak of the deep features.
    """

    SPLIT = TAPS["eighth"]
    """The last of the early layers, which make the features of stride 8."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.fine = nn.Conv2d(192, FINE, 1, bias=False)
        self.coarse = nn.Conv2d(576, COARSE, 1, bias=False)
        self.deep = nn.Sequential(nn.Conv2d(576, 64, 1), nn.ReLU())
        self.middle = nn.Conv2d(32, 64, 1)
        self.blend = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.Conv2d(64, 64, 1), nn.ReLU())
        self.down = nn.Conv2d(64, 32, 1)
        self.early = nn.Conv2d(24, 32, 1)
        self.detail = nn.Sequential(
            nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 1, 1)
        )
        self.whole = nn.Sequential(nn.Linear(576 * 2 + 2, 32), nn.ReLU(), nn.Linear(32, 1))

    def early_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """What the `SHARED` first layers give and everything else is made of: the output at stride 4, and the last."""
        seen = self.trunk.run(image * 2 - 1, 0, SHARED - 1)
        return seen[TAPS["quarter"]], seen[SHARED - 1]

    def late(self, quarter: Tensor, last: Tensor) -> dict[str, Tensor]:
        """All outputs from the early features; `eighth_wide` and `sixteenth` are what the teachers are matched on."""
        seen = self.trunk.run(last, SHARED, LAYERS - 1)
        eighth, wide, sixteenth = seen[self.SPLIT], seen[self.SPLIT + 1], seen[LAYERS - 1]
        deep = self.deep(sixteenth)
        middle = torch.relu(functional.interpolate(deep, scale_factor=2, mode="bilinear") + self.middle(eighth))
        middle = middle + self.blend(middle)
        detail = functional.interpolate(self.down(middle), scale_factor=2, mode="bilinear") + self.early(quarter)
        logits = self.detail(detail)[:, 0]
        mean, peak = sixteenth.mean(dim=(2, 3)), sixteenth.amax(dim=(2, 3))
        spread = (sixteenth.square().mean(dim=(2, 3)) - mean.square()).clamp(min=0).add(1e-8).sqrt()
        summary = torch.stack((logits.amax(dim=(1, 2)), logits.flatten(1).topk(40, dim=1).values.mean(dim=1)), dim=1)
        image = self.whole(torch.cat((mean, spread, summary), dim=1))[:, 0] + summary.mean(dim=1)
        return {
            "map": logits,
            "image": image,
            "fine": self.fine(wide),
            "coarse": self.coarse(sixteenth),
            "embedding": torch.cat((mean, spread, peak), dim=1),
            "wide": wide,
            "sixteenth": sixteenth,
        }

    def at_half(self, image: Tensor) -> dict[str, Tensor]:
        """The image at half its size, where shading and shape show best: `half`, its coarse features, and `whole` (N, WHOLE), their
        mean and deviation."""
        seen = self.trunk.run(functional.avg_pool2d(image, 2) * 2 - 1, 0, LAYERS - 1)
        coarse = self.coarse(seen[LAYERS - 1])
        mean = coarse.mean(dim=(2, 3))
        spread = (coarse.square().mean(dim=(2, 3)) - mean.square()).clamp(min=0).sqrt()
        return {"half": coarse, "whole": torch.cat((mean, spread), dim=1)}

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """All outputs."""
        return self.late(*self.early_features(image))
