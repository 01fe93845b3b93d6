"""Logs: the contract, the embedded one, Kafka, and one in memory for tests."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from pipelines.errors import LogUnavailableError
from pipelines.transport.base import Log


def open_log(url: str) -> Log:
    """Open the log at `embedded:///DIR[?fsync=always|os][&keep_days=DAYS]` (`%`, `?` and `#` in DIR as %25, %3F and %23),
    `kafka://HOST:PORT[,...]` (users and TLS as in `kafka_access`) or `memory://`.

    Raises LogUnavailableError for another address, or where nothing answers.
    """
    parts = urlsplit(url)
    if parts.scheme == "embedded":
        from pipelines.transport.embedded import EmbeddedLog

        given = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        fsync, days = given.get("fsync", "always"), given.get("keep_days")
        if not parts.path or fsync not in ("always", "os") or not given.keys() <= {"fsync", "keep_days"} or not _is_number(days):
            raise LogUnavailableError(f"log address {url!r}; expected embedded:///DIR with fsync=always or fsync=os, and keep_days=DAYS")
        return EmbeddedLog(Path(unquote(parts.path)), fsync=fsync, keep_days=None if days is None else float(days))
    if parts.scheme == "kafka":
        from pipelines.transport.kafka import KafkaLog
        from pipelines.transport.kafka_access import access_of

        return KafkaLog(*access_of(url))
    if parts.scheme == "memory":
        from pipelines.transport.memory import MemoryLog

        return MemoryLog()
    raise LogUnavailableError(f"log address {url!r}; expected embedded:///DIR or kafka://HOST:PORT[,HOST:PORT...]")


def _is_number(text: str | None) -> bool:
    """Whether an option is not given, or a number above 0."""
    try:
        return text is None or 0 < float(text) < float("inf")
    except ValueError:
        return False
