"""ONNX's recurrent operators as torch calls: one layer with the default activations, forward, in reverse or both."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from shared_runtime.backends.torch_windows import Attributes
from shared_runtime.errors import UnsupportedModelError

warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")  # cuDNN lays them out as it likes
ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}
ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}
"""Torch's gates among ONNX's: i, o, f, c to i, f, g, o; z, r, h to r, z, n."""


def lstm(inputs: list[Any], attributes: Attributes) -> tuple[Tensor, ...]:
    """Y (T, directions, N, H), the last hidden state and the last cell state (directions, N, H)."""
    x, w, r, b, lengths, h0, c0, peepholes = [*inputs, *[None] * 8][:8]
    if attributes.get("input_forget", 0) or peepholes is not None:
        raise UnsupportedModelError("LSTM with input_forget or peepholes")
    backward, zero, flat = _laid_out("LSTM", x, w, r, b, lengths, attributes)
    state = (zero if h0 is None else h0, zero if c0 is None else c0)
    given = x.flip(0) if backward else x
    y, h, c = torch.lstm(given, state, flat, True, 1, 0.0, False, w.shape[0] == 2, False)
    return _directed(y, w.shape[0], attributes, backward), h, c


def gru(inputs: list[Any], attributes: Attributes) -> tuple[Tensor, ...]:
    """Y (T, directions, N, H) and the last hidden state (directions, N, H)."""
    x, w, r, b, lengths, h0 = [*inputs, *[None] * 6][:6]
    if not attributes.get("linear_before_reset", 0):
        raise UnsupportedModelError("GRU that resets before the product")
    backward, zero, flat = _laid_out("GRU", x, w, r, b, lengths, attributes)
    given = x.flip(0) if backward else x
    y, h = torch.gru(given, zero if h0 is None else h0, flat, True, 1, 0.0, False, w.shape[0] == 2, False)
    return _directed(y, w.shape[0], attributes, backward), h


def _laid_out(
    kind: str, x: Tensor, w: Tensor, r: Tensor, b: Any, lengths: Any, attributes: Attributes
) -> tuple[bool, Tensor, list[Tensor]]:
    """Whether it runs in reverse, a state of zeros, and torch's list of weights."""
    directions, hidden, gates = w.shape[0], attributes["hidden_size"], len(ORDER[kind])
    named = [value.decode() if isinstance(value, bytes) else value for value in attributes.get("activations", [])]
    if (
        attributes.get("clip", 0.0)
        or attributes.get("layout", 0)
        or lengths is not None
        or named not in ([], ACTIVATIONS[kind] * directions)
    ):
        raise UnsupportedModelError(f"{kind} with clip, lengths, layout or other activations")

    def ordered(value: Tensor) -> Tensor:
        parts = value.split(hidden, 0)
        return torch.cat([parts[place] for place in ORDER[kind]])

    flat = []
    for d in range(directions):
        bias = b[d] if b is not None else torch.zeros(2 * gates * hidden, dtype=x.dtype, device=x.device)
        flat += [ordered(w[d]), ordered(r[d]), ordered(bias[: gates * hidden]), ordered(bias[gates * hidden :])]
    direction = attributes.get("direction", "forward")
    return direction == "reverse", torch.zeros(directions, x.shape[1], hidden, dtype=x.dtype, device=x.device), flat


def _directed(y: Tensor, directions: int, attributes: Attributes, backward: bool) -> Tensor:
    y = y.reshape(*y.shape[:2], directions, attributes["hidden_size"]).transpose(1, 2)
    return y.flip(0) if backward else y
