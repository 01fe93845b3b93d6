"""Augmentation of image batches on the device that trains: the same turn for image and mask, then light."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def light(image: Tensor, amount: float = 1.0) -> Tensor:
    """Gamma, gain, offset, noise and blur as exposures differ; (N, C, H, W) 0..1 -> the same."""
    n, device = len(image), image.device

    def draw(low: float, high: float) -> Tensor:
        return (torch.rand(n, 1, 1, 1, device=device) * (high - low) + low) * amount

    image = image.clamp(1e-4, 1) ** torch.exp(draw(-0.35, 0.35))
    image = (image - 0.43) * torch.exp(draw(-0.25, 0.25)) + 0.43 + draw(-0.06, 0.06)
    image = image + torch.randn(n, 1, *image.shape[2:], device=device) * draw(0, 0.03)
    if torch.rand(()) < 0.2 * amount:
        image = functional.avg_pool2d(functional.pad(image, (1, 1, 1, 1), mode="reflect"), 3, 1)
    return image.clamp(0, 1)


def turned(image: Tensor, mask: Tensor, *, quarter: bool, zoom: float = 0.08, shift: float = 0.05) -> tuple[Tensor, Tensor]:
    """Mirrors, (quarter turns,) small zoom and shift of images (N, C, H, W) and masks (N, h, w) float."""
    n, device = len(image), image.device
    angle = torch.randn(n, device=device) * 0.03
    if quarter:
        angle = angle + torch.randint(4, (n,), device=device) * (torch.pi / 2)
    scale = torch.exp((torch.rand(n, 2, device=device) * 2 - 1) * zoom)
    sign = torch.where(torch.rand(n, 2, device=device) < 0.5, -1.0, 1.0)
    c, s = angle.cos(), angle.sin()
    matrix = torch.stack((torch.stack((c, -s), 1), torch.stack((s, c), 1)), 1) * (scale * sign)[:, None, :]
    moved = torch.cat((matrix, ((torch.rand(n, 2, device=device) * 2 - 1) * shift)[:, :, None]), 2)

    def sample(x: Tensor) -> Tensor:
        grid = functional.affine_grid(moved, list(x.shape), align_corners=False)
        return functional.grid_sample(x, grid, padding_mode="reflection", align_corners=False)

    return sample(image), sample(mask[:, None])[:, 0]
