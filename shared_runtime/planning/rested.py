"""The first request after a quiet moment: where waking ONNX Runtime's threads costs much, they are left to spin instead."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from shared_runtime.backends.base import backends, specialise
from shared_runtime.errors import BackendUnavailableError, UnsupportedModelError
from shared_runtime.model import Model
from shared_runtime.planning.contenders import TOO_LONG, Contender
from shared_runtime.planning.measure import Timed, interleave
from shared_runtime.planning.plan import Candidate
from shared_runtime.signature import Tensors

logger = logging.getLogger(__name__)
SPINNING = "spinning"
LONGEST_SECONDS = 0.02
"""From this long a run on, waking threads costs little beside it."""
REST_SECONDS, TURNS = 0.06, 8
WORTH = 1.25
"""Threads that spin take a core for tens of milliseconds after each run; for a smaller gain they are not worth it."""


def with_spinning(
    model: Model, contenders: list[Contender], lost: list[Candidate], probe: Tensors, rows: int
) -> tuple[list[Contender], list[Candidate]]:
    """The contenders, and who lost: where the fastest for `rows` is ONNX Runtime with several threads that sleep between runs,
    longer than those that are tried spinning from the start, it is timed after rests beside its twin that spins."""
    best = min(contenders, key=lambda contender: contender.timed[rows].median)
    first, one = best.timed[rows].median, best.candidate
    sleeps = (one.backend, one.device, one.mode) == ("onnxruntime", "cpu", "") and one.threads > 1
    if best.executable is None or not sleeps or not TOO_LONG[SPINNING][0] <= first < LONGEST_SECONDS:
        return contenders, lost
    variant = None if one.variant not in model.variants else model.variant(one.variant)
    try:
        twin = backends()[one.backend].compile(model, one.device, one.threads, variant, SPINNING)
        inputs = {count: model.signature.repeated(probe, count) for count in best.timed}
        for given in inputs.values():
            specialise(twin, given)
    except (UnsupportedModelError, BackendUnavailableError) as error:
        logger.info("%s is not tried with threads that spin: %s", one.label, error)
        return contenders, lost
    sleeping, spinning = _rested([best.executable.run, twin.run], inputs[rows])
    if sleeping < WORTH * spinning:
        twin.close()
        return contenders, lost
    made = Contender(msgspec.structs.replace(one, mode=SPINNING), twin, first)
    for count, given in inputs.items():
        made.timed[count] = Timed(partial(twin.run, given))
        interleave([made.timed[count]], 1.0)
    best.let_go()
    why = f"after {1e3 * REST_SECONDS:.0f} ms of rest it takes {1e3 * sleeping:.3g} ms, with threads that spin {1e3 * spinning:.3g} ms"
    others = [contender for contender in contenders if contender is not best and contender.candidate.mode != SPINNING]
    without = [c for c in lost if msgspec.structs.replace(c, lost="") != msgspec.structs.replace(made.candidate, error=None, lost="")]
    return [*others, made], [*without, msgspec.structs.replace(one, lost=why, timings=best.timings(), median_ms=round(1e3 * first, 4))]


def _rested(runs: Sequence[Callable[[Tensors], Tensors]], inputs: Tensors) -> list[float]:
    """Median seconds of each, a quiet moment before every turn."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run(inputs)
    for _ in range(TURNS):
        for run, taken in zip(runs, times, strict=True):
            time.sleep(REST_SECONDS)
            begin = time.perf_counter()
            run(inputs)
            taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in times]
