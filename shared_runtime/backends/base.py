"""The plug-in point of an engine, and the search for those installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import numpy as np

from shared_runtime.errors import BackendUnavailableError, UnsupportedModelError
from shared_runtime.model import Model
from shared_runtime.signature import Tensors
from shared_runtime.variants import FLOAT, Variant

DEVICES = ("auto", "cpu", "cuda")


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

    def modes(self, device: str) -> tuple[str, ...]:
        """The ways in which it can run a model there without a change of precision; "" is the plain one and comes first."""
        ...

    def compile(self, model: Model, device: str, threads: int, variant: Variant | None = None, mode: str = "") -> Executable:
        """Make `model` ready on exactly that device: in float32, or as a variant that is this engine's.

        Raises BackendUnavailableError where the device can't be had, UnsupportedModelError where the
        graph can't be run. Never falls back to another device or precision.
        """
        ...


def specialise(executable: Executable, inputs: Tensors) -> None:
    """Let an executable prepare for the shapes of `inputs` before requests come; most have nothing to prepare."""
    prepare = getattr(executable, "specialise", None)
    if prepare is not None:
        prepare(inputs)


def prepare_any(executable: Executable) -> None:
    """Let an executable prepare for shapes that it was not specialised for; most have nothing to prepare."""
    prepare = getattr(executable, "prepare_any", None)
    if prepare is not None:
        prepare()


def nodes_by_device(executable: Executable, inputs: Tensors) -> dict[str, int]:
    """How many operators ran where (device, provider or precision) on `inputs`, by the engine's own account; empty where it has none."""
    report = getattr(executable, "nodes", None)
    return dict(report(inputs)) if report is not None else {}


def fewest_rows(backend: HardwareBackend) -> int:
    """From how many rows on an engine is worth trying; 1 but for those that are made for bulk."""
    return int(getattr(backend, "bulk_rows", 1))


def one_thread(backend: HardwareBackend) -> bool:
    """Whether an engine runs a request on one thread, unless a mode says otherwise."""
    return bool(getattr(backend, "one_thread", False))


def zero_rows(executable: Any, inputs: Tensors) -> Tensors | None:
    """Zero rows where a request has none: one row of zeros is run and none of it kept; None for any other request.

    A list of whole numbers beside other inputs may be one of axes or sizes: that it is empty says nothing of rows."""
    given = [value for value in inputs.values() if value.ndim]
    if all(len(value) for value in [v for v in given if v.ndim > 1 or v.dtype.kind not in "iu"] or given):
        return None
    one = {n: np.full([max(1, size) for size in v.shape], "" if v.dtype == object else 0, v.dtype) for n, v in inputs.items()}
    return {name: value[:0] if value.ndim else value for name, value in executable.run(one).items()}


def refuse_unknown_device(device: str) -> None:
    """Raise BackendUnavailableError for what is no device."""
    if device not in DEVICES:
        raise BackendUnavailableError(f"unknown device {device!r}; expected one of {', '.join(DEVICES)}")


def refuse_foreign(engine: str, device: str, variant: Variant | None) -> None:
    """Raise UnsupportedModelError where a variant was made for another engine or device."""
    if variant is not None and (variant.facts.engine, variant.facts.device) != (engine, device):
        raise UnsupportedModelError(
            f"variant {variant.name!r} was made for {variant.facts.engine} on {variant.facts.device}; {engine} on {device} can't take it"
        )


def refuse_unknown_mode(engine: str, device: str, mode: str, known: Sequence[str]) -> None:
    """Raise BackendUnavailableError where an engine does not know a mode on this device here."""
    if mode not in known:
        raise BackendUnavailableError(f"{engine} on {device} has no mode {mode!r} here; it has {list(known)}")


def precision_of(variant: Variant | None) -> str:
    """The precision that a variant computes in."""
    return FLOAT if variant is None else variant.facts.precision


@cache
def backends() -> Mapping[str, HardwareBackend]:
    """The installed backends by name, in the order of their names."""
    found = {}
    for entry in sorted(entry_points(group="triscope.backends"), key=lambda item: item.name):
        backend = entry.load()()
        found[backend.name] = backend
    return found
