"""Apache Kafka behind the same contract, through kafka-python."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka import errors as kafka_errors
from kafka.admin import NewTopic
from kafka.structs import OffsetAndMetadata

from pipelines.errors import ConsumerFencedError, LogUnavailableError, PermanentError, PipelineError, UnknownTopicError
from pipelines.transport.base import Outgoing, Record

logger = logging.getLogger(__name__)
REQUEST_MS = 30_000
DELIVERY: dict[str, Any] = {"acks": "all", "retry_backoff_ms": 20, "batch_size": 128 * 1024, "delivery_timeout_ms": REQUEST_MS}
"""A record that is not acknowledged within REQUEST_MS is given up by the client, too: it does not come later, beside a second one."""
PATIENCE: dict[str, Any] = {"reconnect_backoff_max_ms": 1000}
"""A broker that comes back is found within a second (kafka-python's own: up to 30)."""
LONGEST_MS = 3_600_000
"""A record may be handled for so long: a member that does not poll within it loses its partitions, and the record comes again elsewhere
(kafka-python's own: five minutes for all that one poll gave). A process that has ended is missed after ten seconds."""
FENCED = (kafka_errors.CommitFailedError, kafka_errors.IllegalGenerationError, kafka_errors.UnknownMemberIdError)
REFUSED = (kafka_errors.AuthorizationError, kafka_errors.SaslAuthenticationFailedError, kafka_errors.InvalidTopicError)


@contextmanager
def _answering(doing: str) -> Iterator[None]:
    """Raises LogUnavailableError where the brokers do not answer, PipelineError for what they refuse."""
    try:
        yield
    except kafka_errors.KafkaError as error:
        if error.retriable:
            raise LogUnavailableError(f"the brokers do not answer ({doing}): {error!r}") from error
        raise PipelineError(f"the brokers refuse ({doing}): {error!r}") from error


def _listens(server: str) -> bool:
    host, _, port = server.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), 2):
            return True
    except (OSError, ValueError):
        return False


def _closed(client: Any, **options: Any) -> None:
    """Close a client of brokers that may be gone."""
    try:
        client.close(**options)
    except kafka_errors.KafkaError as error:
        logger.debug("closing a client: %r", error)


