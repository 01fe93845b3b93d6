"""Errors of the pipelines.

PipelineError
├── UnavailableError        what the work needs does not answer: it is waited for, and nothing is given up
│   └── LogUnavailableError the log's address is wrong, or nothing answers there
├── UnknownTopicError       the topic does not exist in the log
├── ConsumerFencedError     the consumer lost its partition to another member; the records come again
├── SchemaError             a payload does not have the shape that its topic declares
└── PermanentError          handling failed in a way that a retry can't mend; straight to the dead letters
"""

from __future__ import annotations

import msgspec

NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises of bytes that are no JSON of the wanted shape."""


class PipelineError(Exception):
    """Root of the pipelines' errors."""


class UnavailableError(PipelineError):
    """What the work needs, a log or a database, does not answer; a processor waits for it."""


class LogUnavailableError(UnavailableError):
    """The log can't be reached at its address."""


class UnknownTopicError(PipelineError):
    """No such topic in the log."""


class ConsumerFencedError(PipelineError):
    """Another member of the group owns the partition now; nothing was committed."""


class SchemaError(PipelineError):
    """A payload does not fit its topic's schema."""


class PermanentError(PipelineError):
    """Raise it from a handler for input that no retry will mend."""
