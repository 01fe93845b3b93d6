"""Who takes part in a plan: backend x variant x mode x threads, each made ready and checked against the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import numpy as np

from shared_runtime.backends.base import Executable, HardwareBackend, backends, fewest_rows, one_thread, specialise
from shared_runtime.errors import BackendUnavailableError, ModelIntegrityError, UnsupportedModelError
from shared_runtime.graph.cost import GraphCost
from shared_runtime.graph.rounding import movement
from shared_runtime.model import Model
from shared_runtime.numeric import difference, difference_of_floats, disagreeing, strays
from shared_runtime.planning.ceiling import lower_bound_ms
from shared_runtime.planning.measure import Timed
from shared_runtime.planning.plan import Candidate, Timing
from shared_runtime.signature import Tensors
from shared_runtime.variants import FLOAT, Variant

TOLERANCE = 1e-3
"""Largest allowed norm of the difference from the reference, over the norm of the reference."""
LONG_SECONDS = 0.3
"""From this long a run on, one run tells who is far behind."""
TOO_LONG = {
    "streams": (0.2, "one row takes so long that several are not measured"),
    "spinning": (2e-3, "one row takes so long that threads need not spin until the next"),
}
"""Modes that are not tried where a row takes longer than so many seconds, and why."""
TOGETHER = ("streams", "spinning")
"""Modes of several threads."""
SPIN_REST = 0.05
"""How long threads that spin are waited for before another way is timed."""
SHARED = 5e7
"""Operations above which one thread can't beat several."""
LARGE = 1e9
"""Operations above which it can't even where layers are small and many, as in a DenseNet: what is measured otherwise is chance."""


@dataclass(eq=False)
class Contender:
    """One way that runs: its engine (None once it is let go), the seconds of its first run, its times by number of rows, and what
    it gave for the probe."""

    candidate: Candidate
    executable: Executable | None
    first: float
    outputs: Tensors = field(default_factory=dict)
    timed: dict[int, Timed] = field(default_factory=dict)

    def let_go(self) -> None:
        """Free the engine of one that can't win: with large models they may not all fit in memory."""
        if self.executable is not None:
            self.executable.close()
            self.executable, self.outputs = None, {}

    def timings(self) -> tuple[Timing, ...]:
        """As a plan states them."""
        return tuple(
            Timing(rows, round(1e3 * t.median, 4), round(1e3 * t.spread, 4), round(1e3 * t.quantile(0.99), 4))
            for rows, t in sorted(self.timed.items())
        )


def _ways(
    model: Model, device: str, threads: int, thorough: bool, only: str | None, convolutions: bool, most_rows: int, hold: bool
) -> Iterator[tuple[HardwareBackend, str, str, int, Variant | None]]:
    """Every backend, device, mode, number of threads and variant to try; the reference engine first."""
    named = sorted(backends().values(), key=lambda b: b.name != "onnxruntime")
    variants: list[Variant | None] = [None] if only in (None, FLOAT) else []
    variants += [model.variant(name) for name in model.variants if only in (None, name)]
    if only is not None and not variants:
        variants = [model.variant(only)]
    reduced = {variant.facts.device for variant in variants if variant is not None}
    for backend in named:
        for kind in backend.devices:
            if device not in ("auto", kind) or (kind not in backend.planned and not thorough):
                continue
            modes = backend.modes(kind) if backend.availability(kind).available else ("",)
            for variant in variants:
                if variant is not None and (variant.facts.engine, variant.facts.device) != (backend.name, kind):
                    continue
                for mode in modes:
                    if "compiled" in mode and (not thorough or (variant is None and kind in reduced)):
                        continue  # a certified reduced form is compiled in its stead
                    if "channels-last" in mode and not convolutions:
                        continue
                    if mode == "lean" and hold:
                        continue  # it saves memory and no time
                    if (mode in TOGETHER and threads == 1) or (mode == "streams" and most_rows < 2) or (mode == "spinning" and not hold):
                        continue
                    counts = (1,) if one_thread(backend) else (threads, 1) if kind == "cpu" else (threads,)
                    for count in dict.fromkeys(counts if mode not in TOGETHER else (threads,)):
                        yield backend, kind, mode, count, variant


