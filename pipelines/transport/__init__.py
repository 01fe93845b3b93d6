"""Logs: the contract, the embedded one, Kafka, and one in memory for tests."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from pipelines.errors import LogUnavailableError
from pipelines.transport.base import Log


def open_log(url: str) -> Log:
    """Open the log at `embedded:///DIR[?fsync=always|os]` (`%`, `?` and `#` in DIR as %25, %3F and %23), `kafka://HOST:PORT[,...]`
    (users and TLS as in `kafka_access`) or `memory://`.

    Raises LogUnavailableError for another address, or where nothing answers.
    """
    parts = urlsplit(url)
    if parts.scheme == "embedded":
        from pipelines.transport.embedded import EmbeddedLog

        fsync = parse_qs(parts.query).get("fsync", ["always"])[0]
        if not parts.path or fsync not in ("always", "os"):
            raise LogUnavailableError(f"log address {url!r}; expected embedded:///DIR with fsync=always or fsync=os")
        return EmbeddedLog(Path(unquote(parts.path)), fsync=fsync)
    if parts.scheme == "kafka":
        from pipelines.transport.kafka import KafkaLog
        from pipelines.transport.kafka_access import access_of

        return KafkaLog(*access_of(url))
    if parts.scheme == "memory":
        from pipelines.transport.memory import MemoryLog

        return MemoryLog()
    raise LogUnavailableError(f"log address {url!r}; expected embedded:///DIR or kafka://HOST:PORT[,HOST:PORT...]")
