"""The plug-in shape of a quantizer: a form of the model in which layers can be put back to float one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from shared_runtime.backends.base import Executable
from shared_runtime.variants import VariantFacts


class Form(Protocol):
    """One reduced form. `layers` can be put back to float by name; a form without layers passes whole or not at all."""

    facts: VariantFacts
    layers: tuple[str, ...]
    passes: tuple[str, ...]

    def compile(self, reverted: frozenset[str], threads: int) -> Executable:
        """The form with those layers in float, ready to run."""
        ...

    def save(self, reverted: frozenset[str], folder: Path) -> None:
        """Write the form's files (`facts.graph` first of all) into `folder`; nothing for an engine's own precision."""
        ...

    def layer_times(self, reverted: frozenset[str], threads: int) -> dict[str, float]:
        """Time of each layer in one run [s], by the engine's own profile; empty where it has none."""
        ...
