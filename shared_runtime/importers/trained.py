"""What folders of trained networks have in common: JSON that describes a network, and weights whose file runs no code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared_runtime.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UnsupportedModelError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"{path} is not JSON: {error}; copy it again from where the network was trained") from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path} holds a {type(content).__name__}; expected an object")
    return content


def read_weights(path: Path) -> dict[str, Any]:
    """What a torch checkpoint holds, numbers of numpy included, on the CPU. Raises UnsupportedModelError, also where it would run code."""
    import torch

    core = np._core.multiarray  # type: ignore[attr-defined]
    plain = [core.scalar, np.dtype, *(type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64"))]
    # Checkpoints keep their best score as a numpy number, under the name that numpy had before version 2 as well.
    allowed = [*plain, (core.scalar, "numpy.core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UnsupportedModelError(f"{path.name} can't be read as plain weights, and no code in it is run: {reason}") from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{path.name} holds a {type(content).__name__}; expected a dictionary of weights")
    return content


def load_weights(network: nn.Module, weights: Mapping[str, Any], where: str) -> None:
    """Give a network its weights. Raises UnsupportedModelError where they are another one's."""
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise UnsupportedModelError(
            f"the weights of {where} do not fit the network that is described beside them: {reason[:400]}"
        ) from error


@contextmanager
def described_in(*files: Path) -> Iterator[None]:
    """What is missing or odd in these files is said as such. Raises UnsupportedModelError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        names = " and ".join(file.name for file in files)
        raise UnsupportedModelError(
            f"{names} of {files[0].parent} do not describe a network as expected: {why}; copy them again from where it was trained"
        ) from error