def find_contenders(
    model: Model, device: str, threads: int, probe: Tensors, cost: GraphCost, thorough: bool, only: str | None, most_rows: int, hold: bool
) -> tuple[list[Contender], list[Candidate]]:
    """Those that run and compute what the reference does, and the others with the reason. Those far behind are let go at once;
    without `hold` all are, so that only one is in memory at a time. Raises UnsupportedModelError where the model draws random numbers."""
    convolutions = not cost.nodes or any(node.kind in ("Conv", "ConvTranspose") for node in cost.nodes)
    wanted: Tensors | None = None
    contenders: list[Contender] = []
    lost: list[Candidate] = []
    for backend, kind, mode, count, variant in _ways(model, device, threads, thorough, only, convolutions, most_rows, hold):
        precision = FLOAT if variant is None else variant.facts.precision
        name = FLOAT if variant is None else variant.name
        state = backend.availability(kind)
        candidate = Candidate(backend.name, kind, state.version or "", variant=name, precision=precision, mode=mode, threads=count)
        why = f"lacks {state.lacks}" if state.lacks is not None else _hopeless(candidate, cost, threads, contenders)
        if most_rows < fewest_rows(backend):
            why = why or f"for bulk rows: no rung has {fewest_rows(backend)} rows"
        longest, reason = TOO_LONG.get(mode, (float("inf"), ""))
        if min((c.first for c in contenders), default=0.0) > longest:
            why = why or reason
        if why:
            lost.append(msgspec.structs.replace(candidate, lost=why))
            continue
        executable = None
        try:
            executable = backend.compile(model, kind, count, variant, mode)
            specialise(executable, probe)
            earlier = executable.run(probe)
            begin = time.perf_counter()
            outputs = executable.run(probe)
            first = time.perf_counter() - begin
            if mode == "spinning":
                time.sleep(SPIN_REST)
        except (UnsupportedModelError, BackendUnavailableError, ModelIntegrityError) as failure:
            if executable is not None:
                executable.close()
            lost.append(msgspec.structs.replace(candidate, lost=" ".join(str(failure).split())))
            continue
        if wanted is None:
            if (far := difference(outputs, earlier)) > TOLERANCE:
                executable.close()
                raise UnsupportedModelError(
                    f"{model.name!r} gives other outputs for the same inputs each time (by {far:.1e}): it draws random numbers within, so "
                    "no two ways to run it can be compared; export it in evaluation mode, or with the numbers as an input"
                )
            plain = backend.name == "onnxruntime" and kind == "cpu" and variant is None
            wanted = outputs if plain else reference(model, threads, probe)
        error = difference(outputs, wanted)
        if variant is None:
            wrong = disagreeing(outputs, wanted, TOLERANCE, partial(movement, model.graph, probe)) is not None
        else:
            wrong = _wrong(variant, partial(backend.compile, model, kind, count, variant, mode), probe, outputs, wanted)
        if wrong:
            executable.close()
            lost.append(msgspec.structs.replace(candidate, error=error, lost=f"outputs differ from the reference by {error:.1e}"))
            continue
        contenders.append(Contender(msgspec.structs.replace(candidate, error=error), executable, first, outputs))
        if not hold:
            contenders[-1].let_go()
        _let_go_hopeless(contenders)
    lost += [
        Candidate(v.facts.engine, v.facts.device, variant=v.name, precision=v.facts.precision, threads=threads, lost=v.why_void)
        for v in model.known.values()
        if v.why_void
    ]
    return contenders, lost


def _wrong(variant: Variant, compiled: Callable[[], Executable], probe: Tensors, outputs: Tensors, wanted: Tensors) -> bool:
    """Whether a variant that was prepared for the probe's sizes is further from the reference than its certificate says, and than it
    is where it does not know them: on other inputs than the certificate's it may be less near."""
    certified = variant.certificate.probe_error if variant.certificate is not None else None
    if not np.isfinite(difference(outputs, wanted)):
        return True
    if strays(outputs, wanted, certified or 0.0) is None:
        return False
    plain = compiled()
    try:
        return strays(outputs, wanted, difference_of_floats(plain.run(probe), wanted)) is not None
    except UnsupportedModelError:
        return True
    finally:
        plain.close()


def astray(model: Model, contender: Contender, inputs: Tensors, outputs: Tensors) -> float | None:
    """How far outputs for the probe's row, many times over, are from the reference, where that is more than on the row alone; None
    where it is not. The reference itself runs on so many rows only where they do not simply repeat what the contender gave for one."""
    candidate, rows = contender.candidate, model.signature.rows(inputs)
    alone = {name: np.repeat(value, rows, axis=0) if value.shape[:1] == (1,) else value for name, value in contender.outputs.items()}
    if candidate.variant != FLOAT:
        own = candidate.error or 0.0
        return None if strays(outputs, alone, own) is None else strays(outputs, reference(model, candidate.threads, inputs), own)
    if difference(outputs, alone) <= TOLERANCE:
        return None
    wanted = reference(model, candidate.threads, inputs)
    far = disagreeing(outputs, wanted, TOLERANCE, partial(movement, model.graph, inputs))
    return None if far is None else difference(outputs, wanted)


def _let_go_hopeless(contenders: Sequence[Contender]) -> None:
    fastest = min(contender.first for contender in contenders)
    for contender in contenders:
        if contender.first > 2e-3 and contender.first > far_behind(fastest) * fastest and fewest_rows(backend_of(contender)) == 1:
            contender.let_go()


def far_behind(fastest: float) -> float:
    """How many times as slow in its first run a contender is left out of the race: a long run tells more."""
    return 4.0 if fastest < LONG_SECONDS else 1.5


def backend_of(contender: Contender) -> HardwareBackend:
    """Its engine's plug-in."""
    return backends()[contender.candidate.backend]


def _hopeless(candidate: Candidate, cost: GraphCost, threads: int, contenders: Sequence[Contender]) -> str:
    """Why the cost model gives a candidate up, or ""."""
    if candidate.device != "cpu" or not cost.nodes:
        return ""
    if candidate.threads < threads and cost.operations > SHARED:
        return f"{cost.operations / 1e9:.2f} G operations are not for one thread of {threads}"
    bound = lower_bound_ms(cost, candidate.precision, candidate.threads) if cost.operations > SHARED else 0.0
    best = min((c.first for c in contenders), default=float("inf"))
    return f"at least {bound:.1f} ms by the cost model, and another takes {1e3 * best:.1f} ms" if bound > 1e3 * best else ""


def alone_in_a_stream(candidate: Candidate, cost: GraphCost, rows: int) -> bool:
    """Whether one row that is work for several threads would have one: that is fastest only by chance, while others keep a core busy."""
    return candidate.mode == "streams" and rows == 1 and cost.operations > LARGE


def reference(model: Model, threads: int, inputs: Tensors) -> Tensors:
    """What ONNX Runtime on the CPU computes in float32."""
    executable = backends()["onnxruntime"].compile(model, "cpu", threads)
    outputs = executable.run(inputs)
    executable.close()
    return outputs
