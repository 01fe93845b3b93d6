"""The plug-in shape of a quantizer: a form of the model in which layers can be put back to float one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, Self, runtime_checkable

from shared_runtime.backends.base import Executable
from shared_runtime.signature import Tensors
from shared_runtime.variants import VariantFacts

BETWEEN = "between layers"
"""The name under which everything that stands between layers (additions, pooling ...) goes back to float together."""


class Form(Protocol):
    """One reduced form. `layers` can be put back to float by name; a form without layers passes whole or not at all."""

    @property
    def facts(self) -> VariantFacts:
        """Name, precision, engine and graph file."""
        ...

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers that can be put back."""
        ...

    @property
    def passes(self) -> tuple[str, ...]:
        """What was done, for the certificate."""
        ...

    def compile(self, reverted: frozenset[str], threads: int) -> Executable:
        """The form with those layers in float, ready to run."""
        ...

    def save(self, reverted: frozenset[str], folder: Path) -> None:
        """Write the form's files (`facts.graph` first of all) into `folder`; nothing for an engine's own precision."""
        ...

    def saturated(self, reverted: frozenset[str], sample: Tensors) -> int | None:
        """How many 16-bit sums would saturate on a CPU without VNNI; None where that is no question of this form."""
        ...

    def layer_times(self, reverted: frozenset[str], threads: int) -> dict[str, float]:
        """Time of each layer in one run [s], by the engine's own profile; empty where it has none."""
        ...


@runtime_checkable
class PackingForm(Form, Protocol):
    """A form that can store weights in INT8 of layers that it computes in float.

    `stored`: layers of which it never does more; they are not slower than in float.
    """

    stored: frozenset[str]

    def packed(self, layers: frozenset[str]) -> Self:
        """The same form that does so for these layers."""
        ...