class KafkaLog:
    """A log on the brokers at `servers` ("HOST:PORT"). Appends are idempotent and acknowledged by all replicas.

    `options`: kafka-python's for TLS and SASL, as `access_of` gives them.
    """

    def __init__(self, servers: Sequence[str], options: Mapping[str, Any] | None = None) -> None:
        self._servers = list(servers)
        self._access = {"bootstrap_servers": self._servers, **(options or {}), **PATIENCE}
        self._lock = threading.Lock()
        self._producer: KafkaProducer | None = None
        self._partitions: dict[str, int] = {}
        try:
            self._admin = KafkaAdminClient(request_timeout_ms=REQUEST_MS, **self._access)
        except kafka_errors.KafkaError as error:
            where = ", ".join(self._servers)
            if any(_listens(server) for server in self._servers):
                raise LogUnavailableError(
                    f"something listens at {where} and takes no client: {error!r}; check the address's user, password, security, mechanism"
                    " and certificates"
                ) from error
            raise LogUnavailableError(f"no Kafka broker answers at {where}: {error!r}; start it or correct the address") from error

    def create_topic(self, name: str, partitions: int) -> None:
        if name in self.topics():
            return
        with _answering(f"topic {name!r}"):
            try:
                self._admin.create_topics([NewTopic(name, num_partitions=partitions, replication_factor=-1)])
            except kafka_errors.TopicAlreadyExistsError:
                return
        deadline = time.monotonic() + 15
        while name not in self.topics():
            if time.monotonic() > deadline:
                raise LogUnavailableError(f"topic {name!r} was created and did not appear within 15 s; check the brokers")
            time.sleep(0.05)

    def topics(self) -> Mapping[str, int]:
        with _answering("topics"):
            described = self._admin.describe_topics()
        return {item["name"]: len(item["partitions"]) for item in described if not item["name"].startswith("__") and item["partitions"]}

    def produce(self, topic: str, value: bytes, *, key: str | None = None, headers: Mapping[str, bytes] | None = None) -> tuple[int, int]:
        sent = self._acknowledged(topic, [Outgoing(value, key, dict(headers or {}))])
        return sent.partition, sent.offset

    def produce_many(self, topic: str, records: Sequence[Outgoing]) -> None:
        if records:
            self._acknowledged(topic, records)
        else:
            self._known(topic)

    def _acknowledged(self, topic: str, records: Sequence[Outgoing]) -> Any:
        """Send, and wait until the brokers have stored all; where the last record stands."""
        self._known(topic)
        producer = self._sender()
        try:
            sent = [
                producer.send(topic, value=bytes(r.value), key=None if r.key is None else r.key.encode(), headers=list(r.headers.items()))
                for r in records
            ]
            return [future.get(timeout=REQUEST_MS / 1e3 + 5) for future in sent][-1]
        except kafka_errors.KafkaError as error:
            raise self._failed(topic, error, producer) from error

    def _sender(self) -> KafkaProducer:
        with self._lock:
            if self._producer is None:
                with _answering("producer"):
                    self._producer = KafkaProducer(request_timeout_ms=REQUEST_MS // 3, **DELIVERY, **self._access)
            return self._producer

    def _failed(self, topic: str, error: kafka_errors.KafkaError, producer: KafkaProducer) -> PipelineError:
        """What a record that was not stored is told by."""
        if isinstance(error, kafka_errors.MessageSizeTooLargeError):
            return PermanentError(f"a record for {topic!r} is larger than the brokers or the client take: {error!r}")
        if isinstance(error, REFUSED):
            return PipelineError(f"the brokers refuse a record for {topic!r}: {error!r}")
        with self._lock:  # its sequence numbers may be out of step by now: the next record gets a new one
            if self._producer is producer:
                self._producer = None
        _closed(producer, timeout=0)
        return LogUnavailableError(f"a record for {topic!r} was not acknowledged: {error!r}; send it again")

    def consumer(self, group: str, topics: Sequence[str]) -> KafkaGroupConsumer:
        for topic in topics:
            self._known(topic)
        with _answering("consumer"):
            client = self._consumer(group, topics)
        return KafkaGroupConsumer(client, group)

    def _consumer(self, group: str, topics: Sequence[str]) -> Any:
        return KafkaConsumer(
            *topics,
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            session_timeout_ms=10_000,
            heartbeat_interval_ms=2_000,
            max_poll_interval_ms=LONGEST_MS,
            **self._access,
        )

    def lag(self, group: str, topic: str) -> Mapping[int, int]:
        with _answering("lag"):
            client = KafkaConsumer(group_id=group, enable_auto_commit=False, **self._access)
            try:
                parts = [TopicPartition(topic, p) for p in range(self._known(topic))]
                ends = client.end_offsets(parts)
                return {part.partition: ends[part] - (client.committed(part) or 0) for part in parts}
            finally:
                _closed(client)

    def close(self) -> None:
        if self._producer is not None:
            _closed(self._producer, timeout=5)
        _closed(self._admin)

    def _known(self, topic: str) -> int:
        """Partitions of `topic`; asked once, since a topic that was there stays."""
        if topic in self._partitions:
            return self._partitions[topic]
        topics = self.topics()
        self._partitions |= topics
        if topic not in topics:
            known = ", ".join(sorted(topics)) or "none"
            raise UnknownTopicError(
                f"no topic {topic!r} on {', '.join(self._servers)}; known: {known}; run 'triscope pipeline topics --apply'"
            )
        return topics[topic]


class KafkaGroupConsumer:
    """One member of a Kafka consumer group."""

    def __init__(self, client: Any, group: str) -> None:
        self._client, self._group = client, group
        self._handed: dict[TopicPartition, int] = {}
        self._done: dict[TopicPartition, int] = {}
        """The offsets after the last record that was handed out, and after the last that was committed."""

    def poll(self, timeout: float = 1.0, max_records: int = 100) -> list[Record]:
        with _answering("poll"):
            batches = self._client.poll(timeout_ms=int(timeout * 1e3), max_records=max_records)
            self._handed |= {part: batch[-1].offset + 1 for part, batch in batches.items() if batch}
            if not batches:
                self._commit_markers()
        return [
            Record(
                item.topic,
                item.partition,
                item.offset,
                None if item.key is None else item.key.decode("utf-8", "replace"),
                item.value or b"",
                {name: bytes(value or b"") for name, value in item.headers or ()},
                item.timestamp / 1e3,
            )
            for batch in batches.values()
            for item in batch
        ]

    def _commit_markers(self) -> None:
        """Commit what is no record: a producer's transactions leave markers, and what they took back, behind the last record, which would
        count as waiting for ever."""
        owned = self._client.assignment()
        for known in (self._handed, self._done):
            for part in known.keys() - owned:
                del known[part]
        for part in owned:
            if part not in self._done:
                self._done[part] = self._client.committed(part) or 0
            position = self._client.position(part)
            if position > self._done[part] >= self._handed.get(part, 0):
                with suppress(*FENCED):
                    self._client.commit({part: OffsetAndMetadata(position, "", -1)})
                    self._done[part] = position

    def commit(self, record: Record) -> None:
        part = TopicPartition(record.topic, record.partition)
        with _answering("commit"):
            try:
                self._client.commit({part: OffsetAndMetadata(record.offset + 1, "", -1)})
                self._done[part] = record.offset + 1
            except FENCED as error:
                raise ConsumerFencedError(
                    f"{record.topic}-{record.partition} belongs to another member of {self._group!r}; its records come again there"
                ) from error

    def seek(self, topic: str, partition: int, offset: int) -> None:
        part = TopicPartition(topic, partition)
        if part not in self._client.assignment():
            raise ConsumerFencedError(f"{topic}-{partition} is not owned by this member of {self._group!r}; poll until it is")
        self._client.seek(part, offset)
        self._handed[part] = offset

    def behind(self) -> Mapping[tuple[str, int], int]:
        parts = list(self._client.assignment())
        with _answering("ends of partitions"):
            ends = self._client.end_offsets(parts) if parts else {}
            return {(part.topic, part.partition): ends[part] - self._client.position(part) for part in parts}

    def assignment(self) -> Sequence[tuple[str, int]]:
        return sorted((part.topic, part.partition) for part in self._client.assignment())

    def close(self) -> None:
        _closed(self._client)
