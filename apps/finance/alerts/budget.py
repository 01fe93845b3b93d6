"""The alert budget: the analyst sets alerts a day, the threshold follows.

An alert is a card on a day, as in card precision@k. The threshold is the score that, over the same remaining
part of the last days, as many cards exceeded as alerts are left today. So a day with many high scores raises
it, a quiet one lowers it, and the number of alerts ends near the budget whatever the day brings.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable
from itertools import count

import numpy as np
from numpy.typing import NDArray

from apps.finance.features.schema import DAY, SECOND

ALERT, PASS, ATTACHED, KNOWN = "alert", "pass", "attached", "known"
"""Decisions: a new alert; no alert; the card has an alert today already; the card is known as compromised."""
DEFAULT_BUDGET = 100
HISTORY_DAYS = 7
KEPT, KEPT_AT_LEAST = 10, 20_000
"""Of a past day the highest scores are kept, this many times the budget."""
REFRESH = 600 * SECOND
FIRST_THRESHOLD = 0.5
LEARN_TRANSACTIONS = 300
"""Before past days hold this many the threshold follows from the day's own scores, once there are this many."""
COMPROMISED_DAYS = 30
SPARE = 0.05
"""The last alerts of a day need a score that would do on a whole day; else they stay unspent."""


def _exceeded_by(scores: NDArray[np.float64], number: int) -> float:
    """The score that `number` of `scores` reach."""
    return float(np.partition(scores, -number)[-number]) if len(scores) > number else 0.0


def _best(scores: NDArray[np.float64], cards: NDArray[np.int64]) -> NDArray[np.float64]:
    """The highest score of each card; `scores` in descending order."""
    return scores[np.unique(cards, return_index=True)[1]]


class _Day:
    """One day's scores: time of day [us], score and card of each transaction, and who was alerted."""

    def __init__(self) -> None:
        self.times, self.scores, self.cards = array("q"), array("d"), array("q")
        self.alerted: set[Hashable] = set()

    def trim(self, number: int) -> None:
        """Keep the `number` highest scores, in descending order; who was alerted stays."""
        kept = np.argsort(-np.array(self.scores), kind="stable")[:number]
        for name in ("times", "scores", "cards"):
            values = getattr(self, name)
            setattr(self, name, array(values.typecode, np.array(values)[kept].tobytes()))

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        return np.array(self.times), np.array(self.scores), np.array(self.cards)


