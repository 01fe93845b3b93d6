"""Backends with a chosen answer and speed, and a plan over them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shared_runtime as rt
from shared_runtime.backends import base
from shared_runtime.planning import contenders, planner
from shared_runtime.signature import Tensors


class Engine:
    """A backend with a chosen answer and speed, in place of the installed ones."""

    requires, devices, planned = "", ("cpu",), ("cpu",)

    def __init__(self, name: str, offset: float, cost: int) -> None:
        self.name, self.offset, self.cost, self.device, self.precision, self.closed = name, offset, cost, "cpu", "float32", 0

    def availability(self, device: str) -> base.Availability:
        return base.Availability(version="1")

    def modes(self, device: str) -> tuple[str, ...]:
        return ("",)

    def compile(self, model: rt.Model, device: str, threads: int, variant: Any = None, mode: str = "") -> Engine:
        return self

    def run(self, inputs: Tensors) -> Tensors:
        for _ in range(self.cost):
            np.linalg.inv(np.eye(60))
        return {"y": 2 * inputs["x"] + 1 + self.offset}

    def close(self) -> None:
        self.closed += 1


def plan_with(
    monkeypatch: pytest.MonkeyPatch, model: Path | rt.Model, engines: list[Engine], cache: Path | None = None, threads: int = 1
) -> rt.Plan:
    """The plan for a model with these engines alone."""
    table: Mapping[str, Any] = {engine.name: engine for engine in engines}
    for module in (planner, contenders):
        monkeypatch.setattr(module, "backends", lambda: table)
    return planner.plan_and_compile(model if isinstance(model, rt.Model) else rt.load(model), "auto", threads, cache)[0]
