"""XGBoost itself, for bulk rows of a boosted model whose folder carries the native booster."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from contextlib import suppress
from typing import Any

import numpy as np

from shared_runtime.backends.base import Availability, refuse_foreign
from shared_runtime.certificate import hash_file
from shared_runtime.errors import BackendUnavailableError, ModelIntegrityError, UnsupportedModelError
from shared_runtime.model import Model
from shared_runtime.signature import Tensors
from shared_runtime.variants import FLOAT, Variant


def _version() -> str:
    """As its package states it: importing it would bring pandas and scikit-learn into a process that may not need them."""
    for package in ("xgboost", "xgboost-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    import xgboost

    return str(xgboost.__version__)


class XgboostExecutable:
    """A booster that predicts in place, without a copy of the rows."""

    device, precision = "cpu", FLOAT

    def __init__(self, booster: Any, model: Model) -> None:
        self._booster, self._spec = booster, model.signature.outputs[0]
        self._input = model.signature.inputs[0].name

    def run(self, inputs: Tensors) -> Tensors:
        rows = inputs[self._input]
        if not len(rows):
            return {self._spec.name: np.zeros((0, *(s for s in self._spec.shape[1:] if isinstance(s, int))), np.float32)}
        values = self._booster.inplace_predict(rows)
        wide = [len(rows), *(int(size) for size in self._spec.shape[1:])]
        return {self._spec.name: np.asarray(values, np.float32).reshape(wide)}

    def close(self) -> None:
        del self._booster


class XgboostBackend:
    """The backend `xgboost`. A model's card names its booster: `native.engine`, `native.file`, `native.sha256`."""

    name = "xgboost"
    requires = "xgboost, and a model whose card names a native booster"
    devices = ("cpu",)
    planned = ("cpu",)
    bulk_rows = 256
    """Below, a call costs more than the trees."""

    def availability(self, device: str) -> Availability:
        if importlib.util.find_spec("xgboost") is None:
            return Availability(lacks="the package xgboost (pip install xgboost)")
        return Availability(version=_version())

    def modes(self, device: str) -> tuple[str, ...]:
        return ("",)

    def compile(self, model: Model, device: str, threads: int, variant: Variant | None = None, mode: str = "") -> XgboostExecutable:
        if lacks := self.availability(device).lacks:
            raise BackendUnavailableError(f"XGBoost lacks {lacks}")
        refuse_foreign(self.name, device, variant)
        native = model.card.get("native", {})
        if native.get("engine") != self.name:
            raise UnsupportedModelError(f"{model.name!r} carries no native XGBoost booster")
        path = model.graph.parent / str(native["file"])
        if path.parent.resolve() != model.graph.parent.resolve() or not path.is_file() or hash_file(path) != native.get("sha256"):
            raise ModelIntegrityError(
                f"the booster {path.name} of {model.name!r} is missing or is not the one its card names; import it again"
            )
        import xgboost

        booster = xgboost.Booster(model_file=str(path))
        booster.set_param({"nthread": threads})
        return XgboostExecutable(booster, model)
