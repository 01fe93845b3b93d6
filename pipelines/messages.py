"""Messages follow CloudEvents 1.0: the envelope in the headers, the value stays the plain payload.

On Kafka this is the binary content mode of the CloudEvents Kafka protocol binding. A producer that knows
nothing of it may send a bare value: the headers then take defaults.
"""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime

import msgspec

from pipelines.errors import PermanentError
from pipelines.transport.base import Record

TRACEPARENT: ContextVar[str] = ContextVar("traceparent", default="")
"""The W3C trace context of the work at hand; logs and produced messages carry it."""

TRACE = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def new_traceparent() -> str:
    """A fresh W3C trace context (https://www.w3.org/TR/trace-context/)."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def child_traceparent(parent: str) -> str:
    """The same trace, a new span; a fresh trace where `parent` is not a valid context."""
    if not TRACE.fullmatch(parent):
        return new_traceparent()
    version, trace, _, flags = parent.split("-")
    return f"{version}-{trace}-{secrets.token_hex(8)}-{flags}"


def trace_id(traceparent: str) -> str:
    """The 32 digits that a whole trace shares, or an empty string."""
    return traceparent.split("-")[1] if TRACE.fullmatch(traceparent) else ""


def now_rfc3339() -> str:
    """The present in UTC, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def printable(name: str) -> str:
    """A file's name as text that can be encoded: bytes of it that are no UTF-8 (Python keeps them as surrogates) as \\udcff."""
    return name.encode("utf-8", "backslashreplace").decode()


def check_text(name: str, value: str, *, least: int = 0, most: int = 200) -> None:
    """Raise PermanentError where a message's text is shorter or longer than a database keeps, or holds what none keeps."""
    if not least <= len(value) <= most:
        raise PermanentError(f"{name} has {len(value)} characters; expected {least} to {most}")
    if "\0" in value:
        raise PermanentError(f"{name} is {value[:40]!r}; expected text without the character NUL")


def parse_rfc3339(text: str) -> datetime:
    """The event time of a message. Raises PermanentError for what is none, or has no offset from UTC."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError as error:
        raise PermanentError(f"event_time is {text[:40]!r}; expected RFC 3339, as 2018-04-01T00:00:31Z") from error
    if when.tzinfo is None:
        raise PermanentError(f"event_time {text[:40]!r} has no offset from UTC; expected RFC 3339, as 2018-04-01T00:00:31Z")
    return when


class Envelope(msgspec.Struct, frozen=True):
    """CloudEvents attributes. `type` is the schema's name and version, as `medical.studies.v1`."""

    type: str
    source: str
    id: str = msgspec.field(default_factory=lambda: str(uuid.uuid4()))
    time: str = msgspec.field(default_factory=now_rfc3339)
    traceparent: str = msgspec.field(default_factory=new_traceparent)
    content_type: str = "application/json"

    def headers(self) -> dict[str, bytes]:
        """As Kafka headers."""
        fields = {
            "ce_specversion": "1.0",
            "ce_id": self.id,
            "ce_type": self.type,
            "ce_source": self.source,
            "ce_time": self.time,
            "ce_traceparent": self.traceparent,
            "content-type": self.content_type,
        }
        return {name: value.encode() for name, value in fields.items()}

    @classmethod
    def from_headers(cls, headers: Mapping[str, bytes], *, type: str, fallback_id: str) -> Envelope:
        """Read the headers; what is missing takes a default, the id one that is the same on redelivery."""
        text = {name: value.decode("utf-8", "replace") for name, value in headers.items()}
        return cls(
            type=text.get("ce_type", type),
            source=text.get("ce_source", "unknown"),
            id=text.get("ce_id", fallback_id),
            time=text.get("ce_time", "") or now_rfc3339(),
            traceparent=text.get("ce_traceparent", "") or new_traceparent(),
            content_type=text.get("content-type", "application/json"),
        )


class Message(msgspec.Struct, frozen=True):
    """A decoded record: its envelope, its typed payload and where it stood in the log."""

    envelope: Envelope
    payload: object
    record: Record
