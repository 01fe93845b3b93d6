"""Batches, dead letters and the order of event time."""

from __future__ import annotations

import math
import random
import threading
import zlib

import msgspec
import pytest

from pipelines import BatchProcessor, Message, Outgoing, PipelineError, Record, Topic
from pipelines.merge import EventTimeMerge
from pipelines.transport.memory import MemoryLog


class Item(msgspec.Struct):
    name: str
    at: int = 0


ITEMS = Topic("items", Item, key="name", partitions=3)
NEVER = threading.Event()


@pytest.fixture
def log() -> MemoryLog:
    made = MemoryLog()
    ITEMS.create(made)
    return made


def put(log: MemoryLog, *items: Item) -> None:
    log.produce_many(ITEMS.name, [ITEMS.outgoing(item, "test") for item in items])


def letters(log: MemoryLog) -> list[Record]:
    consumer = log.consumer("letters", [ITEMS.dead_letters])
    found = consumer.poll(0.0, 1000)
    consumer.close()
    return found


def names(messages: list[Message]) -> list[str]:
    return [message.payload.name for message in messages]  # type: ignore[attr-defined]


def run(processor: BatchProcessor) -> None:
    with processor:
        while not processor.idle():
            processor.work(processor.poll(0.1), NEVER)


def test_a_batch_is_handled_at_once_and_committed(log: MemoryLog) -> None:
    put(log, *(Item(f"n{i}") for i in range(20)))
    batches: list[list[str]] = []

    def handle(messages: list[Message]) -> list[tuple[Message, str]]:
        batches.append(names(messages))
        return []

    processor = BatchProcessor(log, ITEMS, "g", handle, max_records=8)
    run(processor)
    assert sorted(name for batch in batches for name in batch) == sorted(f"n{i}" for i in range(20))
    assert max(map(len, batches)) <= 8
    assert processor.counts.handled == 20
    assert sum(log.lag("g", ITEMS.name).values()) == 0


def test_refused_and_undecodable_messages_are_dead_letters_with_their_reason(log: MemoryLog) -> None:
    put(log, Item("good"), Item("bad"))
    log.produce(ITEMS.name, b"no json", key="x")
    processor = BatchProcessor(log, ITEMS, "g", lambda ms: [(m, "not wanted") for m in ms if m.payload.name == "bad"])  # type: ignore[attr-defined]
    run(processor)
    reasons = sorted(r.headers["dlq_error"].decode() for r in letters(log))
    assert len(reasons) == 2
    assert "the value is not a items.v1" in reasons[0]
    assert reasons[1] == "not wanted"
    assert (processor.counts.handled, processor.counts.dead) == (1, 2)


def test_a_message_that_breaks_the_handler_does_not_take_its_neighbours_along(log: MemoryLog) -> None:
    put(log, *(Item(f"n{i}") for i in range(6)))
    handled: list[str] = []

    def handle(messages: list[Message]) -> list[tuple[Message, str]]:
        if "n3" in names(messages):
            raise RuntimeError("poison")
        handled.extend(names(messages))
        return []

    processor = BatchProcessor(log, ITEMS, "g", handle, retries=1, backoff=0)
    run(processor)
    assert sorted(set(handled)) == ["n0", "n1", "n2", "n4", "n5"]
    (letter,) = letters(log)
    assert letter.headers["dlq_error"] == b"RuntimeError: poison"
    assert b"n3" in letter.value


def test_a_passing_fault_is_retried_and_nothing_is_buried(log: MemoryLog) -> None:
    put(log, Item("a"))
    attempts: list[int] = []

    def handle(messages: list[Message]) -> list[tuple[Message, str]]:
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError("away for a moment")
        return []

    processor = BatchProcessor(log, ITEMS, "g", handle, retries=3, backoff=0)
    run(processor)
    assert (len(attempts), processor.counts.retried, letters(log)) == (3, 2, [])


def test_a_stop_commits_nothing_that_was_not_handled(log: MemoryLog) -> None:
    put(log, Item("a"))
    stop = threading.Event()

    def handle(messages: list[Message]) -> list[tuple[Message, str]]:
        stop.set()
        raise OSError("down")

    with BatchProcessor(log, ITEMS, "g", handle, backoff=10) as processor:
        processor.work(processor.poll(1), stop)
    assert sum(log.lag("g", ITEMS.name).values()) == 1


def test_outside_of_its_block_it_has_no_consumer(log: MemoryLog) -> None:
    with pytest.raises(PipelineError, match="inside 'with'"):
        BatchProcessor(log, ITEMS, "g", lambda ms: []).poll(0)


def at(record: Record) -> float:
    try:
        return float(msgspec.json.decode(record.value, type=Item).at)
    except msgspec.MsgspecError:
        return -math.inf


@pytest.mark.parametrize("limit", [7, 20_000])
def test_partitions_are_read_in_the_order_of_event_time(log: MemoryLog, limit: int) -> None:
    """A skewed backlog: one key has most of the records, the others lie behind in the log."""
    generator = random.Random(0)
    names = ["a"] * 8 + ["b", "c", "d", "e"]
    items = [Item(generator.choice(names), n) for n in range(2000)]
    by_partition: dict[int, list[Item]] = {}
    for item in items:
        by_partition.setdefault(zlib.crc32(item.name.encode()) % 3, []).append(item)
    assert len(by_partition) > 1
    for part in by_partition.values():
        put(log, *part)
    merge, found = EventTimeMerge(log.consumer("g", [ITEMS.name]), at, limit), []
    while len(found) < 2000:
        records = merge.poll(0.1, 64)
        assert records, f"{len(found)} of 2000"
        found += [int(at(r)) for r in records]
    assert found == list(range(2000))


def test_a_quiet_partition_does_not_hold_up_the_others(log: MemoryLog) -> None:
    put(log, Item("a", 5), Item("a", 6))
    merge = EventTimeMerge(log.consumer("g", [ITEMS.name]), at)
    assert [at(r) for r in merge.poll(0.1, 10)] == [5, 6]
    assert merge.poll(0.01, 10) == []
    log.produce_many(ITEMS.name, [Outgoing(b"broken", "zz")])
    assert [r.value for r in merge.poll(0.1, 10)] == [b"broken"]
