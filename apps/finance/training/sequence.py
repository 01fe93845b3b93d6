"""`fraud-sequence`: an LSTM with attention over the customer's last transactions. Needs the extra `train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from apps.finance.features.schema import FEATURES
from apps.finance.features.sequence import gather


@dataclass(frozen=True)
class SequenceRecipe:
    """What a training run does; recorded in the model's card."""

    hidden: int = 48
    epochs: int = 8
    batch: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.2
    members: int = 3
    rows_per_epoch: int = 120_000
    """A larger table is walked in passes of this many rows, drawn anew; so time does not grow with history."""
    seed: int = 0


LEVELS = (0.0, 0.125, 0.25, *(1 - 0.5**k for k in range(1, 12)), 1.0)
"""Quantiles at which the present transaction's features are cut, finer towards the top: what is rare lies there."""


NOTHING_KNOWN = 1e6
"""What stands for the spread of a feature that never changed in training (a terminal's frauds, in a history of a week): when it does change
nothing is known of what that means, and it says next to nothing."""


class SequenceNetwork(nn.Module):  # type: ignore[misc]
    """LSTM, then dot-product attention whose query is the last state; logit from context, state and the present.

    Input is raw features, compressed by sign(x) log(1 + |x|) and standardised inside; the present
    transaction's are also given piecewise linear between quantiles of `sample` (N, F), so that thresholds
    are easy to learn. Hochreiter and Schmidhuber (1997); attention as in Luong et al. (2015); encoding as in
    Gorishniy et al., "On Embeddings for Numerical Features" (2022).
    """

    def __init__(self, sample: Tensor, recipe: SequenceRecipe) -> None:
        super().__init__()
        squeezed = compress(sample)
        self.register_buffer("mean", squeezed.mean(0))
        spread = squeezed.std(0)
        self.register_buffer("scale", torch.where(spread < 1e-3, NOTHING_KNOWN, spread))
        edges = torch.from_numpy(np.quantile(sample.numpy(), LEVELS, axis=0).T.astype(np.float32))  # (F, B + 1)
        width = edges[:, 1:] - edges[:, :-1]
        self.register_buffer("low", edges[:, :-1].clone())
        self.register_buffer("slope", torch.where(width > 1e-6, 1 / width.clamp(min=1e-6), torch.zeros_like(width)))
        hidden, bins = recipe.hidden, width.numel()
        self.lstm = nn.LSTM(len(FEATURES), hidden, batch_first=True)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.head = nn.Sequential(
            nn.Dropout(recipe.dropout),
            nn.Linear(2 * hidden + len(FEATURES) + bins, hidden),
            nn.ReLU(),
            nn.Dropout(recipe.dropout),
            nn.Linear(hidden, 1),
        )

    def forward(self, sequence: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(N, L, F) and (N, L) -> logit (N,), attention (N, L) that sums to one over the mask."""
        x = (compress(sequence) - self.mean) / self.scale * mask[:, :, None]
        states, _ = self.lstm(x)
        last = states[:, -1]
        energy = torch.einsum("nlh,nh->nl", states, self.query(last)) / states.shape[-1] ** 0.5
        attention = torch.softmax(energy - (1 - mask) * 1e4, dim=1)
        context = torch.einsum("nl,nlh->nh", attention, states)
        pieces = torch.clamp((sequence[:, -1, :, None] - self.low) * self.slope, 0, 1).flatten(1)
        logit = self.head(torch.cat([context, last, x[:, -1], pieces], dim=1))[:, 0]
        return logit, attention


class SequenceEnsemble(nn.Module):  # type: ignore[misc]
    """Members trained on different customers; mean logit and mean attention."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, sequence: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(N, L, F) and (N, L) -> logit (N,), attention (N, L)."""
        answers = [member(sequence, mask) for member in self.members]
        return torch.stack([a[0] for a in answers]).mean(0), torch.stack([a[1] for a in answers]).mean(0)


def compress(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def train_member(
    features: NDArray[np.float32], rows: NDArray[np.int64], labels: NDArray[np.int64], recipe: SequenceRecipe, seed: int, threads: int
) -> SequenceNetwork:
    """A network trained on the sequences `rows` (N, LENGTH) of the table `features`, labels (N,) 0 or 1."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    network = SequenceNetwork(torch.from_numpy(features[rows[:, -1]]), recipe)
    optimiser = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    per_epoch = min(len(rows), recipe.rows_per_epoch)
    steps = recipe.epochs * max(1, per_epoch // recipe.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, total_steps=steps + 1, pct_start=0.15)
    network.train()
    order, at = generator.permutation(len(rows)), 0
    for _ in range(steps):
        if at + recipe.batch > len(order):
            order, at = generator.permutation(len(rows)), 0
        chosen = order[at : at + recipe.batch]
        at += recipe.batch
        values, mask = gather(features, rows[chosen])
        logit, _ = network(torch.from_numpy(values), torch.from_numpy(mask))
        loss = nn.functional.binary_cross_entropy_with_logits(logit, torch.from_numpy(labels[chosen].astype(np.float32)))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    network.eval()
    return network


@torch.no_grad()  # type: ignore[untyped-decorator]
def predict_logits(network: nn.Module, features: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logits (N,) of the sequences `rows` (N, LENGTH)."""
    parts = []
    for low in range(0, len(rows), 8192):
        values, mask = gather(features, rows[low : low + 8192])
        parts.append(network(torch.from_numpy(values), torch.from_numpy(mask))[0].numpy())
    return np.concatenate(parts).astype(np.float64) if parts else np.empty(0)
