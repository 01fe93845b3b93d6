"""What a defect network is trained on: its map and what it says of the image."""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor

ABSENT = 0.25
"""A cell of the map counts as defective where the mask covers at least this share of it."""


def map_loss(logits: Tensor, mask: Tensor, weight: float = 3.0) -> Tensor:
    """Cross-entropy and soft Dice of maps (N, h, w)."""
    target = (mask > ABSENT).float()
    entropy = functional.binary_cross_entropy_with_logits(logits, target, pos_weight=logits.new_full((), weight))
    share = logits.sigmoid()
    overlap = (share * target).sum(dim=(1, 2))
    dice = 1 - (2 * overlap + 1) / (share.sum(dim=(1, 2)) + target.sum(dim=(1, 2)) + 1)
    return entropy + dice.mean()


def image_loss(logit: Tensor, defective: Tensor) -> Tensor:
    """Cross-entropy of the whole image."""
    return functional.binary_cross_entropy_with_logits(logit, defective)
