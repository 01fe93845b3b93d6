"""The judge: does a variant still do the float model's job, overall and in every slice, and how sure is that."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared_runtime.backends.base import Executable
from shared_runtime.certificate import SliceScore
from shared_runtime.errors import CalibrationError, MetricError
from shared_runtime.quantization.metrics import UNLABELLED, Metric
from shared_runtime.quantization.samples import SampleStore
from shared_runtime.signature import Tensors

logger = logging.getLogger(__name__)
RESAMPLES, FEWEST_RESAMPLES, BOOTSTRAP_SECONDS = 200, 20, 10.0
FEWEST_TO_SWAP = 8
"""Items from which on it is looked whether a metric sees outputs at all."""


@dataclass(frozen=True)
class Verdict:
    """The metric before and after, the drop with its 95 % bootstrap interval, slices, and why it does not pass ("" where it does).

    A brief one has neither interval nor slices where the drop itself is too large.
    """

    before: float
    after: float
    interval: tuple[float, float]
    slices: dict[str, SliceScore]
    why: str

    @property
    def drop(self) -> float:
        """Before minus after, in the metric's unit."""
        return self.before - self.after


class Judge:
    """Measures variants against one float model on one validation set.

    A variant passes where the drop of the whole set is at most `max_drop`, and no slice's drop is above it with
    confidence (the lower end of the slice's interval). `slices` names the slice of each validation item. `certain`:
    the drop must be at most `max_drop` with confidence as well (the upper end of its interval).
    """

    def __init__(
        self,
        reference: Sequence[Tensors],
        samples: SampleStore,
        targets: Sequence[Any],
        metric: Metric,
        max_drop: float,
        slices: Sequence[str] | None = None,
        seed: int = 0,
        certain: bool = False,
    ) -> None:
        try:
            max_drop = float(max_drop)
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"max_drop is {max_drop!r}; expected a number of 0 or more, in the metric's unit") from error
        if not max_drop >= 0:
            raise CalibrationError(f"max_drop is {max_drop}; expected a number of 0 or more, in the metric's unit")
        if slices is not None and len(slices) != len(targets):
            raise CalibrationError(f"{len(slices)} slice names for {len(targets)} validation items; expected one an item")
        self.reference, self.samples, self.targets = reference, samples, targets
        self.metric, self.max_drop = metric, max_drop
        self._seed, self._certain = seed, certain
        begin = time.perf_counter()
        self.before = self.score(reference, targets)
        seconds = max(1e-6, time.perf_counter() - begin)
        if self.metric not in UNLABELLED:
            self._warn_where_blind()
        self._slices = dict(self._judged(slices))
        self._resamples = int(min(RESAMPLES, max(FEWEST_RESAMPLES, BOOTSTRAP_SECONDS / (2 * seconds))))

    def _warn_where_blind(self) -> None:
        """A metric that is as high with the outputs of other samples (labels that do not belong to them, one class) guards little."""
        others = [self.reference[place] for place in np.random.default_rng(self._seed).permutation(len(self.reference))]
        shapes = [{name: value.shape for name, value in outputs.items()} for outputs in others]
        if len(others) < FEWEST_TO_SWAP or any(shape != shapes[0] for shape in shapes):
            return
        try:
            swapped = float(self.metric(others, self.targets))
        except Exception:  # some metrics look at more than outputs and targets
            return
        if swapped >= self.before:
            logger.warning(
                "the metric %s is %.4g for the float model and %.4g with its outputs on other samples: it guards little; "
                "do the targets belong to the inputs, in the order of the model's classes?",
                *(self.name, self.before, swapped),
            )

    @property
    def name(self) -> str:
        """The metric's name."""
        return str(getattr(self.metric, "__name__", type(self.metric).__name__))

    def score(self, outputs: Sequence[Tensors], targets: Sequence[Any]) -> float:
        """The metric as a finite number. Raises MetricError."""
        try:
            value = float(self.metric(outputs, targets))
        except Exception as error:
            raise MetricError(
                f"the metric {self.name} failed on {len(outputs)} items: {type(error).__name__}: {error} "
                "(it is called with the list of all output dicts and the list of all targets)"
            ) from error
        if not np.isfinite(value):
            raise MetricError(f"the metric {self.name} gave {value} on {len(outputs)} items; expected a finite number, higher is better")
        return value

    def run(self, executable: Executable) -> list[Tensors]:
        """The outputs of an executable on every validation item."""
        return [executable.run(inputs) for inputs in self.samples]

    def judge(self, outputs: Sequence[Tensors], brief: bool = False) -> Verdict:
        """The verdict on these outputs. Outputs that are not finite where the float model's are never pass."""
        for mine, theirs in zip(outputs, self.reference, strict=True):
            for name, value in theirs.items():
                if value.dtype.kind == "f" and np.isfinite(value).all() and not np.isfinite(mine[name]).all():
                    return Verdict(self.before, float("-inf"), (float("inf"),) * 2, {}, f"output {name!r} is not finite")
        after = self.score(outputs, self.targets)
        why = ""
        if not self.before - after <= self.max_drop:
            why = f"{self.name} drops by {self.before - after:.4g} ({self.before:.4g} to {after:.4g}); allowed are {self.max_drop:.4g}"
            if brief:
                return Verdict(self.before, after, (self.before - after,) * 2, {}, why)
        interval = self._interval(outputs, np.arange(len(outputs)))
        slices = self._by_slice(outputs)
        if not why and self._certain and not interval[1] <= self.max_drop:
            drop = self.before - after
            why = f"{self.name} drops by {drop:.4g}, by up to {interval[1]:.4g} with 95 % confidence; allowed are {self.max_drop:.4g}"
        for name, part in slices.items():
            if not why and part.drop_interval[0] > self.max_drop:
                why = f"{self.name} drops by {part.before - part.after:.4g} in slice {name!r}; allowed are {self.max_drop:.4g}"
        return Verdict(self.before, after, interval, slices, why)

    def _by_slice(self, outputs: Sequence[Tensors]) -> dict[str, SliceScore]:
        found: dict[str, SliceScore] = {}
        for name, (places, before) in self._slices.items():
            try:
                found[name] = SliceScore(len(places), before, self._pick(outputs, places), self._interval(outputs, places))
            except MetricError:  # which the float model's outputs have a metric for
                found[name] = SliceScore(len(places), before, float("-inf"), (float("inf"),) * 2)
        return found

    def _judged(self, slices: Sequence[str] | None) -> Iterator[tuple[str, tuple[np.ndarray[Any, Any], float]]]:
        """The slices that the metric can be taken in, each with its items and the float model's metric: a slice of one class has
        no ranking metric. The others are warned of."""
        for name in sorted(set(slices or ())):
            places = np.array([i for i, other in enumerate(slices or ()) if other == name])
            try:
                yield name, (places, self._pick(self.reference, places))
            except MetricError as error:
                logger.warning("slice %r is not guarded: %s", name, error)

    def _pick(self, outputs: Sequence[Tensors], places: Sequence[int] | np.ndarray[Any, Any]) -> float:
        return self.score([outputs[i] for i in places], [self.targets[i] for i in places])

    def _interval(self, outputs: Sequence[Tensors], places: np.ndarray[Any, Any]) -> tuple[float, float]:
        generator = np.random.default_rng(self._seed)
        drops = []
        for _ in range(self._resamples):
            chosen = generator.choice(places, len(places))
            try:
                drops.append(self._pick(self.reference, chosen) - self._pick(outputs, chosen))
            except MetricError:
                continue  # a resample without one of the classes
        if not drops:
            point = self._pick(self.reference, places) - self._pick(outputs, places)
            return (point, point)
        low, high = np.percentile(drops, (2.5, 97.5))
        return float(low), float(high)


def slice_names(
    slices: Callable[[Tensors, Any], str] | Sequence[str] | None, samples: SampleStore, targets: Sequence[Any]
) -> list[str] | None:
    """The slice of each item: given, or by a function of (inputs, target). Raises CalibrationError where that fails."""
    if slices is None:
        return None
    if callable(slices):
        try:
            return [str(slices(inputs, target)) for inputs, target in zip(samples, targets, strict=True)]
        except Exception as error:
            raise CalibrationError(f"the function of slices failed on (inputs, target): {type(error).__name__}: {error}") from error
    return [str(name) for name in slices]
