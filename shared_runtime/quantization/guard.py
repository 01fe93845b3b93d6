"""The guarded search: reduce everything, measure, and put layers back to float until the metric holds and nothing is slower.

The idea of ranking layers by the harm that they do is NNCF's accuracy control; added here are slices, intervals,
the same guard over speed, and a bisection that puts back as few layers as it can.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shared_runtime.backends.base import Executable
from shared_runtime.certificate import Reversion
from shared_runtime.errors import MetricError
from shared_runtime.planning.measure import Timed, interleave
from shared_runtime.quantization.forms import BETWEEN, Form, PackingForm
from shared_runtime.quantization.judge import Judge, Verdict
from shared_runtime.signature import Tensors

logger = logging.getLogger(__name__)
RANKING_ITEMS = 8
NEGLIGIBLE = 0.02
"""Share of the loss below which a group of layers is not told apart."""
LONG_SECONDS, TOO_SLOW = 0.5, 0.7
"""Where one run takes this long, a form in INT8 that is below this share of float's speed is not searched for one that passes."""
SLOWER, NOTICEABLE = 1.15, 0.02
SHOWS = 0.1
"""Share of the drop allowed from which the drop on the items that suffer most takes part in the ranking."""
PACKINGS = 6
"""How often storing weights of layers in float in INT8 is tried."""
Report = Callable[[str], None]


@dataclass(frozen=True)
class Guarded:
    """What the search found: the form, its last verdict, the layers put back and why, and how much faster than float it is here.

    `packed`: layers put back whose weights are stored in INT8 all the same.
    """

    form: Form
    verdict: Verdict
    reverted: tuple[Reversion, ...]
    speedup: float | None
    packed: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the form may be certified."""
        return not self.verdict.why

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers in float."""
        return frozenset(item.layer for item in self.reverted)


