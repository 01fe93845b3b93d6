"""Stand-ins for reduced forms of a model: what their layers do to the output is known."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from shared_runtime.variants import VariantFacts


class FakeForm:
    """A form with these layers; `compile` is the test's own."""

    facts = VariantFacts("int8-fake", "int8", "onnxruntime", "cpu", "model.onnx")
    passes = ("fake",)

    def __init__(self, layers: Iterable[str]) -> None:
        self.layers = tuple(layers)

    def compile(self, reverted: frozenset[str], threads: int) -> Any:
        raise NotImplementedError

    def save(self, reverted: frozenset[str], folder: Path) -> None: ...

    def saturated(self, reverted: frozenset[str], sample: Any) -> None: ...

    def layer_times(self, reverted: frozenset[str], threads: int) -> dict[str, float]:
        return {}


class Adding:
    """An executable that adds its harm to the input."""

    def __init__(self, harm: float) -> None:
        self._harm = harm

    def run(self, inputs: Any) -> dict[str, np.ndarray]:
        return {"y": inputs["x"] + np.float32(self._harm)}

    def close(self) -> None: ...
