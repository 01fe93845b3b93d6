"""The features as a stream: keyed state of customers and terminals, one transaction at a time.

Terminal features reach no younger than seven days, so transactions of different customers may arrive in any
order within that time; those of one customer arrive in order of event time, ties in order of arrival.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Hashable

from apps.finance.features.schema import (
    CUSTOMER,
    CUSTOMER_SPAN,
    DAY,
    FLOOR_MINOR,
    HIGH,
    HOUR,
    LABEL_DELAY,
    NEVER_DAYS,
    TERMINAL_SPAN,
    WINDOWS_DAYS,
)

TRIM = 8
EPOCH_WEEKDAY = 3  # 1970-01-01 was a Thursday
LATE = 7 * DAY
"""So late may a transaction come and still find what its windows need."""


GENUINE, ORDINARY_FRAUD, HIGH_FRAUD = 0, 1, 2
RATIO = CUSTOMER.index("AMOUNT_TO_MEDIAN")
NO_HISTORY = [0.0, 0.0, NEVER_DAYS, NEVER_DAYS, 0.0, NEVER_DAYS]


class _Customer:
    """Times [us] and amounts [minor units] of a customer's last transactions, in order."""

    __slots__ = ("amounts", "times")

    def __init__(self) -> None:
        self.times, self.amounts = array("q"), array("I")


class _Terminal:
    """Times [us] and marks of a terminal's last transactions, in order; bit i of `high`: whether the i-th is high."""

    __slots__ = ("high", "marks", "times")

    def __init__(self) -> None:
        self.times, self.marks, self.high = array("q"), bytearray(), 0


def transaction_key(transaction_id: str | int) -> int:
    """A 32-bit key that tells apart the transactions of one terminal at one instant; good within one process."""
    return hash(transaction_id) & 0xFFFF_FFFF


