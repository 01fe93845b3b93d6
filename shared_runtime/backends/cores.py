"""A core for each thread of an engine, where a process may use just as many cores as the engine has threads.

Threads that sleep between requests are woken by the one that calls. A kernel that does not look for an idle core beside it may wake
them on the caller's core (Linux looks within cores that share a cache, and where it was built without CONFIG_SCHED_MC, as for small
virtual machines, it takes none to do so). Each then waits for the other's share of time, 4 ms and more, until the load is balanced.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Cores:
    """The cores of an engine's threads: the first is the caller's while it runs, the others are `workers`. None where the engine has
    other numbers of threads than there are cores, or where the system can't tell (macOS, Windows)."""

    def __init__(self, threads: int) -> None:
        usable = _usable()
        self._cores = usable if len(usable) == threads > 1 else ()
        self._taken = threading.Lock()

    @property
    def workers(self) -> tuple[int, ...]:
        """One for each thread but the caller's; () where the system chooses."""
        return self._cores[1:]

    def run(self, call: Callable[[], T]) -> T:
        """What `call` gives, with this thread on the first core meanwhile; of several threads at once one is held there."""
        if not self._cores or not self._taken.acquire(blocking=False):
            return call()
        before = os.sched_getaffinity(0)
        try:
            if self._cores[0] in before:
                _place(self._cores[:1])
            return call()
        finally:
            _place(before)
            self._taken.release()

    def pool(self, threads: int, name: str) -> ThreadPoolExecutor:
        """Threads of our own, each on a core of `workers`."""
        if not self.workers:
            return ThreadPoolExecutor(threads, name)
        places = itertools.count()
        return ThreadPoolExecutor(threads, name, lambda: _place({self.workers[next(places) % len(self.workers)]}))


def _place(cores: Iterable[int]) -> None:
    """Hold the thread that asks on `cores`, unless they were taken from the process meanwhile."""
    try:
        os.sched_setaffinity(0, cores)
    except OSError:
        return


def _usable() -> tuple[int, ...]:
    """The cores of the thread that asks, () where it may not choose among them."""
    try:
        usable = os.sched_getaffinity(0)
        os.sched_setaffinity(0, usable)
    except (AttributeError, OSError):
        return ()
    return tuple(sorted(usable))
