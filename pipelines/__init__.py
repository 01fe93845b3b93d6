"""Streaming pipelines: messages, topics, a log (embedded or Kafka) and the processor over it.

It moves bytes and records. It knows no model, and none of the apps.
"""

from pipelines.errors import (
    ConsumerFencedError,
    LogUnavailableError,
    PermanentError,
    PipelineError,
    SchemaError,
    UnavailableError,
    UnknownTopicError,
)
from pipelines.messages import Envelope, Message
from pipelines.processor import BatchProcessor, Processor
from pipelines.topics import Topic
from pipelines.transport import open_log
from pipelines.transport.base import Consumer, Log, Outgoing, Record

__all__ = [
    "BatchProcessor",
    "Consumer",
    "ConsumerFencedError",
    "Envelope",
    "Log",
    "LogUnavailableError",
    "Message",
    "Outgoing",
    "PermanentError",
    "PipelineError",
    "Processor",
    "Record",
    "SchemaError",
    "Topic",
    "UnavailableError",
    "UnknownTopicError",
    "open_log",
]
