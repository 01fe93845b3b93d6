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
    blurred = torch.rand(1, device=device) < 0.2 * amount
    return torch.where(blurred, _mean(image, 3, "reflect"), image).clamp(0, 1)


def pasted(good: Tensor, donor: Tensor, mask: Tensor, in_place: float = 0.0) -> tuple[Tensor, Tensor]:
    """Defects of `donor` images, moved, turned and scaled, on `good` images (N, C, H, W); masks (N, h, w) in and out.

    A share `in_place` of them is only mirrored.
    The patch takes the brightness of the place where it lands, and its edge is soft. After Ghiasi et al.,
    "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation", CVPR 2021.
    """
    n, device = len(good), good.device
    angle = torch.rand(n, device=device) * 2 * torch.pi * (torch.rand(n, device=device) < 0.5)
    scale = torch.exp((torch.rand(n, 2, device=device) * 2 - 1) * 0.35)
    moved = _matrices(angle, scale, (torch.rand(n, 2, device=device) * 2 - 1) * 0.5, in_place)
    outline = functional.interpolate(mask[:, None], size=good.shape[2:], mode="bilinear", align_corners=False)
    patch, core = _sampled(donor, moved, "reflection"), (_sampled(outline, moved, "zeros") > 0.3).float()
    ring = _widest(core, 17) - core
    size = ring.sum(dim=(2, 3), keepdim=True)
    shift = ((good - patch) * ring).sum(dim=(2, 3), keepdim=True) / size.clamp(min=1) * (size > 20)
    soft = _mean(_widest(core, 7), 7)
    share = soft * (torch.rand(n, 1, 1, 1, device=device) * 0.5 + 0.7)
    mixed = (good * (1 - share) + (patch + shift) * share).clamp(0, 1)
    return mixed, functional.adaptive_avg_pool2d(core, mask.shape[1:])[:, 0]


def turned(
    image: Tensor, mask: Tensor, *, quarter: bool, zoom: float = 0.08, shift: float = 0.05, still: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mirrors, (quarter turns,) small zoom and shift of images (N, C, H, W) and masks (N, h, w) float; a share `still` is only mirrored."""
    n, device = len(image), image.device
    angle = torch.randn(n, device=device) * 0.03
    if quarter:
        angle = angle + torch.randint(4, (n,), device=device) * (torch.pi / 2)
    scale = torch.exp((torch.rand(n, 2, device=device) * 2 - 1) * zoom)
    moved = _matrices(angle, scale, (torch.rand(n, 2, device=device) * 2 - 1) * shift, still)
    return _sampled(image, moved, "reflection"), _sampled(mask[:, None], moved, "reflection")[:, 0]


def _widest(x: Tensor, side: int) -> Tensor:
    """The largest value (>= 0) within `side` x `side` pixels, by windows that grow twofold: max_pool2d takes many times longer on a CPU."""
    x = functional.pad(x, (side // 2,) * 4)
    for dim in (-1, -2):
        seen = 1
        while seen < side:
            step = min(seen, side - seen)
            left = x.shape[dim] - step
            x, seen = torch.maximum(x.narrow(dim, 0, left), x.narrow(dim, step, left)), seen + step
    return x


def _mean(x: Tensor, side: int, beyond: str = "constant") -> Tensor:
    """The mean of `side` x `side` pixels, by sums of moved copies: avg_pool2d takes several times longer on a CPU."""
    x = functional.pad(x, (side // 2,) * 4, mode=beyond)
    for dim in (-1, -2):
        left = x.shape[dim] - side + 1
        total = x.narrow(dim, 0, left).clone()
        for start in range(1, side):
            total += x.narrow(dim, start, left)
        x = total
    return x / side**2


def _matrices(angle: Tensor, scale: Tensor, shift: Tensor, still: float) -> Tensor:
    """(N, 2, 3) affine maps: turned by `angle` (N,), mirrored by chance, scaled (N, 2), shifted (N, 2) in half sides; a share `still`
    is only mirrored."""
    sign = torch.where(torch.rand(len(angle), 2, device=angle.device) < 0.5, -1.0, 1.0)
    if still:
        moves = (torch.rand(len(angle), 1, device=angle.device) >= still).float()
        angle, scale, shift = angle * moves[:, 0], scale**moves, shift * moves
    c, s = angle.cos(), angle.sin()
    matrix = torch.stack((torch.stack((c, -s), 1), torch.stack((s, c), 1)), 1) * (scale * sign)[:, None, :]
    return torch.cat((matrix, shift[:, :, None]), 2)


def _sampled(x: Tensor, moved: Tensor, beyond: str) -> Tensor:
    grid = functional.affine_grid(moved, list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, padding_mode=beyond, align_corners=False)
