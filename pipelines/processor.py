"""The processor: consume, handle, commit - at least once, with bounded retries and dead letters."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines import metrics
from pipelines.dead_letter import send_to_dead_letters
from pipelines.errors import ConsumerFencedError, PermanentError, PipelineError, SchemaError, UnavailableError
from pipelines.merge import EventTimeMerge
from pipelines.messages import TRACEPARENT, Message, child_traceparent
from pipelines.patience import patiently, waiting_for_room
from pipelines.topics import Topic
from pipelines.transport.base import Consumer, Log, Record
from pipelines.unfinished import Unfinished

logger = logging.getLogger(__name__)
MOST_ENDS = 3
"""Processes that may end while they handle a record before it is given up."""
AT_ONCE, SLOW = 8, 5.0
"""Records that are read at once, and the seconds of handling after which the rest of them goes back, for any member to take."""


class Interrupted(BaseException):
    """Raised by a signal handler to leave a handler at once; the record stays uncommitted and comes again."""


@dataclass
class Counts:
    """What the processor of a topic in a group has done since it started; the metrics of this process hold the same."""

    topic: str
    group: str
    handled: int = 0
    retried: int = 0
    dead: int = 0

    def add(self, outcome: str, number: int = 1) -> None:
        """Count `number` records with an `outcome` of `metrics.OUTCOMES`."""
        setattr(self, outcome, getattr(self, outcome) + number)
        metrics.records.labels(self.topic, self.group, outcome).inc(number)

    def timed(self) -> AbstractContextManager[object]:
        """Measures the handler for the length of a block."""
        return metrics.handling_seconds.labels(self.topic, self.group).time()


class Processor:
    """Runs `handle` on every message of `topic` as a member of `group`.

    A record is committed after its handler returned, or after it went to the dead letters; so each is
    handled at least once and a handler must bear a repetition. PermanentError and SchemaError are not
    retried; any other error is, `retries` times, waiting `backoff` seconds, then twice that, and so on.
    While the log, or what `handle` needs, does not answer (UnavailableError; a full disk, too) nothing is given up: the processor joins
    anew until it does.

    `given_up` is told the message and the reason where retries did not help. `unfinished`: a folder for notes of what is being handled;
    with it a record that MOST_ENDS processes ended on (memory, a library's fault) is given up, too.
    """

    def __init__(
        self,
        log: Log,
        topic: Topic,
        group: str,
        handle: Callable[[Message], None],
        *,
        retries: int = 3,
        backoff: float = 0.5,
        given_up: Callable[[Message, str], None] = lambda message, reason: None,
        unfinished: Path | None = None,
    ) -> None:
        self._log, self._topic, self._group, self._handle = log, topic, group, waiting_for_room(handle)
        self._retries, self._backoff, self._given_up = retries, backoff, given_up
        self._unfinished = Unfinished(unfinished, group)
        self.counts = Counts(topic.name, group)

    def run(self, stop: threading.Event, ready: Callable[[], None] = lambda: None, *, until_idle: bool = False) -> None:
        """Process until `stop` is set, or the log has nothing more where `until_idle`.

        `ready` is called once partitions are owned. An `Interrupted` ends it with nothing lost.
        """
        announced: list[bool] = []

        def announce() -> None:
            if not announced:
                announced.append(True)
                ready()

        try:
            patiently(lambda: self._as_member(stop, announce, until_idle), stop)
        except UnavailableError:
            logger.info("ended while it waited", extra={"topic": self._topic.name})
        except Interrupted:
            logger.info("interrupted; unfinished records stay in the log", extra={"topic": self._topic.name})

    def _as_member(self, stop: threading.Event, ready: Callable[[], None], until_idle: bool) -> None:
        """Process as a member of the group. Raises UnavailableError."""
        consumer = self._log.consumer(self._group, [self._topic.name])
        try:
            joined = False
            while not stop.is_set():
                records = consumer.poll(timeout=0.5, max_records=AT_ONCE)
                if not joined and (joined := bool(consumer.assignment())):
                    ready()
                if until_idle and joined and not records and not any(self._log.lag(self._group, self._topic.name).values()):
                    return
                self._work(consumer, records, stop)
        finally:
            consumer.close()

    def _work(self, consumer: Consumer, records: list[Record], stop: threading.Event) -> None:
        begin, waiting = time.monotonic(), _oldest_first(records)
        while waiting:
            record = waiting.pop(0)
            if stop.is_set() or not self._settle(record, stop):
                return
            try:
                consumer.commit(record)
            except ConsumerFencedError as error:
                logger.warning("%s", error)
                waiting = [r for r in waiting if (r.topic, r.partition) != (record.topic, record.partition)]
            if time.monotonic() - begin > SLOW:
                _give_back(consumer, waiting)
                return

    def _settle(self, record: Record, stop: threading.Event) -> bool:
        """Handle one record or bury it; False where `stop` came first."""
        try:
            message = self._topic.decode(record)
        except SchemaError as error:
            return self._bury(record, str(error), 1)
        token, ends = TRACEPARENT.set(child_traceparent(message.envelope.traceparent)), self._unfinished.begin(record)
        try:
            if ends >= MOST_ENDS:
                return self._give_up(message, f"{ends} workers ended while they handled it", ends)
            return self._handled(message, stop)
        finally:
            self._unfinished.end(record)
            TRACEPARENT.reset(token)

    def _handled(self, message: Message, stop: threading.Event) -> bool:
        attempt = 0
        while True:
            attempt += 1
            try:
                with self.counts.timed():
                    self._handle(message)
                self.counts.add(metrics.HANDLED)
                return True
            except (PermanentError, SchemaError) as error:
                return self._bury(message.record, str(error), attempt)
            except UnavailableError:
                raise
            except Exception as error:
                if attempt > self._retries:
                    logger.exception("handling failed %d times", attempt, extra=_place(message.record))
                    return self._give_up(message, f"{type(error).__name__}: {error}", attempt)
                logger.warning("handling failed, attempt %d: %s", attempt, error, extra=_place(message.record))
                self.counts.add(metrics.RETRIED)
            if stop.wait(self._backoff * 2 ** (attempt - 1)):
                return False
            TRACEPARENT.set(child_traceparent(message.envelope.traceparent))

    def _give_up(self, message: Message, reason: str, attempts: int) -> bool:
        """Tell, and bury. Raises UnavailableError where it can't be told now."""
        try:
            self._given_up(message, reason)
        except UnavailableError:
            raise
        except Exception:
            logger.exception("that a message was given up could not be noted", extra=_place(message.record))
        return self._bury(message.record, reason, attempts)

    def _bury(self, record: Record, reason: str, attempts: int) -> bool:
        send_to_dead_letters(self._log, self._topic, record, reason, attempts)
        self.counts.add(metrics.DEAD)
        logger.error("to %s: %s", self._topic.dead_letters, reason, extra=_place(record))
        return True


def _oldest_first(records: Sequence[Record]) -> list[Record]:
    """By the time at which they came, as far as the order within partitions allows."""
    latest: dict[tuple[str, int], float] = {}
    times = []
    for record in records:
        part = (record.topic, record.partition)
        latest[part] = max(record.timestamp, latest.get(part, record.timestamp))
        times.append(latest[part])
    return [records[i] for i in sorted(range(len(records)), key=times.__getitem__)]


def _give_back(consumer: Consumer, records: Sequence[Record]) -> None:
    """Let the next poll begin with `records`, or leave them to the member that owns their partition by then."""
    first = {(r.topic, r.partition): r.offset for r in reversed(records)}
    for (topic, partition), offset in first.items():
        with suppress(ConsumerFencedError):
            consumer.seek(topic, partition, offset)


Rejection = tuple[Message, str]


class BatchProcessor:
    """Runs `handle` on batches of messages: one write for many records.

    `handle` returns the messages that it refuses, with the reason; they go to the dead letters. It runs at
    least once for each message and must bear a repetition. When it fails it is retried, then tried on each
    message alone, and those that still fail go to the dead letters. The batch is committed afterwards.
    With `time_of`, the event time of a record, partitions are read in the order of event time.
    UnavailableError is the caller's: nothing was committed, and a new processor gets the records again.
    """

    def __init__(
        self,
        log: Log,
        topic: Topic,
        group: str,
        handle: Callable[[list[Message]], list[Rejection]],
        *,
        time_of: Callable[[Record], float] | None = None,
        max_records: int = 256,
        retries: int = 3,
        backoff: float = 0.5,
    ) -> None:
        self._log, self._topic, self._group, self._handle = log, topic, group, waiting_for_room(handle)
        self._max_records, self._retries, self._backoff = max_records, retries, backoff
        self._time_of = time_of
        self._consumer: Consumer | None = None
        self._merge: EventTimeMerge | None = None
        self.counts = Counts(topic.name, group)

    def __enter__(self) -> BatchProcessor:
        self._consumer = self._log.consumer(self._group, [self._topic.name])
        self._merge = EventTimeMerge(self._consumer, self._time_of) if self._time_of else None
        return self

    def __exit__(self, *error: object) -> None:
        if self._consumer is not None:
            self._consumer.close()

    @property
    def consumer(self) -> Consumer:
        """The group's member; there inside the `with` block."""
        if self._consumer is None:
            raise PipelineError("the processor is not running; use it inside 'with'")
        return self._consumer

    def poll(self, timeout: float) -> list[Record]:
        """The next records, for `work`; earliest event first where `time_of` was given."""
        return (self._merge or self.consumer).poll(timeout, self._max_records)

    def drain(self, stop: threading.Event) -> None:
        """Work until everything that is in the log now is done."""
        while any(self.consumer.behind().values()) and not stop.is_set():
            self.work(self.poll(0.5), stop)

    def idle(self) -> bool:
        """Whether the group has committed everything."""
        return not any(self._log.lag(self._group, self._topic.name).values())

    def work(self, records: list[Record], stop: threading.Event) -> None:
        """Handle `records` and commit them; nothing is committed where `stop` came first."""
        messages = []
        for record in records:
            try:
                messages.append(self._topic.decode(record))
            except SchemaError as error:
                self._bury(record, str(error), 1)
        if messages and not self._settle(messages, stop):
            return
        for record in {(r.topic, r.partition): r for r in records}.values():
            try:
                self.consumer.commit(record)
            except ConsumerFencedError as error:
                logger.warning("%s", error)

    def _settle(self, messages: list[Message], stop: threading.Event) -> bool:
        for attempt in range(1, self._retries + 2):
            try:
                with self.counts.timed():
                    rejected = self._handle(messages)
            except UnavailableError:
                raise
            except Exception as error:
                if attempt > self._retries:
                    logger.exception("handling a batch of %d failed %d times", len(messages), attempt, extra=_place(messages[0].record))
                    self._one_by_one(messages, f"{type(error).__name__}: {error}", attempt)
                    return True
                logger.warning("handling a batch failed, attempt %d: %s", attempt, error, extra=_place(messages[0].record))
                self.counts.add(metrics.RETRIED)
            else:
                for message, reason in rejected:
                    self._bury(message.record, reason, attempt)
                self.counts.add(metrics.HANDLED, len(messages) - len(rejected))
                return True
            if stop.wait(self._backoff * 2 ** (attempt - 1)):
                return False
        return False

    def _one_by_one(self, messages: list[Message], reason: str, attempts: int) -> None:
        if len(messages) == 1:
            self._bury(messages[0].record, reason, attempts)
            return
        for message in messages:
            try:
                rejected = self._handle([message])
            except UnavailableError:
                raise
            except Exception as error:
                self._bury(message.record, f"{type(error).__name__}: {error}", attempts + 1)
                continue
            for refused, why in rejected:
                self._bury(refused.record, why, attempts + 1)
            self.counts.add(metrics.HANDLED, 1 - len(rejected))

    def _bury(self, record: Record, reason: str, attempts: int) -> None:
        send_to_dead_letters(self._log, self._topic, record, reason, attempts)
        self.counts.add(metrics.DEAD)
        logger.error("to %s: %s", self._topic.dead_letters, reason, extra=_place(record))


def _place(record: Record) -> dict[str, object]:
    return {"topic": record.topic, "partition": record.partition, "offset": record.offset}
