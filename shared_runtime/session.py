"""The front door: a model, planned on first use, run with named arrays."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from shared_runtime.backends.base import Executable
from shared_runtime.errors import BackendUnavailableError
from shared_runtime.home import home
from shared_runtime.host import usable_cores
from shared_runtime.model import Model
from shared_runtime.planning.planner import Plan, plan_and_compile
from shared_runtime.signature import Tensors
from shared_runtime.telemetry import metrics

logger = logging.getLogger(__name__)
DEVICES = ("auto", "cpu", "cuda")


class Session:
    """Runs one model on this host. Threads may share it.

    `device`: "auto" (the fastest of what is here), "cpu" or "cuda"; one that is missing is an error
    that names what is missing, never a fallback. `threads`: CPU threads, by default every usable core.
    `plans`: folder of the plan cache, by default `TRISCOPE_HOME/plans`.
    """

    def __init__(self, model: Model, device: str = "auto", *, threads: int | None = None, plans: Path | None = None) -> None:
        if device not in DEVICES:
            raise BackendUnavailableError(f"unknown device {device!r}; expected one of {', '.join(DEVICES)}")
        self.model = model
        self._device, self._threads = device, threads or usable_cores()
        self._plans = plans or home() / "plans"
        self._lock = threading.Lock()
        self._ready: tuple[Plan, Executable] | None = None
        self._closed = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def plan(self) -> Plan:
        """What runs and why; made on first use."""
        return self._prepared()[0]

    def run(self, inputs: Mapping[str, Any]) -> Tensors:
        """Outputs by name for inputs by name, each with a leading batch dimension.

        Zero rows give zero rows. Raises InputError where a tensor does not fit the signature,
        BackendUnavailableError where the device is missing.
        """
        checked = self.model.signature.check(inputs, self.model.name)
        plan, executable = self._prepared()
        begin = time.perf_counter()
        outputs = executable.run(checked)
        metrics.ran(plan, self.model.version, len(next(iter(checked.values()), ())), time.perf_counter() - begin)
        return outputs

    def close(self) -> None:
        """Free the engine; the session can't be used afterwards."""
        with self._lock:
            if self._ready is not None:
                self._ready[1].close()
            self._ready, self._closed = None, True

    def _prepared(self) -> tuple[Plan, Executable]:
        with self._lock:
            if self._closed:
                raise BackendUnavailableError(f"the session of {self.model.name!r} is closed; open a new one")
            if self._ready is None:
                self._ready = plan_and_compile(self.model, self._device, self._threads, self._plans)
                metrics.planned(self._ready[0], self.model.version)
                logger.info("plan: %s", self._ready[0].describe())
            return self._ready
