"""The planner: every backend that can run the model here is timed side by side; the fastest is kept.

Candidates are run in turn, round by round, so that a busy moment of the machine falls on all of them. A
candidate whose outputs differ from the reference (ONNX Runtime on the CPU, float32) loses, however fast.
The plan is cached under the model's hash and the host's fingerprint.
"""

from __future__ import annotations

import statistics
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from shared_runtime.backends.base import Executable, backends
from shared_runtime.errors import BackendUnavailableError, UnsupportedModelError
from shared_runtime.host import host
from shared_runtime.model import Model
from shared_runtime.signature import Tensors

ROUNDS, BUDGET_SECONDS = 5, 6.0
TOLERANCE = 1e-3
"""Largest allowed norm of the difference from the reference, over the norm of the reference."""


class Candidate(msgspec.Struct, frozen=True):
    """One backend on one device: its median and spread (interquartile) [ms], or why it can't be used."""

    backend: str
    device: str
    version: str = ""
    median_ms: float | None = None
    spread_ms: float | None = None
    error: float | None = None
    lost: str = ""


class Plan(msgspec.Struct, frozen=True):
    """What this host runs for a model, why, and what it was compared with."""

    model: str
    sha256: str
    host: str
    backend: str
    device: str
    precision: str
    variant: str
    threads: int
    why: str
    candidates: tuple[Candidate, ...]

    def describe(self) -> str:
        """One line: the choice and the reason."""
        return f"{self.model}: {self.backend} on {self.device}, {self.precision}, {self.threads} threads - {self.why}"


@dataclass
class _Contender:
    backend: str
    device: str
    version: str
    executable: Executable
    error: float
    times: list[float]


def plan_and_compile(model: Model, device: str, threads: int, cache: Path | None) -> tuple[Plan, Executable]:
    """The plan for `model` on `device` ("auto", "cpu" or "cuda") and the executable it names.

    Raises BackendUnavailableError where no backend can serve the device: it names what each one lacks.
    """
    file = None if cache is None else cache / f"{model.sha256[:16]}-{_context(device, threads)}.json"
    if file is not None and (plan := _cached(file, model)) is not None:
        return plan, backends()[plan.backend].compile(model, plan.device, threads)
    contenders, lost = _contenders(model, device, threads)
    if not contenders:
        reasons = "; ".join(f"{c.backend} on {c.device}: {c.lost}" for c in lost) or "no backend knows this device"
        raise BackendUnavailableError(f"no backend can run {model.name!r} on device {device!r}: {reasons}")
    _measure(contenders, model.signature.random())
    ranked = sorted(contenders, key=lambda c: statistics.median(c.times))
    plan = _plan(model, ranked, lost, threads)
    for loser in ranked[1:]:
        loser.executable.close()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{time.monotonic_ns()}.part")
        part.write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=2))
        part.replace(file)
    return plan, ranked[0].executable


def _context(device: str, threads: int) -> str:
    versions = [f"{name}{backend.availability(d).version}" for name, backend in backends().items() for d in backend.planned]
    return f"{host().fingerprint}-{device}-{threads}-{zlib.crc32(','.join(versions).encode()):08x}"


def _cached(file: Path, model: Model) -> Plan | None:
    try:
        plan = msgspec.json.decode(file.read_bytes(), type=Plan)
    except (OSError, msgspec.MsgspecError):
        return None
    return plan if plan.sha256 == model.sha256 and plan.backend in backends() else None


def _contenders(model: Model, device: str, threads: int) -> tuple[list[_Contender], list[Candidate]]:
    probe = model.signature.random()
    reference: Tensors | None = None
    contenders: list[_Contender] = []
    lost: list[Candidate] = []
    for name, backend in backends().items():
        for kind in backend.devices:
            if (device == "auto" and kind not in backend.planned) or device not in ("auto", kind):
                continue
            if device == kind == "cpu" and kind not in backend.planned:
                continue
            state = backend.availability(kind)
            if state.lacks is not None:
                lost.append(Candidate(name, kind, lost=f"lacks {state.lacks}"))
                continue
            try:
                executable = backend.compile(model, kind, threads)
                outputs = executable.run(probe)
            except (UnsupportedModelError, BackendUnavailableError) as failure:
                lost.append(Candidate(name, kind, state.version or "", lost=str(failure)))
                continue
            if reference is None:
                reference = outputs if name == "onnxruntime" and kind == "cpu" else _reference(model, threads, probe)
            error = _difference(outputs, reference)
            if not error <= TOLERANCE:
                executable.close()
                lost.append(
                    Candidate(name, kind, state.version or "", error=error, lost=f"outputs differ from the reference by {error:.1e}")
                )
                continue
            contenders.append(_Contender(name, kind, state.version or "", executable, error, []))
    return contenders, lost


def _reference(model: Model, threads: int, probe: Tensors) -> Tensors:
    executable = backends()["onnxruntime"].compile(model, "cpu", threads)
    outputs = executable.run(probe)
    executable.close()
    return outputs


def _difference(outputs: Tensors, reference: Tensors) -> float:
    worst = 0.0
    for name, expected in reference.items():
        a, b = outputs[name].astype(np.float64), expected.astype(np.float64)
        if a.shape != b.shape:
            return float("inf")
        norm = float(np.linalg.norm(b))
        distance = float(np.linalg.norm(a - b))
        worst = max(worst, distance / norm if norm else distance) if np.isfinite(distance) else float("inf")
    return worst


def _measure(contenders: list[_Contender], probe: Tensors) -> None:
    start = time.monotonic()
    for round_ in range(ROUNDS):
        for contender in contenders:
            begin = time.perf_counter()
            contender.executable.run(probe)
            contender.times.append(1e3 * (time.perf_counter() - begin))
        if len(contenders) == 1 or (round_ >= 1 and time.monotonic() - start > BUDGET_SECONDS):
            return


def _plan(model: Model, ranked: list[_Contender], lost: list[Candidate], threads: int) -> Plan:
    best = ranked[0]
    fastest = statistics.median(best.times)
    measured = []
    for contender in ranked:
        median = statistics.median(contender.times)
        spread = float(np.subtract(*np.percentile(contender.times, (75, 25))))
        reason = "" if contender is best else f"{median / fastest:.2f} times as slow"
        measured.append(
            Candidate(contender.backend, contender.device, contender.version, round(median, 3), round(spread, 3), contender.error, reason)
        )
    rest = [f"{c.backend} on {c.device} {c.median_ms:.1f} ms" for c in measured[1:]]
    why = f"median {fastest:.1f} ms" + (f", against {', '.join(rest)}" if rest else ", the only backend that can run it here")
    return Plan(
        model.name,
        model.sha256,
        host().fingerprint,
        best.backend,
        best.device,
        best.executable.precision,
        "float32",
        threads,
        why,
        (*measured, *lost),
    )
