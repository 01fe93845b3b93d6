"""The contract of a log: an append-only, partitioned record store with consumer groups, as Kafka has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec


class Record(msgspec.Struct, frozen=True):
    """One record of a log. `timestamp` is the time of its append [s since the epoch]."""

    topic: str
    partition: int
    offset: int
    key: str | None
    value: bytes
    headers: dict[str, bytes]
    timestamp: float


class Outgoing(msgspec.Struct, frozen=True):
    """A record to append."""

    value: bytes
    key: str | None = None
    headers: dict[str, bytes] = {}


class Consumer(Protocol):
    """A member of a consumer group. Use it from one thread."""

    def poll(self, timeout: float = 1.0, max_records: int = 100) -> list[Record]:
        """The next records of the partitions that this member owns; empty after `timeout` seconds."""
        ...

    def commit(self, record: Record) -> None:
        """Mark everything up to and including `record` in its partition as done.

        Raises ConsumerFencedError where another member owns the partition now.
        """
        ...

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """Read on from `offset` in a partition that this member owns."""
        ...

    def behind(self) -> Mapping[tuple[str, int], int]:
        """Records that this member has not read yet, by the partition that it owns."""
        ...

    def assignment(self) -> Sequence[tuple[str, int]]:
        """The partitions that this member owns, sorted."""
        ...

    def close(self) -> None:
        """Leave the group; others take over at once."""
        ...


class Log(Protocol):
    """A log. Threads may share it; every process opens its own."""

    def create_topic(self, name: str, partitions: int) -> None:
        """Make a topic; one that exists stays as it is."""
        ...

    def topics(self) -> Mapping[str, int]:
        """Partitions by topic name."""
        ...

    def produce(self, topic: str, value: bytes, *, key: str | None = None, headers: Mapping[str, bytes] | None = None) -> tuple[int, int]:
        """Append one record: (partition, offset). On return it is stored; equal keys share a partition.

        Raises UnknownTopicError.
        """
        ...

    def produce_many(self, topic: str, records: Sequence[Outgoing]) -> None:
        """Append records, in order within each partition. On return all are stored.

        Raises UnknownTopicError. Where it fails midway some may be stored: send all again and let readers drop what they know.
        """
        ...

    def consumer(self, group: str, topics: Sequence[str]) -> Consumer:
        """Join `group`. A partition without a committed offset is read from its start.

        Raises UnknownTopicError.
        """
        ...

    def lag(self, group: str, topic: str) -> Mapping[int, int]:
        """Records not yet committed by `group`, by partition."""
        ...

    def close(self) -> None:
        """Release the connection."""
        ...