class Guard:
    """Searches one form. `reference` is the float model in the same engine, `budget_s` the time for ranking and measuring."""

    def __init__(
        self, form: Form, judge: Judge, reference: Executable, threads: int, budget_s: float, report: Report | None = None
    ) -> None:
        self._form, self._judge, self._reference, self._threads = form, judge, reference, threads
        self._end = time.monotonic() + budget_s
        self._verdict: Verdict | None = None
        self._outputs: list[Tensors] = []
        self._seconds = 0.0
        self._report = report or (lambda text: logger.info("%s", text))

    def first(self) -> Verdict:
        """The verdict on the form with every layer reduced."""
        begin = time.monotonic()
        verdict, self._outputs = self._measure(frozenset())
        self._seconds = (time.monotonic() - begin) / len(self._outputs)
        self._verdict = verdict
        self._tell(0, verdict)
        return verdict

    def search(self, hint: tuple[Reversion, ...] = ()) -> Guarded:
        """The form with as few layers in float as pass, or the verdict that it does not pass.

        `hint`: layers that had to go back in a form close to this one; tried before any ranking.
        """
        verdict = self._verdict or self.first()
        reverted: tuple[Reversion, ...] = ()
        if verdict.why and hint:
            verdict, _ = self._measure(frozenset(item.layer for item in hint))
            self._tell(len(hint), verdict)
            reverted = hint
        if verdict.why and self._form.layers:
            if (slow := self._too_slow()) is not None:
                why = f"{verdict.why}; at {slow:.2f} of float's speed here no layers were put back"
                return Guarded(self._form, replace(verdict, why=why), (), slow)
            verdict, reverted = self._revert_for_accuracy(verdict, self._outputs)
        if not verdict.why and reverted and not set(self._form.layers) - {item.layer for item in reverted} - {BETWEEN}:
            why = f"every layer had to go back to float to keep {self._judge.name} within {self._judge.max_drop:.4g}"
            verdict = replace(verdict, why=why)
        if verdict.why:
            return Guarded(self._form, verdict, reverted, None)
        speedup = self._speedup(frozenset(item.layer for item in reverted))
        return self._pack(self._revert_for_speed(Guarded(self._form, verdict, reverted, speedup)))

    def _measure(self, reverted: frozenset[str], form: Form | None = None) -> tuple[Verdict, list[Tensors]]:
        executable = (form or self._form).compile(reverted, self._threads)
        try:
            outputs = self._judge.run(executable)
        finally:
            executable.close()
        return self._judge.judge(outputs, brief=True), outputs

    def _tell(self, count: int, verdict: Verdict) -> None:
        state = verdict.why or f"{self._judge.name} {verdict.before:.4g} to {verdict.after:.4g}: passes"
        self._report(f"{self._form.facts.name}, {count} of {len(self._form.layers)} layers in float: {state}")

    def _revert_for_accuracy(self, verdict: Verdict, outputs: Sequence[Tensors]) -> tuple[Verdict, tuple[Reversion, ...]]:
        """Grow the set of the most harmful layers until it passes, then shrink it by bisection; measured anew each time."""
        harm = self._rank(outputs)
        order = sorted(self._form.layers, key=lambda layer: -harm.get(layer, 0.0))
        low, high, best = 0, 1, None
        while True:
            high = min(high, len(order))
            tried, _ = self._measure(frozenset(order[:high]))
            self._tell(high, tried)
            if not tried.why:
                best = tried
                break
            if high == len(order) or time.monotonic() > self._end:
                return tried, _reversions(order[:high], harm)
            low, high = high, 2 * high
        while high - low > 1 and time.monotonic() < self._end:
            middle = (low + high) // 2
            tried, _ = self._measure(frozenset(order[:middle]))
            self._tell(middle, tried)
            if tried.why:
                low = middle
            else:
                high, best = middle, tried
        return best, _reversions(order[:high], harm)

    def _rank(self, outputs: Sequence[Tensors]) -> dict[str, float]:
        """Harm of each layer: the share of the loss that there is when it alone is reduced, on the items that suffer most.

        Reduced alone, not put back alone: of two layers that spoil the same output neither shows while the other is there.
        Layers are measured in groups, and the group that does the most harm is quartered next, until the others do little or
        time is up; a layer has the mean of its group.
        """
        until = time.monotonic() + (self._end - time.monotonic()) / 2
        loss = _Loss(self._judge, outputs)
        floor = self._loss_with(frozenset(self._form.layers), loss)
        groups = [(float("inf"), tuple(sorted(self._form.layers, key=lambda layer: layer == BETWEEN)))]
        harm: dict[str, float] = {}
        measured = 1
        while groups and time.monotonic() < until:
            whole, group = groups.pop()
            if len(group) < 2 or whole < NEGLIGIBLE:
                continue
            for part in _parts(group):
                lost = self._loss_with(frozenset(self._form.layers) - set(part), loss) - floor
                harm |= dict.fromkeys(part, lost / len(part))
                groups.append((lost, part))
                measured += 1
            groups.sort(key=lambda each: each[0])
        self._report(f"{self._form.facts.name}: {len(self._form.layers)} layers ranked by {measured} measurements")
        return harm

    def _loss_with(self, reverted: frozenset[str], loss: _Loss) -> float:
        executable = self._form.compile(reverted, self._threads)
        try:
            return loss([executable.run(self._judge.samples[item]) for item in loss.items])
        finally:
            executable.close()

    def _too_slow(self) -> float | None:
        """The share of float's speed, everything reduced, where it is too little for a long search; None otherwise."""
        if self._form.facts.precision != "int8" or self._seconds < LONG_SECONDS:
            return None
        speed = self._speedup(frozenset())
        return speed if speed < TOO_SLOW else None

    def _speedup(self, reverted: frozenset[str], form: Form | None = None) -> float:
        executable = (form or self._form).compile(reverted, self._threads)
        inputs = self._judge.samples[0]
        try:
            executable.run(inputs), self._reference.run(inputs)
            mine, theirs = Timed(lambda: executable.run(inputs)), Timed(lambda: self._reference.run(inputs))
            interleave([mine, theirs], 2.0, hopeless=float("inf"))
        finally:
            executable.close()
        return theirs.median / mine.median

    def _revert_for_speed(self, found: Guarded) -> Guarded:
        """Put back layers whose INT8 form is slower here, where the whole is faster for it and still passes."""
        stored = self._form.stored if isinstance(self._form, PackingForm) else frozenset()
        reduced = [layer for layer in self._form.layers if layer not in stored]
        if not reduced or time.monotonic() > self._end:
            return found
        quick = self._form.layer_times(found.layers, self._threads)
        plain = self._form.layer_times(frozenset(self._form.layers), self._threads)
        total = sum(plain.values())
        slower = {
            layer: quick[layer] / plain[layer]
            for layer in reduced
            if layer in quick and plain.get(layer) and quick[layer] > SLOWER * plain[layer] and quick[layer] > NOTICEABLE * total
        }
        more = {layer: ratio for layer, ratio in slower.items() if layer not in found.layers}
        if not more or len(found.layers) + len(more) == len(self._form.layers):
            return found
        wider = found.layers | set(more)
        speedup = self._speedup(wider)
        if found.speedup is None or speedup <= 1.02 * found.speedup:
            return found
        verdict, _ = self._measure(wider)
        if verdict.why:
            return found
        self._report(f"{self._form.facts.name}: {len(more)} layers are slower here than in float and go back to it")
        return Guarded(self._form, verdict, (*found.reverted, *(Reversion(k, "speed", round(v, 3)) for k, v in more.items())), speedup)

    def _pack(self, found: Guarded) -> Guarded:
        """Store the weights of layers in float in INT8 as well: of as many as pass, those first that did the least harm."""
        by_harm = sorted(found.reverted, key=lambda item: (item.why == "accuracy", item.value))
        order = [item.layer for item in by_harm if item.layer != BETWEEN]
        if not isinstance(self._form, PackingForm):
            return found
        best, low, high, tried = found, 0, len(order) + 1, len(order)
        for _ in range(PACKINGS):
            if high - low <= 1:
                break
            form = self._form.packed(frozenset(order[:tried]))
            verdict, _ = self._measure(found.layers, form)
            self._report(f"{form.facts.name}, weights of {tried} of {len(order)} layers in float stored in INT8: {verdict.why or 'passes'}")
            if verdict.why:
                high = tried
            else:
                low, best = tried, replace(found, form=form, verdict=verdict, packed=tuple(order[:tried]))
            tried = (low + high) // 2
        if best is found or found.speedup is None:
            return found
        speedup = self._speedup(found.layers, best.form)
        return replace(best, speedup=speedup) if speedup > found.speedup / SLOWER else found


