"""How fast this host can be at best: arithmetic and memory, measured once; a lower bound of a candidate's time."""

from __future__ import annotations

import time
from functools import cache

import msgspec
import numpy as np

from shared_runtime.graph.cost import GraphCost
from shared_runtime.host import Host, host

SECONDS = 0.15
MARGIN = 2.0
"""A candidate is given up unmeasured only where even this many times the measured ceiling would not save it."""


class Ceiling(msgspec.Struct, frozen=True):
    """Arithmetic [operations/s] of float32 on all cores and on one, and bytes a second that a copy moves."""

    operations: float
    operations_one: float
    bytes: float


def gain(precision: str, facts: Host | None = None) -> float:
    """How much faster than float32 the processor's own instructions are in `precision`."""
    flags = set((facts or host()).vector)
    if precision.startswith("int8"):
        return 32.0 if "amx_int8" in flags else 4.0 if flags & {"avx512_vnni", "avx_vnni"} else 2.0
    if precision == "bfloat16":
        return 16.0 if "amx_bf16" in flags else 2.0 if "avx512_bf16" in flags else 1.0
    return 1.0


@cache
def ceiling() -> Ceiling:
    """Measured by matrix products and copies in this process; about half a second, once."""
    from threadpoolctl import threadpool_limits

    a = np.random.default_rng(0).standard_normal((768, 768)).astype(np.float32)
    block = np.ones(32 << 20, np.uint8)
    target = np.empty_like(block)
    with threadpool_limits(1):
        one = _best(lambda: a @ a) ** -1 * 2 * 768**3
    with threadpool_limits(host().cores):
        every = _best(lambda: a @ a) ** -1 * 2 * 768**3
    return Ceiling(max(one, every), one, 2 * block.nbytes / _best(lambda: np.copyto(target, block)))


def lower_bound_ms(cost: GraphCost, precision: str, threads: int) -> float:
    """No candidate in `precision` can take less [ms]: its arithmetic at MARGIN times the measured ceiling."""
    best = ceiling()
    speed = best.operations_one if threads == 1 else best.operations
    return 1e3 * cost.operations / (MARGIN * speed * gain(precision))


def _best(call: object) -> float:
    assert callable(call)
    call()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < SECONDS:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)
