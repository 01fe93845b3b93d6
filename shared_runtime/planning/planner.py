"""The planner: what can run the model here is timed side by side, and the fastest is kept for each number of rows.

Candidates are backend x variant x mode x threads. A cost model gives up those that can't win; the rest run in
turn, round by round, so that a busy moment of the machine falls on all of them. A float32 candidate whose outputs
differ from the reference (ONNX Runtime on the CPU) loses, however fast; another precision takes part only as a
variant with a valid certificate; either has to compute the same at every number of rows that is measured. The plan
is cached under the model's hash and the host's fingerprint; the same graph with other weights (a network that was
trained on, a recipe that was taught again) takes it over, once its outputs are checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from bisect import bisect
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import msgspec
import onnx

from shared_runtime.backends.base import Executable, backends, fewest_rows, nodes_by_device, prepare_any, specialise
from shared_runtime.errors import NOT_JSON, BackendUnavailableError, ModelIntegrityError, UnsupportedModelError
from shared_runtime.graph.check import precision as graph_precision
from shared_runtime.graph.check import structure_hash
from shared_runtime.graph.cost import GraphCost, graph_cost
from shared_runtime.graph.rounding import movement
from shared_runtime.host import host
from shared_runtime.model import Model
from shared_runtime.numeric import difference, disagreeing
from shared_runtime.planning.apart import plan_apart
from shared_runtime.planning.contenders import (
    SPIN_REST,
    TOLERANCE,
    Contender,
    alone_in_a_stream,
    astray,
    backend_of,
    find_contenders,
    reference,
)
from shared_runtime.planning.measure import Timed, interleave
from shared_runtime.planning.objective import LATENCY, Objective
from shared_runtime.planning.plan import Candidate, Plan, Rung
from shared_runtime.planning.rested import with_spinning
from shared_runtime.signature import Tensors
from shared_runtime.variants import FLOAT

logger = logging.getLogger(__name__)
BUDGET_SECONDS = 6.0
LADDER = (1, 8, 32)
TAKEN_OVER = "as measured for"
HAIR = 1.03
"""A second engine is not kept for a gain below this."""
WORTH = 1.05
"""Reduced precision is not chosen for a gain below this."""


class Ladder:
    """The executables of a plan: each request goes to the one that was fastest for about as many rows."""

    def __init__(self, rungs: Sequence[tuple[int, Executable]]) -> None:
        executables = [executable for _, executable in rungs]
        self._bounds = [(low * high) ** 0.5 for (low, _), (high, _) in pairwise(rungs)]
        self._runs = [executable.run for executable in executables]
        self._executables = executables
        self.device, self.precision = rungs[0][1].device, rungs[0][1].precision
        same = all(executable is rungs[0][1] for _, executable in rungs)
        self.run = rungs[0][1].run if same else self._dispatch

    def _dispatch(self, inputs: Tensors) -> Tensors:
        shape = next(iter(inputs.values())).shape
        return self._runs[bisect(self._bounds, shape[0] if shape else 1)](inputs)

    def close(self) -> None:
        for executable in {id(e): e for e in self._executables}.values():
            executable.close()


def plan_and_compile(
    model: Model,
    device: str,
    threads: int,
    cache: Path | None,
    *,
    objective: Objective = LATENCY,
    ladder: Sequence[int] = LADDER,
    budget_s: float = BUDGET_SECONDS,
    thorough: bool = False,
    variant: str | None = None,
    probe: Tensors | None = None,
    apart: bool = True,
) -> tuple[Plan, Ladder]:
    """The plan for `model` on `device` ("auto", "cpu" or "cuda") and the executables it names.

    `variant`: only this one ("float32" is the reference itself); without, every certified variant takes part.
    `thorough`: also the ways that are slow to prepare (torch.compile). `probe`: inputs of one row to measure on.
    `apart`: where memory is the objective, plan in a process of its own.
    Raises BackendUnavailableError where no backend can serve the device: it names what each one lacks.
    """
    key = _key(model, device, threads, objective, tuple(ladder), thorough, variant)
    file = None if cache is None else cache / f"{model.sha256[:16]}-{key}.json"
    if file is not None and (plan := _cached(file, model)) is not None:
        return plan, _compile(model, plan, probe)
    structure = "" if file is None else _structure(model, probe)
    if file is not None and objective.kind != "memory" and (plan := _of_same_graph(file, structure)) is not None:
        adopted = msgspec.structs.replace(plan, model=model.name, sha256=model.sha256, why=_taken_over(plan))
        if (made := _checked(model, adopted, threads, probe)) is not None:
            _keep(adopted, file)
            return adopted, made
    if objective.kind == "memory" and apart:
        asked = {"objective": objective, "ladder": ladder, "budget_s": budget_s, "thorough": thorough, "variant": variant, "probe": probe}
        plan = plan_apart(model, device, threads, asked)
        _keep(plan, file)
        return plan, _compile(model, plan, probe)
    hold = objective.kind != "memory"
    given = probe is not None
    probe = _one_row(model, probe)
    if model.signature.fixed_rows is not None:
        ladder = (model.signature.fixed_rows,)
    cost = _cost(model, probe)
    contenders, lost = find_contenders(model, device, threads, probe, cost, thorough, variant, max(ladder), hold)
    if hold and contenders:
        contenders, lost = _measure(model, contenders, lost, probe, ladder, budget_s)
    if not contenders:
        reasons = "; ".join(f"{c.label}: {c.lost}" for c in lost) or "no backend knows this device"
        way = "" if given else "; should random numbers be no valid inputs of it, give the session some as probe={'input_name': array}"
        raise BackendUnavailableError(f"no backend can run {model.name!r} on device {device!r}: {reasons}{way}")
    if objective.kind == "latency":
        contenders, lost = with_spinning(model, contenders, lost, probe, min(ladder))
    elif not hold:
        for contender in contenders:
            contender.timed[min(ladder)] = Timed(lambda: None, [contender.first])
    plan, winners = _select(model, contenders, lost, objective, probe, cost)
    plan = msgspec.structs.replace(plan, structure=structure)
    _keep(plan, file)
    ready = [(rung.rows, c.executable) for rung, c in zip(plan.ladder, winners, strict=True) if c.executable is not None]
    whole = len(ready) == len(winners)  # one that was let go may win after all, where the others slowed down
    for contender in contenders:
        if not whole or contender not in winners:
            contender.let_go()
    if not whole:
        return plan, _compile(model, plan, probe)
    for _, executable in ready:
        prepare_any(executable)
    return plan, Ladder(ready)


def _keep(plan: Plan, file: Path | None) -> None:
    """Write a plan; where that can't be (a full disk, a home that is read alone) it serves all the same, and is made again next time."""
    if file is None:
        return
    part = file.with_suffix(f".{time.monotonic_ns()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=2))
        part.replace(file)
    except OSError as error:
        logger.warning("the plan of %s can't be kept in %s (%s): the next session measures again", plan.model, file.parent, error.strerror)
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _key(
    model: Model, device: str, threads: int, objective: Objective, ladder: tuple[int, ...], thorough: bool, variant: str | None
) -> str:
    """What a cached plan depends on besides the float graph: host, engines, certified variants, and what was asked for."""
    versions = [f"{name}{backend.availability(d).version}" for name, backend in backends().items() for d in backend.planned]
    certified = [f"{name}{model.certificate(name).created}" for name in model.variants]
    asked = [device, str(threads), repr(objective), repr(ladder), str(thorough), str(variant), *versions, *certified]
    return f"{host().fingerprint}-{hashlib.sha256(chr(0).join(asked).encode()).hexdigest()[:12]}"


def _cached(file: Path, model: Model) -> Plan | None:
    try:
        plan = msgspec.json.decode(file.read_bytes(), type=Plan)
    except (OSError, *NOT_JSON):
        return None
    named = [plan.candidates[rung.candidate] for rung in plan.ladder]
    known = all(c.backend in backends() and (c.variant == FLOAT or c.variant in model.variants) for c in named)
    return plan if plan.sha256 == model.sha256 and known and named else None


def _one_row(model: Model, probe: Tensors | None) -> Tensors:
    return model.probe() if probe is None else model.signature.row(probe, 0)


def _structure(model: Model, probe: Tensors | None) -> str:
    """The graph without its weights, and the sizes that it is measured on."""
    shapes = [f"{name}{value.shape}" for name, value in sorted(_one_row(model, probe).items())]
    return hashlib.sha256("".join([structure_hash(model.graph), *shapes]).encode()).hexdigest()


def _of_same_graph(file: Path, structure: str) -> Plan | None:
    """A plan that was measured for a graph which differs from that of `file` in its weights alone, in float32."""
    key = file.stem.split("-", 1)[1]
    for other in sorted(file.parent.glob(f"*-{key}.json")):
        try:
            plan = msgspec.json.decode(other.read_bytes(), type=Plan)
        except (OSError, *NOT_JSON):
            continue
        chosen = [plan.candidates[rung.candidate] for rung in plan.ladder]
        if plan.structure == structure and chosen and all(c.backend in backends() and c.variant == FLOAT for c in chosen):
            return plan
    return None


def _taken_over(plan: Plan) -> str:
    """Why a plan is another model's."""
    return plan.why if plan.why.startswith(TAKEN_OVER) else f"{TAKEN_OVER} {plan.model}, the same graph with other weights: {plan.why}"


def _checked(model: Model, plan: Plan, threads: int, probe: Tensors | None) -> Ladder | None:
    """The executables of a plan that was measured with other weights, or None where one does not compute what the reference does."""
    one = _one_row(model, probe)
    try:
        made = _compile(model, plan, probe)
        for rung in plan.ladder:
            inputs = model.signature.repeated(one, rung.rows)
            outputs, wanted = made.run(inputs), reference(model, threads, inputs)
            if disagreeing(outputs, wanted, TOLERANCE, partial(movement, model.graph, inputs)):
                made.close()
                raise UnsupportedModelError(f"its outputs differ from the reference by {difference(outputs, wanted):.1e}")
    except (UnsupportedModelError, BackendUnavailableError, ModelIntegrityError) as error:
        logger.warning("%s is planned anew, as it can't be run like %s: %s", model.name, plan.model, error)
        return None
    return made


def _compile(model: Model, plan: Plan, probe: Tensors | None) -> Ladder:
    """The executables of a cached plan, without measuring."""
    made: dict[int, Executable] = {}
    one = _one_row(model, probe)
    for rung in plan.ladder:
        c = plan.candidates[rung.candidate]
        if rung.candidate not in made:
            variant = None if c.variant == FLOAT else model.variant(c.variant)
            made[rung.candidate] = backends()[c.backend].compile(model, c.device, c.threads, variant, c.mode)
        specialise(made[rung.candidate], model.signature.repeated(one, rung.rows))
    for executable in made.values() if plan.objective != "memory" else ():
        prepare_any(executable)
    return Ladder([(rung.rows, made[rung.candidate]) for rung in plan.ladder])


def _cost(model: Model, probe: Tensors) -> GraphCost:
    try:
        return graph_cost(model.graph, probe)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        logger.info("no cost model for %s, so every candidate is measured: %s", model.name, error)
        return GraphCost((), ())


def _measure(
    model: Model, contenders: list[Contender], lost: list[Candidate], probe: Tensors, ladder: Sequence[int], budget: float
) -> tuple[list[Contender], list[Candidate]]:
    """Time the contenders at every rung that the budget allows: who is left, and who lost. Those far behind at a rung are left out of
    it; those that compute something else on so many rows are out of the plan."""
    alone = len(contenders) == 1
    fastest = min(contender.first for contender in contenders)
    for rows in sorted(set(ladder)):
        if rows > min(ladder) and (alone or fastest * rows > budget / 3):
            break
        inputs = model.signature.repeated(probe, rows)
        racing, wrong = [], {}
        for contender in contenders:
            before = contender.timed.get(min(ladder))
            if rows > min(ladder) and fewest_rows(backend_of(contender)) == 1 and before is not None and before.median > 4 * fastest:
                continue
            if contender.executable is None:
                if rows == min(ladder):
                    contender.timed[rows] = Timed(lambda: None, [contender.first])
                continue
            try:
                specialise(contender.executable, inputs)
                outputs = contender.executable.run(inputs)
            except UnsupportedModelError as error:
                if rows == min(ladder):
                    raise
                logger.info("%s is not measured on %d rows: %s", contender.candidate.label, rows, error)
                continue
            if (far := astray(model, contender, inputs, outputs)) is not None:
                wrong[contender] = msgspec.structs.replace(contender.candidate, lost=f"{rows} rows differ from the reference by {far:.1e}")
                contender.let_go()
                continue
            rest = SPIN_REST if contender.candidate.mode == "spinning" else 0.0
            contender.timed[rows] = Timed(partial(contender.executable.run, inputs), rest=rest)
            racing.append(contender.timed[rows])
        contenders, lost = [contender for contender in contenders if contender not in wrong], [*lost, *wrong.values()]
        if racing:
            interleave(racing, budget / (2 if rows == min(ladder) else 4))
    return contenders, lost


def _select(
    model: Model,
    contenders: Sequence[Contender],
    lost: Sequence[Candidate],
    objective: Objective,
    probe: Tensors,
    cost: GraphCost,
) -> tuple[Plan, list[Contender]]:
    """The plan, and who won at each of its rungs."""
    scores = objective.scores(model, [(c.candidate, c.executable, c.timed) for c in contenders], probe)
    order = sorted(range(len(contenders)), key=lambda i: scores[i].value)
    rungs = sorted({rows for c in contenders for rows in c.timed})
    best = _fastest(contenders, rungs, cost) if objective.kind == "latency" else dict.fromkeys(rungs, order[0])
    order = [best[rungs[0]], *(i for i in order if i != best[rungs[0]])]
    top = contenders[best[rungs[0]]]
    measured = []
    for place in order:
        contender = contenders[place]
        wins = [rows for rows in rungs if best[rows] == place]
        timings = contender.timings()
        measured.append(
            msgspec.structs.replace(
                contender.candidate,
                median_ms=timings[0].median_ms if timings else None,
                spread_ms=timings[0].spread_ms if timings else None,
                timings=timings,
                memory_mib=scores[place].memory_mib,
                joules=scores[place].joules,
                lost="" if wins else scores[place].why or _behind(contender, top, rungs[0], cost),
            )
        )
    ladder = tuple(Rung(rows, order.index(best[rows])) for rows in rungs)
    first = measured[0]
    rest = [f"{c.label} {c.median_ms:.3g} ms" for c in measured[1:4] if c.median_ms is not None]
    why = f"median {first.median_ms:.3g} ms" + (f", against {', '.join(rest)}" if rest else ", the only backend that can run it here")
    others = [f"{r.rows} rows: {measured[r.candidate].label}" for r in ladder[1:] if r.candidate != ladder[0].candidate]
    why += "".join(f"; from {text}" for text in others)
    plan = Plan(
        model.name,
        model.sha256,
        host().fingerprint,
        first.backend,
        first.device,
        first.precision if first.precision != FLOAT else graph_precision(model.graph),
        first.variant,
        first.threads,
        why,
        (*measured, *lost),
        ladder,
        objective.kind,
        {} if top.executable is None else nodes_by_device(top.executable, probe),
    )
    return plan, [contenders[order[rung.candidate]] for rung in ladder]


def _behind(contender: Contender, top: Contender, rows: int, cost: GraphCost) -> str:
    """Why another one is kept for so many rows."""
    slower = contender.timed[rows].median / top.timed[rows].median
    if slower < 1 and alone_in_a_stream(contender.candidate, cost, rows):
        return f"one row would have one thread of {contender.candidate.threads}"
    return f"{slower:.2f} times as slow"


def _fastest(contenders: Sequence[Contender], rungs: Sequence[int], cost: GraphCost) -> dict[int, int]:
    """The fastest contender at each rung; that of the rung before stays where it is within a hair, and reduced precision
    has to earn its place over float32."""
    best: dict[int, int] = {}
    for before, rows in zip([None, *rungs], rungs, strict=False):
        timed = {i: c.timed[rows].median for i, c in enumerate(contenders) if rows in c.timed}
        weighed = {i: time * (1.0 if contenders[i].candidate.precision == FLOAT else WORTH) for i, time in timed.items()}
        fit = {i: time for i, time in weighed.items() if not alone_in_a_stream(contenders[i].candidate, cost, rows)}
        first = min(fit or weighed, key=weighed.__getitem__)
        kept = best.get(before) if before is not None else None
        best[rows] = kept if kept in weighed and weighed[kept] <= HAIR * weighed[first] else first
    return best
