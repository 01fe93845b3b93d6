"""Structured logs with the trace id, and nothing in them that names a person or opens a door.

Values that are secret by nature (a patient's name, a card number, a password) are kept out in three ways:
code does not log them; what is known to be private during a piece of work is registered with `private`
and struck out wherever it appears; card numbers and passwords in addresses are recognised by their form.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from pipelines.messages import TRACEPARENT, trace_id

STRUCK_OUT = "[private]"
_PRIVATE: ContextVar[tuple[str, ...]] = ContextVar("private", default=())
_CARD = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.])")
_PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):([^@\s]+)@")
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@contextmanager
def private(*values: object) -> Iterator[None]:
    """Strike `values` (and the parts of a DICOM person name) out of every log line inside the block."""
    words = {part.strip() for value in values for part in (str(value), *re.split(r"[\^=,]", str(value)))}
    token = _PRIVATE.set((*_PRIVATE.get(), *sorted((w for w in words if len(w) >= 3), key=len, reverse=True)))
    try:
        yield
    finally:
        _PRIVATE.reset(token)


def _luhn(digits: str) -> bool:
    doubled = [int(d) for d in reversed(digits)]
    return sum(d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(doubled)) % 10 == 0


def redact(text: str) -> str:
    """`text` without registered private values, card numbers (13-19 digits, Luhn) and passwords in addresses."""
    for value in _PRIVATE.get():
        text = re.sub(re.escape(value), STRUCK_OUT, text, flags=re.IGNORECASE)
    text = _PASSWORD.sub(r"\1:***@", text)
    return _CARD.sub(lambda m: STRUCK_OUT if _luhn(re.sub(r"\D", "", m[0])) else m[0], text)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, trace_id, and the record's extras."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "trace_id": trace_id(TRACEPARENT.get()),
        }
        fields |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return redact(json.dumps(fields, default=str, ensure_ascii=False))


class TextFormatter(logging.Formatter):
    """A line for the eye."""

    def format(self, record: logging.LogRecord) -> str:
        extras = " ".join(f"{key}={value}" for key, value in vars(record).items() if key not in _STANDARD)
        trace = trace_id(TRACEPARENT.get())[:8]
        stamp = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S")
        line = f"{stamp} {record.levelname.lower():7} {record.getMessage()} {extras}{f' trace={trace}' if trace else ''}".rstrip()
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return redact(line)


def configure_logs(level: str, format: str) -> None:
    """Send logs of `level` and above to standard error as "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    if level.upper() != "DEBUG":  # kafka-python reports each attempt, several a second while a broker is away; ours say it, too
        logging.getLogger("kafka").setLevel(logging.CRITICAL)
    for name in ("apps", "shared_runtime", "pipelines"):
        logging.getLogger(name).setLevel(level.upper())
