"""The plug-in point of an engine, and the search for those installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

from shared_runtime.model import Model
from shared_runtime.signature import Tensors


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on a device here: `version` if so, `lacks` (what is missing) if not."""

    version: str | None = None
    lacks: str | None = None

    @property
    def available(self) -> bool:
        """True where nothing is missing."""
        return self.lacks is None


class Executable(Protocol):
    """A model made ready on one device. `run` may be called from any thread."""

    device: str
    precision: str

    def run(self, inputs: Tensors) -> Tensors:
        """Checked inputs by name -> outputs by name."""
        ...

    def close(self) -> None:
        """Free what the executable holds."""
        ...


@runtime_checkable
class HardwareBackend(Protocol):
    """An engine. `devices` are those it could use (`cpu`, `cuda`); `planned` those that "auto" tries."""

    name: str
    requires: str
    devices: tuple[str, ...]
    planned: tuple[str, ...]

    def availability(self, device: str) -> Availability:
        """Whether `device` can be used here and now, without loading a model."""
        ...

    def compile(self, model: Model, device: str, threads: int) -> Executable:
        """Make `model` ready in float32 on exactly that device.

        Raises BackendUnavailableError where the device can't be had, UnsupportedModelError where the
        graph can't be run. Never falls back to another device or precision.
        """
        ...


@cache
def backends() -> Mapping[str, HardwareBackend]:
    """The installed backends by name, in the order of their names."""
    found = {}
    for entry in sorted(entry_points(group="triscope.backends"), key=lambda item: item.name):
        backend = entry.load()()
        found[backend.name] = backend
    return found
