"""Dead letters: a record that could not be handled, kept with its bytes, its place and the reason."""

from __future__ import annotations

from pipelines.errors import PermanentError
from pipelines.topics import Topic
from pipelines.transport.base import Log, Record

ERROR, ATTEMPTS, PLACE, LEFT_OUT = "dlq_error", "dlq_attempts", "dlq_place", "dlq_left_out"


def send_to_dead_letters(log: Log, topic: Topic, record: Record, reason: str, attempts: int) -> None:
    """Append `record`, bytes and headers unchanged, to the topic's dead letters with the reason added.

    A record that is too large for the log with that goes there without its bytes and headers; `dlq_left_out` says so, and where it stands.
    """
    place = f"{record.topic}/{record.partition}/{record.offset}"
    added = {
        ERROR: reason.encode("utf-8", "backslashreplace")[:4000].decode("utf-8", "ignore").encode(),
        ATTEMPTS: str(attempts).encode(),
        PLACE: place.encode(),
    }
    try:
        log.produce(topic.dead_letters, record.value, key=record.key, headers={**record.headers, **added})
    except PermanentError as error:
        added[LEFT_OUT] = f"{len(record.value)} bytes, which stand at {place}: {error}".encode()[:1000]
        log.produce(topic.dead_letters, b"", headers=added)
