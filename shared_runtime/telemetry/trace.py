"""`@rt.trace`: spans of Python functions, nested and from any thread, as a table, as JSON and as a Chrome trace."""

from __future__ import annotations

import functools
import inspect
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import msgspec
import psutil

P = ParamSpec("P")
R = TypeVar("R")
MOST_SPANS = 100_000
_parent: ContextVar[str] = ContextVar("parent", default="")


class Span(msgspec.Struct, frozen=True):
    """One call: start and duration [us], the span around it, its thread, the change of resident memory [bytes], the error."""

    name: str
    start_us: float
    duration_us: float
    parent: str
    thread: int
    memory_bytes: int
    error: str


class Tracer:
    """Keeps the last spans. Use as a decorator (`@rt.trace`), or around a block (`with rt.trace.span("load"):`)."""

    def __init__(self, most: int = MOST_SPANS) -> None:
        self._most, self._spans, self._lock = most, [], threading.Lock()  # type: tuple[int, list[Span], threading.Lock]
        self._process = psutil.Process()

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Record every call of `function`; of a coroutine function until what it does is done. Raises TypeError for a generator, whose
        work is done between calls."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function.__qualname__} is a generator, which works between calls; trace what it calls, or use rt.trace.span")
        if inspect.iscoroutinefunction(function):
            return cast(Callable[P, R], self._awaited(function))

        @functools.wraps(function)
        def traced(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.span(function.__qualname__):
                return function(*args, **kwargs)

        return traced

    def _awaited(self, function: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
        @functools.wraps(function)
        async def traced(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.span(function.__qualname__):
                return await function(*args, **kwargs)

        return traced

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record the time and the memory of a block."""
        parent = _parent.get()
        token = _parent.set(name)
        memory, begin, error = self._process.memory_info().rss, time.perf_counter_ns(), ""
        try:
            yield
        except BaseException as raised:
            error = type(raised).__name__
            raise
        finally:
            duration = time.perf_counter_ns() - begin
            _parent.reset(token)
            grown = self._process.memory_info().rss - memory
            with self._lock:
                self._spans.append(Span(name, begin / 1e3, duration / 1e3, parent, threading.get_ident(), grown, error))
                del self._spans[: -self._most]

    def spans(self) -> list[Span]:
        """The spans so far, in the order in which they ended."""
        with self._lock:
            return list(self._spans)

    def clear(self) -> None:
        """Forget them."""
        with self._lock:
            self._spans.clear()

    def table(self) -> str:
        """Calls and times a name, slowest first."""
        rows: dict[str, list[float]] = {}
        for span in self.spans():
            rows.setdefault(span.name, []).append(span.duration_us)
        lines = [f"{'name':50} {'calls':>7} {'total ms':>10} {'mean ms':>10} {'max ms':>10}"]
        for name, times in sorted(rows.items(), key=lambda item: -sum(item[1])):
            lines.append(
                f"{name[-50:]:50} {len(times):7} {sum(times) / 1e3:10.3f} {sum(times) / len(times) / 1e3:10.3f} {max(times) / 1e3:10.3f}"
            )
        return "\n".join(lines)

    def json(self) -> list[dict[str, Any]]:
        """The spans as plain values."""
        return [msgspec.to_builtins(span) for span in self.spans()]

    def chrome_trace(self, path: Path | str) -> None:
        """Write a trace for chrome://tracing or Perfetto."""
        events = [
            {
                "name": s.name,
                "ph": "X",
                "ts": s.start_us,
                "dur": s.duration_us,
                "pid": 0,
                "tid": s.thread,
                "args": {"memory_bytes": s.memory_bytes},
            }
            for s in self.spans()
        ]
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


trace = Tracer()
