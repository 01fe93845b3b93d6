"""What a defect network is trained on: the map where a mask is known, the image in any case."""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor

ABSENT = 0.25
"""A cell of the map counts as defective where the mask covers at least this share of it."""


def map_loss(logits: Tensor, mask: Tensor, known: Tensor, weight: float = 3.0) -> Tensor:
    """Cross-entropy and soft Dice of maps (N, h, w); only images where `known` (N,) is 1 count."""
    target = (mask > ABSENT).float()
    each = functional.binary_cross_entropy_with_logits(logits, target, reduction="none", pos_weight=logits.new_full((), weight))
    entropy = (each.mean(dim=(1, 2)) * known).sum() / known.sum().clamp(min=1)
    share = logits.sigmoid() * known[:, None, None]
    target = target * known[:, None, None]
    overlap = (share * target).sum(dim=(1, 2))
    dice = 1 - (2 * overlap + 1) / (share.sum(dim=(1, 2)) + target.sum(dim=(1, 2)) + 1)
    return entropy + (dice * known).sum() / known.sum().clamp(min=1)


def image_loss(logit: Tensor, defective: Tensor) -> Tensor:
    """Cross-entropy of the whole image."""
    return functional.binary_cross_entropy_with_logits(logit, defective)
