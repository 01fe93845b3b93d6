"""A topic: its name, the versioned schema of its payload, its key and its partitions."""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

from pipelines.errors import NOT_JSON, SchemaError
from pipelines.messages import Envelope, Message
from pipelines.transport.base import Log, Outgoing, Record

DEAD_LETTER_SUFFIX = ".dlq"


@dataclass(frozen=True)
class Topic:
    """`schema` is the msgspec Struct of the payload, `key` the field that orders and partitions."""

    name: str
    schema: type[msgspec.Struct]
    key: str
    version: int = 1
    partitions: int = 4

    @property
    def type(self) -> str:
        """The CloudEvents type, as `medical.studies.v1`."""
        return f"{self.name}.v{self.version}"

    @property
    def dead_letters(self) -> str:
        """The topic that takes what could not be handled."""
        return self.name + DEAD_LETTER_SUFFIX

    def create(self, log: Log) -> None:
        """Make the topic and its dead letters where they are missing."""
        log.create_topic(self.name, self.partitions)
        log.create_topic(self.dead_letters, 1)

    def send(self, log: Log, payload: msgspec.Struct, source: str, traceparent: str = "") -> Envelope:
        """Produce one payload; on return the log has acknowledged it."""
        if not isinstance(payload, self.schema):
            raise SchemaError(f"topic {self.name!r} carries {self.schema.__name__}, got {type(payload).__name__}")
        envelope = Envelope(type=self.type, source=source, **({"traceparent": traceparent} if traceparent else {}))
        key = str(getattr(payload, self.key))
        log.produce(self.name, msgspec.json.encode(payload), key=key, headers=envelope.headers())
        return envelope

    def outgoing(self, payload: msgspec.Struct, source: str, traceparent: str = "", id: str = "") -> Outgoing:
        """One payload with its envelope as a record for `Log.produce_many`."""
        return self.stored(msgspec.json.encode(payload), str(getattr(payload, self.key)), source, traceparent, id)

    def stored(self, value: bytes, key: str, source: str, traceparent: str = "", id: str = "") -> Outgoing:
        """The same for a payload that is encoded already, as JSON of this topic's schema."""
        given = {name: text for name, text in (("traceparent", traceparent), ("id", id)) if text}
        return Outgoing(value, key, Envelope(type=self.type, source=source, **given).headers())

    def decode(self, record: Record) -> Message:
        """The record as a message. Raises SchemaError, naming the field that does not fit."""
        place = f"{record.topic}-{record.partition}-{record.offset}"
        envelope = Envelope.from_headers(record.headers, type=self.type, fallback_id=place)
        name, _, version = envelope.type.rpartition(".v")
        if name == self.name and re.fullmatch("[0-9]{1,9}", version) and int(version) > self.version:
            raise SchemaError(
                f"{place}: schema {envelope.type}, this consumer knows up to v{self.version}; upgrade it or send the older version"
            )
        try:
            payload = msgspec.json.decode(record.value, type=self.schema)
        except NOT_JSON as error:
            raise SchemaError(f"{place}: the value is not a {self.type}: {error}") from error
        return Message(envelope, payload, record)