class FeatureState:
    """State of all customers and terminals."""

    def __init__(self) -> None:
        self._customers: dict[Hashable, _Customer] = {}
        self._terminals: dict[Hashable, _Terminal] = {}
        self._ties: dict[tuple[Hashable, int], list[int]] = {}
        """Keys of the transactions that a terminal saw at one instant, in order, but for the first of them."""
        self.clock: int | None = None
        """Where the stream stands [us]; nothing younger than its windows is dropped. None: at each transaction."""

    def observe(self, time: int, customer: Hashable, terminal: Hashable, amount: int, key: int, fraud: bool = False) -> list[float]:
        """The features of a transaction at `time` [us] over `amount` [minor units], in the schema's order; it is taken in.

        `key`: `transaction_key` of its identifier. `fraud`: its label, where that is known already.
        """
        night = 1.0 if time // HOUR % 24 <= 6 else 0.0
        weekend = 1.0 if (time // DAY + EPOCH_WEEKDAY) % 7 >= 5 else 0.0
        counts, habits = self._of_customer(time, customer, amount)
        risks, history = self._of_terminal(time, terminal)
        self._add_customer(time, customer, amount)
        self._add_terminal(time, terminal, key, habits[RATIO] > HIGH, fraud)
        return [amount / 100, weekend, night, *counts, *risks, *habits, *history]

    def restore(self, time: int, customer: Hashable, terminal: Hashable, amount: int, key: int, *, ratio: float, fraud: bool) -> None:
        """Take in a transaction that was observed before; `ratio` is the AMOUNT_TO_MEDIAN that it had."""
        self._add_customer(time, customer, amount)
        self._add_terminal(time, terminal, key, ratio > HIGH, fraud)

    def _horizon(self, time: int, span: int) -> int:
        return (time if self.clock is None else min(time, self.clock)) - span

    def _add_customer(self, time: int, customer: Hashable, amount: int) -> None:
        known = self._customers.get(customer)
        if known is None:
            known = self._customers[customer] = _Customer()
        at = bisect_right(known.times, time)
        known.times.insert(at, time)
        known.amounts.insert(at, amount)
        old = bisect_right(known.times, self._horizon(time, CUSTOMER_SPAN + LATE))
        if old > TRIM:
            del known.times[:old], known.amounts[:old]

    def _add_terminal(self, time: int, terminal: Hashable, key: int, high: bool, fraud: bool) -> None:
        known = self._terminals.get(terminal)
        if known is None:
            known = self._terminals[terminal] = _Terminal()
        at = bisect_right(known.times, time)
        if at and known.times[at - 1] == time:
            self._ties.setdefault((terminal, time), []).append(key)
        known.times.insert(at, time)
        known.high = known.high >> at << at + 1 | high << at | known.high & ~(-1 << at)
        known.marks.insert(at, (HIGH_FRAUD if high else ORDINARY_FRAUD) if fraud else GENUINE)
        old = bisect_right(known.times, self._horizon(time, TERMINAL_SPAN + LATE))
        if old > TRIM:
            del known.times[:old], known.marks[:old]
            known.high >>= old

    def label(self, time: int, terminal: Hashable, key: int, fraud: bool) -> bool:
        """Set the label of a transaction that was observed; False where the terminal does not hold it (any more)."""
        known = self._terminals.get(terminal)
        if known is None:
            return False
        at, end = bisect_left(known.times, time), bisect_right(known.times, time)
        if at == end:
            return False
        later = self._ties.get((terminal, time), ())
        at += later.index(key) + 1 if key in later else 0
        known.marks[at] = (HIGH_FRAUD if known.high >> at & 1 else ORDINARY_FRAUD) if fraud else GENUINE
        return True

    def forget(self, before: int) -> None:
        """Drop customers and terminals that no transaction at `before` [us] or later can ask for."""
        for customer in [k for k, v in self._customers.items() if v.times[-1] < before - CUSTOMER_SPAN]:
            del self._customers[customer]
        for terminal in [k for k, t in self._terminals.items() if t.times[-1] < before - TERMINAL_SPAN]:
            del self._terminals[terminal]
        for tie in [tie for tie in self._ties if tie[1] < before - TERMINAL_SPAN - LATE]:
            del self._ties[tie]

    def sizes(self) -> tuple[int, int]:
        """Customers and terminals that are held."""
        return len(self._customers), len(self._terminals)

    def _of_customer(self, time: int, customer: Hashable, amount: int) -> tuple[list[float], list[float]]:
        known = self._customers.get(customer) or _Customer()
        times, end = known.times, bisect_right(known.times, time)
        counts: list[float] = []
        amounts = known.amounts
        for days in WINDOWS_DAYS:
            start = bisect_right(times, time - days * DAY, 0, end)
            number = end - start + 1
            counts += (number, (sum(amounts[start:end]) + amount) / number / 100)
        start = end - (int(counts[-2]) - 1)
        if start == end:
            floor = max(amount, FLOOR_MINOR)
            return counts, [amount / floor, amount / floor, 0, 0, 0]
        ordered = sorted(amounts[start:end])
        last = len(ordered) - 1
        median, upper = ordered[last // 2], ordered[last * 3 // 4]
        floor = max(median, FLOOR_MINOR)
        largest = [max(amounts[bisect_right(times, time - days * DAY, start, end) : end], default=0) / floor for days in (1, 7, 14)]
        return counts, [amount / floor, amount / max(upper, FLOOR_MINOR), *largest]

    def _of_terminal(self, time: int, terminal: Hashable) -> tuple[list[float], list[float]]:
        known = self._terminals.get(terminal)
        if known is None:
            return [0.0] * 6, NO_HISTORY
        times, marks = known.times, known.marks
        end = bisect_right(times, time - LABEL_DELAY)
        risks: list[float] = []
        start = end
        for days in WINDOWS_DAYS:
            start = bisect_right(times, time - LABEL_DELAY - days * DAY, 0, end)
            number = end - start
            risks += (number, 1 - marks.count(GENUINE, start, end) / number if number else 0.0)
        if start == end:
            return risks, NO_HISTORY

        def days_since(at: int) -> float:
            return (time - times[at]) / DAY if at >= start else NEVER_DAYS

        genuine = marks.rfind(GENUINE, start, end)
        fraud = max(marks.rfind(ORDINARY_FRAUD, start, end), marks.rfind(HIGH_FRAUD, start, end))
        run = end - 1 - max(genuine, start - 1)
        return risks, [
            float(marks.count(ORDINARY_FRAUD, start, end)),
            float(marks.count(HIGH_FRAUD, start, end)),
            days_since(fraud),
            days_since(genuine),
            float(run),
            days_since(end - run) if run else NEVER_DAYS,
        ]
