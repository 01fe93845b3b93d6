"""Dead letters: a record that could not be handled, kept with its bytes, its place and the reason."""

from __future__ import annotations

from pipelines.topics import Topic
from pipelines.transport.base import Log, Record

ERROR, ATTEMPTS, PLACE = "dlq_error", "dlq_attempts", "dlq_place"


def send_to_dead_letters(log: Log, topic: Topic, record: Record, reason: str, attempts: int) -> None:
    """Append `record`, bytes and headers unchanged, to the topic's dead letters with the reason added."""
    headers = dict(record.headers)
    headers[ERROR] = reason.encode()[:4000]
    headers[ATTEMPTS] = str(attempts).encode()
    headers[PLACE] = f"{record.topic}/{record.partition}/{record.offset}".encode()
    log.produce(topic.dead_letters, record.value, key=record.key, headers=headers)
