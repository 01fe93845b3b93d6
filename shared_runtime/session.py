"""The front door: a model, planned on first use, run with named arrays."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

from shared_runtime.backends.base import refuse_unknown_device
from shared_runtime.errors import BackendUnavailableError, ModelIntegrityError, UnsupportedModelError
from shared_runtime.graph.memory import within_budget
from shared_runtime.home import home
from shared_runtime.host import asked_cores
from shared_runtime.model import Model, load, refuse_replaced
from shared_runtime.planning.objective import LATENCY, Objective
from shared_runtime.planning.plan import Plan
from shared_runtime.planning.planner import BUDGET_SECONDS, LADDER, Ladder, plan_and_compile
from shared_runtime.signature import Checker, Tensors
from shared_runtime.telemetry import metrics

logger = logging.getLogger(__name__)


class Session:
    """Runs one model on this host. Threads may share it.

    `model`: loaded, or a name or path for `rt.load`.
    `device`: "auto" (the fastest of what is here), "cpu" or "cuda"; one that is missing is an error
    that names what is missing, never a fallback. `threads`: CPU threads, by default every usable core.
    `plans`: folder of the plan cache, by default `TRISCOPE_HOME/plans`. `objective`: "latency", "throughput",
    "memory", "energy" or an Objective. `ladder`: numbers of rows to plan for. `variant`: only that one ("float32":
    the reference); without, every variant with a valid certificate takes part. `thorough`: also try what is slow
    to prepare. `budget_s`: seconds of measurement. `probe`: inputs to measure on, random ones without;
    where no engine takes those, the model's example or the first request.
    `memory_budget_mib`: refuse a model whose planned peak for one row is above it (MemoryBudgetError).
    """

    def __init__(
        self,
        model: Model | str | Path,
        device: str = "auto",
        *,
        threads: int | None = None,
        plans: Path | str | None = None,
        objective: str | Objective = LATENCY,
        ladder: Sequence[int] = LADDER,
        variant: str | None = None,
        thorough: bool = False,
        budget_s: float = BUDGET_SECONDS,
        probe: Mapping[str, Any] | None = None,
        memory_budget_mib: float | None = None,
    ) -> None:
        refuse_unknown_device(device)
        cores = asked_cores(threads)
        model = model if isinstance(model, Model) else load(model)
        self.model = model
        self._device, self._threads = device, cores
        self._plans = home() / "plans" if plans is None else Path(plans)
        self._check = Checker(model.signature, model.name)
        self._lock = threading.Lock()
        self._ready: tuple[Plan, Ladder] | None = None
        self._run: Callable[[Tensors], Tensors] | None = None
        self._closed = False
        self._asked: dict[str, Any] = {
            "objective": Objective(objective) if isinstance(objective, str) else objective,
            "ladder": tuple(ladder),
            "variant": variant,
            "thorough": thorough,
            "budget_s": budget_s,
            "probe": None if probe is None else model.signature.check(probe, model.name),
        }
        if not ladder or not all(isinstance(rows, Integral) and rows >= 1 for rows in ladder):
            raise ValueError(f"a ladder holds numbers of rows from 1 on, got {list(ladder)}")
        if memory_budget_mib is not None:
            if not memory_budget_mib > 0:
                raise ValueError(f"memory_budget_mib is {memory_budget_mib}; expected a number above 0")
            within_budget(model, memory_budget_mib)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def plan(self) -> Plan:
        """What runs and why; made on first use."""
        return self._prepared()[0]

    def probe(self) -> Tensors:
        """The inputs that it is measured on: those that it was given, or the model's."""
        given: Tensors | None = self._asked["probe"]
        return self.model.probe() if given is None else given

    def run(self, inputs: Mapping[str, Any]) -> Tensors:
        """Outputs by name for inputs by name, each with a leading batch dimension.

        Zero rows give zero rows. Raises InputError where a tensor does not fit the signature,
        BackendUnavailableError where the device is missing.
        """
        checked = self._check(inputs)
        run = self._run
        if run is None:
            run = self._prepared(checked)[1].run
        begin = perf_counter()
        try:
            outputs = run(checked)
        except Exception as error:
            if self._closed:  # by another thread meanwhile
                raise self._is_closed() from error
            raise
        shape = next(iter(checked.values())).shape
        self._observe(shape[0] if shape else 1, perf_counter() - begin)
        return outputs

    def prepare(self) -> Plan:
        """Plan and load now, so that no request pays for it."""
        return self._prepared()[0]

    def close(self) -> None:
        """Free the engine; the session can't be used afterwards."""
        with self._lock:
            ready, self._ready, self._run, self._closed = self._ready, None, None, True
            if ready is not None:
                ready[1].close()

    def _is_closed(self) -> BackendUnavailableError:
        return BackendUnavailableError(f"the session of {self.model.name!r} is closed; open a new one")

    def _prepared(self, request: Tensors | None = None) -> tuple[Plan, Ladder]:
        with self._lock:
            if self._closed:
                raise self._is_closed()
            if self._ready is None:
                refuse_replaced(self.model)
                ready = self._planned(request)
                try:
                    refuse_replaced(self.model)
                except ModelIntegrityError:
                    ready[1].close()
                    raise
                self._ready = ready
                metrics.planned(self._ready[0], self.model.version)
                self._observe = metrics.observer(self._ready[0], self.model.version)
                self._run = self._ready[1].run
                logger.info("plan: %s", self._ready[0].describe())
            return self._ready

    def _planned(self, request: Tensors | None) -> tuple[Plan, Ladder]:
        asked, signature = (self.model, self._device, self._threads, self._plans), self.model.signature
        try:
            return plan_and_compile(*asked, **self._asked)
        except (BackendUnavailableError, UnsupportedModelError) as error:
            valid = self.model.example or (signature.row(request, 0) if request is not None and signature.rows(request) else None)
            if valid is None or self._asked["probe"] is not None:
                raise
            try:
                made = plan_and_compile(*asked, **{**self._asked, "probe": valid})
            except (BackendUnavailableError, UnsupportedModelError):
                raise error from None
            logger.info("%s is planned on inputs that were given: no engine takes random ones", self.model.name)
            return made