class _Loss:
    """What a form loses on the items that suffer most: the mean of the outputs' error and, where it shows on so few, of the
    metric's drop, each as a share of what it is with every layer reduced (`outputs`)."""

    def __init__(self, judge: Judge, outputs: Sequence[Tensors]) -> None:
        errors = [_error(mine, theirs) for mine, theirs in zip(outputs, judge.reference, strict=True)]
        self.items = [int(item) for item in np.argsort(errors)[::-1][:RANKING_ITEMS]]
        self._judge = judge
        self._reference = [judge.reference[item] for item in self.items]
        self._targets = [judge.targets[item] for item in self.items]
        self._before = self._score(self._reference)
        chosen = [outputs[item] for item in self.items]
        self._whole = self._error(chosen), self._drop(chosen)

    def __call__(self, outputs: Sequence[Tensors]) -> float:
        error, drop = self._whole
        shares = [self._error(outputs) / error] if error > 0 else []
        if drop > SHOWS * self._judge.max_drop:
            shares.append(self._drop(outputs) / drop)
        return float(np.mean(shares)) if shares else 0.0

    def _error(self, outputs: Sequence[Tensors]) -> float:
        return float(np.mean([_error(mine, theirs) for mine, theirs in zip(outputs, self._reference, strict=True)]))

    def _drop(self, outputs: Sequence[Tensors]) -> float:
        return self._before - self._score(outputs)

    def _score(self, outputs: Sequence[Tensors]) -> float:
        try:
            return self._judge.score(outputs, self._targets)
        except MetricError:
            return 0.0  # such as one of ranks, on items of one class


def _parts(group: tuple[str, ...]) -> list[tuple[str, ...]]:
    """A quarter each, one by one as soon as they are few; what lies between layers, the last of a group, is one of its own."""
    layers = group[:-1] if group[-1] == BETWEEN else group
    size = -(-len(layers) // 4)
    return [layers[place : place + size] for place in range(0, len(layers), size)] + [group[-1:]] * (layers != group)


def _reversions(layers: Sequence[str], harm: dict[str, float]) -> tuple[Reversion, ...]:
    return tuple(Reversion(layer, "accuracy", round(harm.get(layer, 0.0), 6)) for layer in layers)


def _error(outputs: Tensors, reference: Tensors) -> float:
    """Mean relative difference of the outputs; 1 where an output is not finite."""
    errors = []
    for name, expected in reference.items():
        a, b = outputs[name].astype(np.float64), expected.astype(np.float64)
        distance = np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12)
        errors.append(float(distance) if np.isfinite(distance) else 1.0)
    return float(np.mean(errors))
