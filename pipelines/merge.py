"""Reads the partitions of a topic in the order of event time, as far as the log holds them.

A consumer hands out partitions in pieces, so one may run days ahead of another when a backlog is read. Here
the record with the earliest time comes next, and a partition that has more in the log is waited for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from pipelines.transport.base import Consumer, Record

Partition = tuple[str, int]


class EventTimeMerge:
    """Wraps `consumer`. `time_of`: event time of a record; one that has none may answer with minus infinity.

    `limit`: so many records of one partition are held at most; what comes beyond is read again later.
    """

    def __init__(self, consumer: Consumer, time_of: Callable[[Record], float], limit: int = 20_000) -> None:
        self._consumer, self._time_of, self._limit = consumer, time_of, limit
        self._held: dict[Partition, deque[tuple[float, Record]]] = {}

    def poll(self, timeout: float, max_records: int) -> list[Record]:
        """Up to `max_records`, earliest first; empty where nothing came within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            waiting = any(self._held.values())
            self._take(self._consumer.poll(0.0 if waiting else max(0.0, deadline - time.monotonic()), max(max_records, 256)))
            if self._complete() or time.monotonic() >= deadline + 5:
                return self._earliest(max_records)

    def _take(self, records: list[Record]) -> None:
        owned = set(self._consumer.assignment())
        self._held = {part: held for part, held in self._held.items() if part in owned}
        for record in records:
            self._held.setdefault((record.topic, record.partition), deque()).append((self._time_of(record), record))
        for part, held in self._held.items():
            if len(held) > self._limit:
                while len(held) > self._limit:
                    held.pop()
                self._consumer.seek(*part, held[-1][1].offset + 1)

    def _complete(self) -> bool:
        """Whether no partition can still hand out something earlier than what is held."""
        if all(self._held.get(part) for part in self._consumer.assignment()):
            return True
        return not any(number for part, number in self._consumer.behind().items() if not self._held.get(part))

    def _earliest(self, number: int) -> list[Record]:
        found: list[Record] = []
        while len(found) < number:
            ready = [(held[0][0], part) for part, held in self._held.items() if held]
            if not ready:
                break
            _, part = min(ready)
            found.append(self._held[part].popleft()[1])
            if not self._held[part] and self._consumer.behind().get(part):
                break  # its next record may be earlier than the others' next ones
        return found
