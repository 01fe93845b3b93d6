"""Augmentation of whole batches on the device that trains: geometry, intensity, acquisition, negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def _uniform(n: int, low: float, high: float, device: torch.device) -> Tensor:
    return torch.rand(n, device=device) * (high - low) + low


def _rotations(angles: Tensor) -> Tensor:
    """(N, 3) radians -> (N, 3, 3) rotation matrices about the three axes in turn."""
    matrix = torch.eye(3, device=angles.device).expand(len(angles), 3, 3)
    for axis in range(3):
        c, s = angles[:, axis].cos(), angles[:, axis].sin()
        turn = torch.eye(3, device=angles.device).repeat(len(angles), 1, 1)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[:, i, i], turn[:, j, j], turn[:, i, j], turn[:, j, i] = c, c, -s, s
        matrix = matrix @ turn
    return matrix


def geometry(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotation to 23 degrees, scale 0.8-1.26, shift (half of the batch a third of that), bend and mirrors.

    `image`: (N, 1, X, Y, Z), exactly zero where the window holds no voxel; `label`: (N, X, Y, Z) integer.
    Returns both, and where the window holds voxels (N, 1, X, Y, Z) as 0 or 1.
    """
    n, device = len(image), image.device
    size = torch.tensor(image.shape[2:], device=device, dtype=torch.float32)
    strength = torch.where(torch.rand(n, device=device) < 0.5, 0.4, 1.15)
    matrix = _rotations((torch.rand(n, 3, device=device) * 2 - 1) * 0.35 * strength[:, None])
    matrix = matrix * torch.exp(_uniform(n, -0.2, 0.2, device) * strength)[:, None, None]
    matrix = matrix * torch.exp((torch.rand(n, 3, device=device) * 2 - 1) * 0.08)[:, :, None]
    mirror = torch.where(torch.rand(n, 3, device=device) < 0.5, -1.0, 1.0)
    matrix = matrix * mirror[:, None, :]
    shift = torch.randn(n, 3, device=device).clamp(-2, 2) * 3.0 * strength[:, None]
    axes = [torch.arange(s, device=device, dtype=torch.float32) - (s - 1) / 2 for s in image.shape[2:]]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    points = torch.einsum("nij,pj->npi", matrix, points) + shift[:, None]
    points = points.reshape(n, *image.shape[2:], 3)
    coarse = torch.randn(n, 3, 5, 6, 5, device=device) * _uniform(n, 0, 1.6, device)[:, None, None, None, None]
    warp = functional.interpolate(coarse, size=image.shape[2:], mode="trilinear", align_corners=True)
    bent = (torch.rand(n, device=device) < 0.5).float()[:, None, None, None, None]
    points = points + bent * warp.permute(0, 2, 3, 4, 1)
    grid = (points * 2 / (size - 1)).flip(-1)
    moved = functional.grid_sample(image, grid, align_corners=True)
    inside = (functional.grid_sample((image != 0).float(), grid, align_corners=True) > 0.5).float()
    hot = functional.one_hot(label.long(), 3).permute(0, 4, 1, 2, 3).float()
    soft = functional.grid_sample(hot, grid, align_corners=True)
    return moved, soft.argmax(dim=1), inside


def _blurred(image: Tensor, factor: float) -> Tensor:
    """A coarser acquisition along one random axis: sampled down by `factor`, then up again."""
    shape = list(image.shape[2:])
    axis = int(torch.randint(3, (1,)))
    small = shape.copy()
    small[axis] = max(4, round(shape[axis] / factor))
    down = functional.interpolate(image, size=small, mode="area")
    return functional.interpolate(down, size=shape, mode="trilinear", align_corners=False)


def intensity(image: Tensor) -> Tensor:
    """Gamma, bias field, blur, noise and contrast as scanners differ; (N, 1, X, Y, Z) -> the same."""
    n, device = len(image), image.device
    low, high = image.amin(dim=(1, 2, 3, 4), keepdim=True), image.amax(dim=(1, 2, 3, 4), keepdim=True)
    unit = (image - low) / (high - low).clamp(min=1e-6)
    gamma = torch.exp(_uniform(n, -0.45, 0.45, device))[:, None, None, None, None]
    keep = (torch.rand(n, device=device) < 0.5).float()[:, None, None, None, None]
    unit = keep * unit + (1 - keep) * unit.clamp(min=1e-6) ** gamma
    field = torch.randn(n, 1, 3, 3, 3, device=device) * _uniform(n, 0, 0.3, device)[:, None, None, None, None]
    unit = unit * torch.exp(functional.interpolate(field, size=image.shape[2:], mode="trilinear", align_corners=True))
    parts = [_blurred(part, 1.3 + 2.2 * float(torch.rand(1))) if float(torch.rand(1)) < 0.35 else part for part in unit.split(1)]
    unit = torch.cat(parts)
    noisy = _uniform(n, 0, 0.08, device) * (torch.rand(n, device=device) < 0.5)
    return unit + torch.randn_like(unit) * noisy[:, None, None, None, None]


def field_of_view(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Margins set to zero as in a tighter crop: up to 9 voxels a side for half of the batch."""
    image, label = image.clone(), label.clone()
    for index in torch.nonzero(torch.rand(len(image)) < 0.5).flatten().tolist():
        for axis in range(3):
            low, high = torch.randint(0, 10, (2,)).tolist()
            for volume in (image[index, 0], label[index]):
                volume.narrow(axis, 0, low).zero_()
                volume.narrow(axis, volume.shape[axis] - high, high).zero_()
    return image, label


def standardise(image: Tensor) -> Tensor:
    """Zero mean and unit variance a volume, over the voxels that are not empty margin."""
    inside = (image != 0).float()
    count = inside.sum(dim=(1, 2, 3, 4), keepdim=True).clamp(min=1)
    mean = (image * inside).sum(dim=(1, 2, 3, 4), keepdim=True) / count
    variance = (((image - mean) * inside) ** 2).sum(dim=(1, 2, 3, 4), keepdim=True) / count
    return (image - mean) / variance.clamp(min=1e-8).sqrt() * inside


def negatives(image: Tensor, label: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Turn a `share` of the batch into noise without a hippocampus."""
    image, label = image.clone(), label.clone()
    for index in torch.nonzero(torch.rand(len(image)) < share).flatten().tolist():
        image[index] = torch.randn_like(image[index])
        label[index] = 0
    return image, label


def augment(image: Tensor, label: Tensor, *, negative_share: float = 0.02) -> tuple[Tensor, Tensor]:
    """A training batch from stored windows: all of the above in order."""
    image, label, inside = geometry(image, label)
    image, label = negatives(image, label, negative_share)
    image, label = field_of_view(intensity(image) * inside, label)
    return standardise(image), label