class AlertBudget:
    """Turns scores into decisions so that about `budget` cards a day become alerts."""

    def __init__(self, budget: int = DEFAULT_BUDGET) -> None:
        self.budget = budget
        self._days: OrderedDict[int, _Day] = OrderedDict()
        self._past: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]] = []
        self._past_of, self._whole_day = -1, 0.0
        self._today = -1
        self._threshold, self._valid_until = FIRST_THRESHOLD, -1
        self._codes: dict[Hashable, int] = {}
        self._next_code = count()
        self._compromised: dict[Hashable, int] = {}

    def decide(self, time: int, customer: Hashable, score: float) -> tuple[str, float]:
        """The decision on a transaction at `time` [us], and the threshold that it was measured against."""
        day = self._day(time)
        known = self.compromised(customer, time)
        threshold = self.threshold(time)
        if known:
            return KNOWN, threshold
        self._note(day, time, customer, score)
        if customer in day.alerted:
            return (ATTACHED if score >= threshold else PASS), threshold
        if score < threshold:
            return PASS, threshold
        day.alerted.add(customer)
        self._valid_until = -1
        return ALERT, threshold

    def restore(self, time: int, customer: Hashable, score: float, decision: str) -> None:
        """Take in a decision that was made before."""
        day = self._day(time)
        if decision != KNOWN:
            self._note(day, time, customer, score)
        if decision == ALERT:
            day.alerted.add(customer)

    def change(self, budget: int) -> None:
        """Set another budget; today's remaining alerts follow from it at once."""
        if budget != self.budget:
            self.budget, self._valid_until, self._past_of = budget, -1, -1

    def mark_compromised(self, customer: Hashable, time: int) -> None:
        """A label or a verdict at `time` [us] says that the card is compromised: it takes no alerts for a month."""
        self._compromised[customer] = max(time, self._compromised.get(customer, time))

    def compromised(self, customer: Hashable, time: int) -> bool:
        """Whether the card is known as compromised at `time` [us]."""
        since = self._compromised.get(customer)
        return since is not None and since <= time < since + COMPROMISED_DAYS * DAY

    def alerts(self, time: int) -> int:
        """Alerts so far on the day of `time` [us]."""
        day = self._days.get(time // DAY)
        return len(day.alerted) if day else 0

    def threshold(self, time: int) -> float:
        """The threshold at `time` [us]; it is found again every few minutes of event time and after every alert."""
        today = time // DAY
        if today == self._today and time < self._valid_until:
            return self._threshold
        self._today, self._valid_until = today, time + REFRESH
        left = self.budget - self.alerts(time)
        if left <= 0:
            self._threshold = float("inf")
        else:
            past = self._history(today)
            self._threshold = self._from_past(past, time % DAY, left) if past else self._from_today(time)
        return self._threshold

    def _from_past(self, past: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]], of_day: int, left: int) -> float:
        alerted = self._days[self._today].alerted if self._today in self._days else set()
        codes = np.array([self._codes[c] for c in alerted if c in self._codes], np.int64)
        best = []
        for times, scores, cards in past:
            rest = (times >= of_day) & ~np.isin(cards, codes)
            best.append(_best(scores[rest], cards[rest]))
        threshold = _exceeded_by(np.concatenate(best), left * len(past))
        if left <= SPARE * self.budget:
            threshold = max(threshold, self._whole_day)
        return threshold

    def _from_today(self, time: int) -> float:
        """Before there is a past day: the share of today's scores that the budget allows, spread over the day."""
        day = self._days.get(self._today)
        if day is None or len(day.scores) < LEARN_TRANSACTIONS:
            return FIRST_THRESHOLD
        first = min(day.times)
        passed = max(time % DAY - first, REFRESH)
        rest = len(day.scores) * (DAY - time % DAY) / passed
        share = min(1.0, (self.budget - len(day.alerted)) / max(rest, 1.0))
        return float(np.quantile(day.scores, 1 - share))

    def _day(self, time: int) -> _Day:
        number = time // DAY
        day = self._days.get(number)
        if day is None:
            day = self._days[number] = _Day()
            for old in [n for n in self._days if n < number - HISTORY_DAYS - 1]:
                del self._days[old]
            for past in (n for n in self._days if n < number):
                self._days[past].trim(self._kept())
            if len(self._codes) > 100_000:
                self._recode()
        return day

    def _kept(self) -> int:
        return max(KEPT * self.budget, KEPT_AT_LEAST)

    def _recode(self) -> None:
        """Forget the codes of cards that no kept day holds."""
        held = {code for day in self._days.values() for code in day.cards}
        self._codes = {card: code for card, code in self._codes.items() if code in held}

    def _note(self, day: _Day, time: int, customer: Hashable, score: float) -> None:
        code = self._codes.get(customer)
        if code is None:
            code = self._codes[customer] = next(self._next_code)
        day.times.append(time % DAY)
        day.scores.append(score)
        day.cards.append(code)

    def _history(self, today: int) -> list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]]:
        """The last days' highest scores; found once a day."""
        if self._past_of != today:
            self._past_of, self._past = today, []
            for number in sorted(n for n in self._days if today - HISTORY_DAYS <= n < today):
                self._days[number].trim(self._kept())
                self._past.append(self._days[number].arrays())
            if sum(len(scores) for _, scores, _ in self._past) < LEARN_TRANSACTIONS:
                self._past = []
            self._whole_day = (
                _exceeded_by(np.concatenate([_best(scores, cards) for _, scores, cards in self._past]), self.budget * len(self._past))
                if self._past
                else 0.0
            )
        return self._past
