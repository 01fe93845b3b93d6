"""The deciding engine: keyed state, both models and the alert budget, one batch of transactions at a time.

It knows neither the log nor the database: what it decides is a function of the transactions, labels and
verdicts that it was given, in order.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apps.finance.alerts.budget import AlertBudget
from apps.finance.features.schema import DAY, FEATURES, INDEX
from apps.finance.features.sequence import LENGTH, SequenceState
from apps.finance.features.state import FeatureState, transaction_key
from apps.finance.messages import Reason
from apps.finance.scoring.scorer import FraudScorer, Scores

RATIO = INDEX["AMOUNT_TO_MEDIAN"]
FORGET_EVERY = 200_000
CLOCK_WINDOW, CLOCK_MINIMUM = 65, 9


@dataclass(frozen=True)
class Event:
    """A checked transaction. `time_us`: event time [us]; `fraud`: its label, where that is known already."""

    transaction_id: str
    time_us: int
    customer_id: str
    terminal_id: str
    amount_minor: int
    fraud: bool = False


@dataclass(frozen=True)
class Decided:
    """What the engine says of one transaction."""

    features: NDArray[np.float64]
    score: float
    scores: dict[str, float]
    decision: str
    threshold: float
    reasons: list[Reason]
    attention: list[float]


class Clock:
    """Where the stream stands in event time: the median of the last transactions, so that no single one moves it.

    A few must have been seen before it says anything.
    """

    def __init__(self) -> None:
        self._last: deque[int] = deque(maxlen=CLOCK_WINDOW)

    def see(self, time_us: int) -> None:
        """Take in one event time."""
        self._last.append(time_us)

    @property
    def now(self) -> int | None:
        """Event time [us], or None before enough transactions."""
        return sorted(self._last)[len(self._last) // 2] if len(self._last) >= CLOCK_MINIMUM else None


class Engine:
    """Decides on transactions in the order of their arrival. One thread at a time.

    Whoever accepts a transaction shows its time to the `clock`.
    """

    def __init__(self, scorer: FraudScorer, budget: int) -> None:
        self.scorer = scorer
        self.budget = AlertBudget(budget)
        self.clock = Clock()
        self.seconds = dict.fromkeys(("features", "models", "reasons", "budget"), 0.0)
        self._features, self._sequences = FeatureState(), SequenceState()
        self._since_forget = 0
        self._lock = threading.Lock()

    def decide(self, events: Sequence[Event]) -> list[Decided]:
        """Decisions on `events`, which become part of the state."""
        if not events:
            return []
        with self._lock:
            start = time.perf_counter()
            features, sequences, mask = self._observe(events)
            narrow = features.astype(np.float32)
            observed = time.perf_counter()
            scores = self.scorer.score(narrow, sequences, mask)
            scored = time.perf_counter()
            reasons = self.scorer.reasons(narrow, features)
            explained = time.perf_counter()
            decided = [self._conclude(event, features[i], scores, i, reasons[i]) for i, event in enumerate(events)]
            ends = (start, observed, scored, explained, time.perf_counter())
            for stage, begun, ended in zip(self.seconds, ends, ends[1:], strict=False):
                self.seconds[stage] += ended - begun
            return decided

    def _observe(self, events: Sequence[Event]) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]]:
        features = np.empty((len(events), len(FEATURES)))
        sequences = np.empty((len(events), LENGTH, len(FEATURES)), np.float32)
        mask = np.empty((len(events), LENGTH), np.float32)
        for i, e in enumerate(events):
            key = transaction_key(e.transaction_id)
            features[i] = self._features.observe(e.time_us, e.customer_id, e.terminal_id, e.amount_minor, key, e.fraud)
            sequences[i], mask[i] = self._sequences.sequence(e.customer_id, e.time_us, features[i].astype(np.float32))
        self._features.clock = self.clock.now
        self._tidy(len(events))
        return features, sequences, mask

    def _tidy(self, number: int) -> None:
        self._since_forget += number
        if self._since_forget >= FORGET_EVERY and self.clock.now is not None:
            self._since_forget = 0
            self._features.forget(self.clock.now - 7 * DAY)
            self._sequences.forget(self.clock.now - 7 * DAY)

    def _conclude(self, event: Event, features: NDArray[np.float64], scores: Scores, row: int, reasons: list[Reason]) -> Decided:
        score = float(scores.probability[row])
        decision, threshold = self.budget.decide(event.time_us, event.customer_id, score)
        each = {"boosting": round(float(scores.boosting[row]), 6), "sequence": round(float(scores.sequence[row]), 6)}
        attention = [round(float(share), 3) for share in scores.attention[row]]
        return Decided(features, score, each, decision, threshold, reasons, attention)

    def restore(self, event: Event, features: NDArray[np.float64] | None, score: float, decision: str) -> None:
        """Take in a transaction that was decided before, in the order of event time.

        `features`: None where they are of another version; they are then computed again.
        """
        with self._lock:
            self.clock.see(event.time_us)
            key = transaction_key(event.transaction_id)
            arguments = (event.time_us, event.customer_id, event.terminal_id, event.amount_minor, key)
            if features is None:
                features = np.array(self._features.observe(*arguments, event.fraud))
            else:
                self._features.restore(*arguments, ratio=float(features[RATIO]), fraud=event.fraud)
            self._sequences.sequence(event.customer_id, event.time_us, features.astype(np.float32))
            self.budget.restore(event.time_us, event.customer_id, score, decision)

    def label(self, transaction_id: str, time_us: int, customer_id: str, terminal_id: str, fraud: bool, known_us: int) -> None:
        """A label for a transaction at `time_us` that became known at `known_us` [us]."""
        with self._lock:
            self._features.label(time_us, terminal_id, transaction_key(transaction_id), fraud)
            if fraud:
                self.budget.mark_compromised(customer_id, known_us)
