"""`woken`: requests after a rest, with the threads of an engine where the kernel puts them and with a core for each.

python benchmarks/run.py woken
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np

import shared_runtime as rt
from shared_runtime.backends.base import backends, specialise
from shared_runtime.host import host

RESTS = (0.0, 0.005, 0.06)
ROUNDS, TURNS = 8, 20
CASES = (
    ("texture-features", "onnxruntime", "", 1),
    ("fraud-sequence", "onnxruntime", "", 32),
    ("fraud-sequence", "fused", "streams", 32),
    ("fraud-boosting", "trees", "", 4096),
)


def woken() -> dict[str, Any]:
    """Medians and 90th percentiles [ms]; the two take turns of twenty requests, so that a busy minute falls on both."""
    rows = []
    for name, engine, mode, count in CASES:
        model = rt.load(name)
        inputs = model.signature.random(count, 0)
        with patch("shared_runtime.backends.cores._usable", return_value=()):
            free = backends()[engine].compile(model, "cpu", host().cores, mode=mode)
        held = backends()[engine].compile(model, "cpu", host().cores, mode=mode)
        for executable in (free, held):
            specialise(executable, inputs)
        for rest in RESTS:
            times: dict[str, list[float]] = {"free": [], "held": []}
            for _ in range(ROUNDS):
                for kind, executable in (("free", free), ("held", held)):
                    for _ in range(TURNS):
                        time.sleep(rest)
                        begin = time.perf_counter()
                        executable.run(inputs)
                        times[kind].append(1e3 * (time.perf_counter() - begin))
            found = {kind: {"median": float(np.median(t)), "p90": float(np.quantile(t, 0.9))} for kind, t in times.items()}
            rows.append({"model": name, "engine": " ".join(filter(None, (engine, mode))), "rows": count, "rest_ms": 1e3 * rest, **found})
        free.close()
        held.close()
    return {"cases": rows}


def report_lines(load: Callable[[str], Any], where: Callable[[dict[str, Any]], str]) -> list[str]:
    """The page's part on woken threads."""
    if not (found := load("woken")):
        return []
    return [
        "## Threads that were asleep",
        "",
        f"Requests after a rest, {where(found)}, a thread a core: median / 90th percentile [ms] where the kernel places the threads, and with a core for each",
        "(`shared_runtime/backends/cores.py`). Its kernel may wake a thread on the core of the one that calls it, and each then waits for the other.",
        "",
        "| model | engine | rows | rest [ms] | kernel's places | a core each |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['model']} | {r['engine']} | {r['rows']} | {r['rest_ms']:.0f} | {r['free']['median']:.2f} / {r['free']['p90']:.2f} "
            f"| {r['held']['median']:.2f} / {r['held']['p90']:.2f} |"
            for r in found["result"]["cases"]
        ),
        "",
    ]


SUITES: dict[str, Callable[[], dict[str, Any]]] = {"woken": woken}
