"""A log in memory, for tests and experiments: the same contract, gone with the process."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Mapping, Sequence

from pipelines.errors import ConsumerFencedError, UnknownTopicError
from pipelines.transport.base import Outgoing, Record

Partition = tuple[str, int]


class MemoryLog:
    """Lists under one lock."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._records: dict[Partition, list[Record]] = {}
        self._topics: dict[str, int] = {}
        self._committed: dict[tuple[str, Partition], int] = {}
        self._members: dict[str, list[MemoryConsumer]] = {}

    def create_topic(self, name: str, partitions: int) -> None:
        with self._changed:
            self._topics.setdefault(name, partitions)

    def topics(self) -> Mapping[str, int]:
        return dict(self._topics)

    def produce(self, topic: str, value: bytes, *, key: str | None = None, headers: Mapping[str, bytes] | None = None) -> tuple[int, int]:
        with self._changed:
            count = self._known(topic)
            spread = sum(len(self._records.get((topic, p), ())) for p in range(count))
            partition = (zlib.crc32(key.encode()) if key is not None else spread) % count
            records = self._records.setdefault((topic, partition), [])
            records.append(Record(topic, partition, len(records), key, bytes(value), dict(headers or {}), time.time()))
            self._changed.notify_all()
            return partition, len(records) - 1

    def produce_many(self, topic: str, records: Sequence[Outgoing]) -> None:
        for record in records:
            self.produce(topic, record.value, key=record.key, headers=record.headers)

    def consumer(self, group: str, topics: Sequence[str]) -> MemoryConsumer:
        with self._changed:
            for topic in topics:
                self._known(topic)
            member = MemoryConsumer(self, group, tuple(topics))
            self._members.setdefault(group, []).append(member)
            return member

    def lag(self, group: str, topic: str) -> Mapping[int, int]:
        with self._changed:
            return {
                p: len(self._records.get((topic, p), ())) - self._committed.get((group, (topic, p)), 0) for p in range(self._known(topic))
            }

    def close(self) -> None:
        return None

    def _known(self, topic: str) -> int:
        if topic not in self._topics:
            raise UnknownTopicError(f"no topic {topic!r} in this log; known: {sorted(self._topics)}; create it first")
        return self._topics[topic]

    def owned(self, member: MemoryConsumer) -> list[Partition]:
        """The partitions of `member`: dealt out over the group's members in turn."""
        members = [m for m in self._members.get(member.group, []) if set(m.topics) & set(member.topics)]
        if member not in members:
            return []
        every = sorted((t, p) for t in member.topics for p in range(self._topics[t]))
        return [part for index, part in enumerate(every) if members[index % len(members)] is member]


class MemoryConsumer:
    """One member of a group of a MemoryLog."""

    def __init__(self, log: MemoryLog, group: str, topics: tuple[str, ...]) -> None:
        self._log, self.group, self.topics = log, group, topics
        self._position: dict[Partition, int] = {}

    def poll(self, timeout: float = 1.0, max_records: int = 100) -> list[Record]:
        deadline = time.monotonic() + timeout
        with self._log._changed:
            while True:
                found = self._take(max_records)
                left = deadline - time.monotonic()
                if found or left <= 0:
                    return found
                self._log._changed.wait(left)

    def _take(self, limit: int) -> list[Record]:
        owned = self._log.owned(self)
        self._position = {part: at for part, at in self._position.items() if part in owned}
        found: list[Record] = []
        for parts, part in zip(range(len(owned), 0, -1), owned, strict=True):
            at = self._at(part)
            records = self._log._records.get(part, [])[at : at + max(1, (limit - len(found)) // parts)]
            self._position[part] = at + len(records)
            found += records
            if len(found) >= limit:
                break
        return found

    def _at(self, part: Partition) -> int:
        return self._position.get(part, self._log._committed.get((self.group, part), 0))

    def commit(self, record: Record) -> None:
        part = (record.topic, record.partition)
        with self._log._changed:
            if part not in self._log.owned(self):
                raise ConsumerFencedError(f"{part} belongs to another member of {self.group!r}; its records come again there")
            self._log._committed[(self.group, part)] = record.offset + 1

    def seek(self, topic: str, partition: int, offset: int) -> None:
        with self._log._changed:
            if (topic, partition) not in self._log.owned(self):
                raise ConsumerFencedError(f"{topic}-{partition} is not owned by this member of {self.group!r}")
            self._position[(topic, partition)] = offset

    def behind(self) -> Mapping[Partition, int]:
        with self._log._changed:
            return {part: len(self._log._records.get(part, ())) - self._at(part) for part in self._log.owned(self)}

    def assignment(self) -> Sequence[Partition]:
        with self._log._changed:
            return self._log.owned(self)

    def close(self) -> None:
        with self._log._changed:
            members = self._log._members.get(self.group, [])
            if self in members:
                members.remove(self)
            self._log._changed.notify_all()
