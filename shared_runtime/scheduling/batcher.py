"""The dynamic batcher: requests that wait together run together.

A batch counts rows, not requests, and never holds more than `max_batch`. It is released when it is full,
when its oldest request has waited `deadline_ms`, when the next request has other shapes, or when the
batcher drains. A request of more rows than fit runs in parts and is answered whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from shared_runtime.backends.streams import difference_of_rows
from shared_runtime.errors import BatcherClosedError, InputError, QueueFullError, SharedRuntimeError
from shared_runtime.model import Model
from shared_runtime.signature import Tensors
from shared_runtime.telemetry.metrics import batches_released, queue_rows

logger = logging.getLogger(__name__)
TOLERANCE = 0.05
"""Largest relative difference of two rows together from each alone: INT8 takes its range from all rows, and is certified so."""


class Runnable(Protocol):
    """What a batcher drives: a Session, or a stand-in for one."""

    model: Model

    def run(self, inputs: Mapping[str, Any]) -> Tensors:
        """Outputs by name, as many rows as the inputs."""
        ...


@dataclass
class BatcherStatistics:
    """Counts since the start: requests, rows, batches, the largest batch, and why batches were released."""

    requests: int = 0
    rows: int = 0
    batches: int = 0
    largest: int = 0
    released: Counter[str] = field(default_factory=Counter)


@dataclass
class _Part:
    """Rows of one request, in one piece."""

    inputs: Tensors
    rows: int
    shapes: tuple[Any, ...]
    arrived: float
    answer: asyncio.Future[Tensors]


class Batcher:
    """Batches requests for one session on the running event loop; use as `async with`.

    Requests to a model whose tensors do not all count rows on their first axis, or whose rows depend on one another (tried
    once, before the first request), run one by one.

    `max_batch`: most rows in a run. `deadline_ms`: longest wait of a request before its batch is
    released. `max_queue`: most rows waiting; beyond it `submit` raises QueueFullError.
    """

    def __init__(self, session: Runnable, *, max_batch: int = 64, deadline_ms: float = 15.0, max_queue: int = 1024) -> None:
        if max_batch < 1 or max_queue < max_batch or deadline_ms < 0:
            raise ValueError(f"expected 1 <= max_batch <= max_queue and deadline_ms >= 0, got {max_batch}, {max_queue}, {deadline_ms}")
        self._session, self._max_batch, self._max_queue = session, max_batch, max_queue
        self._joined = session.model.signature.joins_rows
        self._deadline = deadline_ms / 1e3
        self._queue: deque[_Part] = deque()
        self._waiting = 0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._draining = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batcher")
        self.statistics = BatcherStatistics()

    async def __aenter__(self) -> Batcher:
        if self._draining:
            raise BatcherClosedError("the batcher was closed; make a new one")
        prepare = getattr(self._session, "prepare", None)
        if prepare is not None:  # no request waits for a plan
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._pool, prepare)
            self._joined = self._joined and await loop.run_in_executor(self._pool, self._independent)
        self._task = asyncio.create_task(self._loop())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Answer what waits, then stop."""
        self._draining = True
        self._wake.set()
        if self._task is not None:
            await self._task
        self._pool.shutdown()

    async def submit(self, inputs: Mapping[str, Any]) -> Tensors:
        """The outputs for one request. Raises InputError, QueueFullError, BatcherClosedError."""
        if self._task is None or self._draining:
            raise BatcherClosedError("the batcher is not running; use it inside 'async with'")
        model = self._session.model
        checked = model.signature.check(inputs, model.name)
        counts = {len(value) for value in checked.values()} if self._joined else {1}
        if len(counts) != 1:
            raise InputError(f"model {model.name!r}: inputs have {sorted(counts)} rows; they must have equally many")
        rows = counts.pop()
        if self._waiting + rows > self._max_queue:
            raise QueueFullError(
                f"{self._waiting} rows wait and {rows} more exceed the queue's {self._max_queue}; submit again later or slower"
            )
        if not self._joined:
            return await self._run_alone(checked)
        parts = [self._enqueue(checked, start, min(rows, start + self._max_batch)) for start in range(0, max(rows, 1), self._max_batch)]
        self.statistics.requests += 1
        self._wake.set()
        answers = await asyncio.gather(*(part.answer for part in parts))
        if len(answers) == 1:
            return answers[0]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}

    def _independent(self) -> bool:
        """Whether two rows come out together as each does alone: nobody's answer may depend on who else asks."""
        model = self._session.model
        try:
            apart = difference_of_rows(self._session.run, getattr(self._session, "probe", model.probe)())
        except SharedRuntimeError as error:
            logger.warning("requests to %s run one by one, as its rows can't be tried: %s", model.name, error)
            return False
        if apart > TOLERANCE:
            logger.warning("requests to %s run one by one: two rows together differ by %.1e from each alone", model.name, apart)
        return apart <= TOLERANCE

    async def _run_alone(self, inputs: Tensors) -> Tensors:
        """A request of a model whose rows can't be joined with those of others."""
        self._waiting += 1
        try:
            outputs = await asyncio.get_running_loop().run_in_executor(self._pool, self._session.run, inputs)
        finally:
            self._waiting -= 1
        counts = self.statistics
        counts.requests, counts.rows, counts.batches = counts.requests + 1, counts.rows + 1, counts.batches + 1
        counts.largest = max(counts.largest, 1)
        counts.released["alone"] += 1
        batches_released.labels(self._session.model.name, "alone").inc()
        return outputs

    def _enqueue(self, inputs: Tensors, start: int, stop: int) -> _Part:
        part_inputs = {name: value[start:stop] for name, value in inputs.items()}
        shapes = tuple(value.shape[1:] for value in part_inputs.values())
        answer: asyncio.Future[Tensors] = asyncio.get_running_loop().create_future()
        part = _Part(part_inputs, stop - start, shapes, time.monotonic(), answer)
        self._queue.append(part)
        self._waiting += part.rows
        queue_rows.labels(self._session.model.name).set(self._waiting)
        return part

    async def _loop(self) -> None:
        while self._queue or not self._draining:
            batch, reason, wait = self._form()
            if reason:
                await self._run(batch, reason)
                continue
            if not self._queue and self._draining:  # what waited last was given up
                return
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), wait)
            except TimeoutError:
                continue

    def _form(self) -> tuple[list[_Part], str, float | None]:
        """The batch to run now and why, or how long to wait [s] (None: until a request comes)."""
        while self._queue and self._queue[0].answer.done():
            self._waiting -= self._queue.popleft().rows
        if not self._queue:
            return [], "", None
        batch: list[_Part] = []
        rows, reason = 0, ""
        for part in self._queue:
            if part.answer.done():
                continue
            if batch and part.shapes != batch[0].shapes:
                reason = "shape"
                break
            if rows + part.rows > self._max_batch:
                reason = "full"
                break
            batch.append(part)
            rows += part.rows
        left = self._queue[0].arrived + self._deadline - time.monotonic()
        if rows == self._max_batch:
            reason = "full"
        elif not reason and self._draining:
            reason = "drain"
        elif not reason and left <= 0:
            reason = "deadline"
        return batch, reason, left

    async def _run(self, batch: list[_Part], reason: str) -> None:
        chosen = set(map(id, batch))
        self._queue = deque(part for part in self._queue if id(part) not in chosen)
        rows = sum(part.rows for part in batch)
        self._waiting -= rows
        self.statistics.batches += 1
        self.statistics.rows += rows
        self.statistics.largest = max(self.statistics.largest, rows)
        self.statistics.released[reason] += 1
        batches_released.labels(self._session.model.name, reason).inc()
        queue_rows.labels(self._session.model.name).set(self._waiting)
        try:
            joined = {name: np.concatenate([part.inputs[name] for part in batch]) for name in batch[0].inputs}
            outputs = await asyncio.get_running_loop().run_in_executor(self._pool, self._session.run, joined)
        except Exception as error:
            for part in batch:
                if not part.answer.done():
                    part.answer.set_exception(error)
            return
        start = 0
        for part in batch:
            if not part.answer.done():
                part.answer.set_result({name: value[start : start + part.rows] for name, value in outputs.items()})
            start += part.rows
