"""Envelopes, schemas and the processor."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipelines import BatchProcessor, Envelope, LogUnavailableError, Message, PermanentError, Processor, SchemaError, Topic
from pipelines.dead_letter import ATTEMPTS, ERROR, PLACE
from pipelines.messages import TRACEPARENT, child_traceparent, new_traceparent, trace_id
from pipelines.patience import patiently
from pipelines.processor import Interrupted
from pipelines.transport.base import Outgoing, Record
from pipelines.transport.embedded import EmbeddedLog
from pipelines.transport.memory import MemoryLog


class Order(msgspec.Struct, frozen=True):
    order_id: str
    amount: int


ORDERS = Topic("orders", Order, key="order_id", partitions=2)


@pytest.fixture
def log() -> MemoryLog:
    made = MemoryLog()
    ORDERS.create(made)
    return made


def run(log: MemoryLog, handle: object, **options: Any) -> Processor:
    processor = Processor(log, ORDERS, "g", handle, backoff=0.0, **options)  # type: ignore[arg-type]
    processor.run(threading.Event(), until_idle=True)
    return processor


def read(log: MemoryLog, topic: str) -> list[Record]:
    consumer = log.consumer("reader", [topic])
    found = consumer.poll(timeout=0.1, max_records=1000)
    consumer.close()
    return found


def test_the_envelope_travels_in_cloudevents_headers_and_the_value_stays_plain(log: MemoryLog) -> None:
    envelope = ORDERS.send(log, Order("1", 5), source="shop")
    (record,) = read(log, "orders")
    assert record.value == b'{"order_id":"1","amount":5}'
    assert record.key == "1"
    assert record.headers["ce_type"] == b"orders.v1"
    assert {"ce_id", "ce_source", "ce_time", "ce_traceparent", "ce_specversion", "content-type"} <= set(record.headers)
    message = ORDERS.decode(record)
    assert message.payload == Order("1", 5)
    assert message.envelope == envelope


def test_bare_json_from_a_stranger_is_read_with_defaults(log: MemoryLog) -> None:
    log.produce("orders", b'{"order_id": "7", "amount": 1, "unknown": true}')
    (record,) = read(log, "orders")
    message = ORDERS.decode(record)
    assert message.payload == Order("7", 1)
    assert message.envelope.type == "orders.v1"
    assert message.envelope.id == ORDERS.decode(record).envelope.id


@pytest.mark.parametrize(
    ("value", "word"), [(b'{"order_id": "7"}', "amount"), (b"\xff\xfe", "orders.v1"), (b'{"order_id": 7, "amount": 1}', "order_id")]
)
def test_a_payload_that_does_not_fit_names_the_field(log: MemoryLog, value: bytes, word: str) -> None:
    log.produce("orders", value)
    with pytest.raises(SchemaError, match=word):
        ORDERS.decode(read(log, "orders")[0])


def test_a_newer_schema_is_refused(log: MemoryLog) -> None:
    headers = Envelope(type="orders.v2", source="shop").headers()
    log.produce("orders", b'{"order_id": "1", "amount": 2}', headers=headers)
    with pytest.raises(SchemaError, match=r"orders\.v2.*up to v1"):
        ORDERS.decode(read(log, "orders")[0])
    for odd in ("orders.v²", "orders.v" + "9" * 5000):  # numbers that Python's int() does not take
        log.produce("orders", b'{"order_id": "1", "amount": 2}', headers=headers | {"ce_type": odd.encode()})
        assert ORDERS.decode(read(log, "orders")[-1]).payload == Order("1", 2)


def test_the_trace_goes_on_in_the_handler(log: MemoryLog) -> None:
    sent = ORDERS.send(log, Order("1", 5), source="shop")
    seen: list[str] = []
    run(log, lambda message: seen.append(TRACEPARENT.get()))
    assert trace_id(seen[0]) == trace_id(sent.traceparent)
    assert seen[0] != sent.traceparent
    for odd in ("nonsense", f"{'0' * 90}-{'a' * 32}-{'b' * 16}-01", f"00-{'g' * 32}-{'b' * 16}-01", f"00-{'a' * 31}\0-{'b' * 16}-01"):
        assert len(trace_id(child_traceparent(odd))) == 32
        assert trace_id(odd) == ""
    assert len(new_traceparent().split("-")) == 4


def test_each_message_is_handled_and_committed(log: MemoryLog) -> None:
    for number in range(20):
        ORDERS.send(log, Order(str(number), number), source="shop")
    seen: list[int] = []
    processor = run(log, lambda message: seen.append(message.payload.amount))
    assert sorted(seen) == list(range(20))
    assert processor.counts.handled == 20
    assert sum(log.lag("g", "orders").values()) == 0


@pytest.mark.parametrize("slow", [5.0, 0.0])
def test_records_are_handled_in_the_order_in_which_they_came(slow: float, log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their partition is, and also where those behind a slow one go back."""
    monkeypatch.setattr("pipelines.processor.SLOW", slow)
    for number in range(8):
        ORDERS.send(log, Order(str(number), number), "test")
        time.sleep(0.002)
    assert len({record.partition for record in read(log, "orders")}) == 2
    handled: list[int] = []
    run(log, lambda message: handled.append(message.payload.amount))
    assert handled == list(range(8))


def test_a_passing_fault_is_retried(log: MemoryLog) -> None:
    ORDERS.send(log, Order("1", 5), source="shop")
    tries: list[int] = []

    def handle(message: Message) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise OSError("disk is busy")

    processor = run(log, handle, retries=3)
    assert len(tries) == 3
    assert (processor.counts.handled, processor.counts.retried, processor.counts.dead) == (1, 2, 0)


def test_a_lasting_fault_goes_to_the_dead_letters_with_bytes_place_reason_and_attempts(log: MemoryLog) -> None:
    ORDERS.send(log, Order("1", 5), source="shop")
    (original,) = read(log, "orders")

    def handle(message: Message) -> None:
        raise OSError("disk is gone")

    processor = run(log, handle, retries=2)
    (dead,) = read(log, "orders.dlq")
    assert dead.value == original.value
    assert dead.headers["ce_id"] == original.headers["ce_id"]
    assert b"disk is gone" in dead.headers[ERROR]
    assert dead.headers[ATTEMPTS] == b"3"
    assert dead.headers[PLACE] == f"orders/{original.partition}/{original.offset}".encode()
    assert processor.counts.dead == 1
    assert sum(log.lag("g", "orders").values()) == 0


class Absent(MemoryLog):
    """A log that does not answer `left` of the calls named by `what`."""

    what, left = "", 0

    def _ask(self, what: str) -> None:
        if self.left and what == self.what:
            self.left -= 1
            raise LogUnavailableError("nobody answers")

    def produce(self, topic: str, value: bytes, *, key: str | None = None, headers: Mapping[str, bytes] | None = None) -> tuple[int, int]:
        self._ask(f"produce {topic}")
        return super().produce(topic, value, key=key, headers=headers)

    def consumer(self, group: str, topics: Sequence[str]) -> Any:
        self._ask("consumer")
        member = super().consumer(group, topics)
        for name in ("poll", "commit"):
            real = getattr(member, name)

            def asked(*given: Any, name: str = name, real: Any = real, **options: Any) -> Any:
                self._ask(name)
                return real(*given, **options)

            setattr(member, name, asked)
        return member


@pytest.mark.parametrize("what", ["consumer", "poll", "commit", "produce answers", "produce orders.dlq"])
def test_while_the_log_does_not_answer_nothing_is_given_up(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a lasting fault's number of attempts nor to the dead letters; the processor does not end."""
    monkeypatch.setattr("pipelines.patience.AGAIN_SECONDS", 0.0)
    log, answers = Absent(), Topic("answers", Order, key="order_id", partitions=1)
    ORDERS.create(log)
    answers.create(log)
    for number in range(6):
        ORDERS.send(log, Order(str(number), number), source="shop")
    log.what, log.left = what, 9

    def handle(message: Message) -> None:
        if message.payload.amount == 3:
            raise PermanentError("no such order")
        answers.send(log, message.payload, source="worker")

    processor = run(log, handle, retries=2)
    assert log.left == 0
    assert {msgspec.json.decode(record.value)["amount"] for record in read(log, "answers")} == {0, 1, 2, 4, 5}
    dead = read(log, "orders.dlq")
    assert {b"no such order" in record.headers[ERROR] for record in dead} == {True}
    assert processor.counts.retried == 0
    assert sum(log.lag("g", "orders").values()) == 0


def test_a_record_waits_for_room_on_the_disk(log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.patience.AGAIN_SECONDS", 0.0)
    ORDERS.send(log, Order("1", 5), source="shop")
    tried: list[Message] = []

    def handle(message: Message) -> None:
        tried.append(message)
        if len(tried) < 9:
            raise OSError(errno.ENOSPC, "No space left on device")

    assert run(log, handle, retries=2).counts.retried == 0
    assert len(tried) == 9
    assert read(log, "orders.dlq") == []


def test_a_batch_is_not_given_up_while_the_log_does_not_answer(log: MemoryLog) -> None:
    ORDERS.send(log, Order("1", 5), source="shop")

    def handle(messages: list[Message]) -> list[tuple[Message, str]]:
        raise LogUnavailableError("nobody answers")

    with BatchProcessor(log, ORDERS, "g", handle) as processor:
        records = processor.poll(1.0)
        assert len(records) == 1
        with pytest.raises(LogUnavailableError):
            processor.work(records, threading.Event())
    assert read(log, "orders.dlq") == []
    assert sum(log.lag("g", "orders").values()) == 1


def test_one_waits_for_the_log_until_told_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.patience.AGAIN_SECONDS", 0.0)
    stop, calls = threading.Event(), []

    def act() -> str:
        calls.append(1)
        if len(calls) < 4:
            raise LogUnavailableError("nobody answers")
        return "stored"

    assert patiently(act, stop) == "stored"
    calls.clear()
    with pytest.raises(LogUnavailableError):
        patiently(act, None)
    assert len(calls) == 1
    stop.set()
    with pytest.raises(LogUnavailableError):
        patiently(act, stop)


def test_bad_input_is_not_retried_and_the_rest_goes_on(log: MemoryLog) -> None:
    for odd in (b"not json", b"", '{"order_id": "Müller", "amount": 1}'.encode("latin-1"), b'{"more": ' + b"[" * 100_000):
        log.produce("orders", odd, key="a")
    ORDERS.send(log, Order("2", 2), source="shop")
    ORDERS.send(log, Order("3", 3), source="shop")
    seen: list[int] = []

    def handle(message: Message) -> None:
        amount = message.payload.amount  # type: ignore[attr-defined]
        if amount == 2:
            raise PermanentError("order 2 can't be")
        seen.append(amount)

    processor = run(log, handle, retries=5)
    assert seen == [3]
    assert (processor.counts.retried, processor.counts.dead) == (0, 5)
    assert {r.headers[ATTEMPTS] for r in read(log, "orders.dlq")} == {b"1"}


def test_an_interrupted_message_comes_again(log: MemoryLog) -> None:
    ORDERS.send(log, Order("1", 5), source="shop")

    def stop(message: Message) -> None:
        raise Interrupted

    Processor(log, ORDERS, "g", stop).run(threading.Event())
    seen: list[object] = []
    run(log, lambda message: seen.append(message.payload))
    assert seen == [Order("1", 5)]


def test_who_sent_a_message_that_is_given_up_is_told(log: MemoryLog) -> None:
    for number in "12":
        ORDERS.send(log, Order(number, 5), source="shop")
    told: list[tuple[str, str]] = []

    def handle(message: Message) -> None:
        if message.payload.order_id == "1":  # type: ignore[attr-defined]
            raise RuntimeError("no luck")

    def given_up(message: Message, reason: str) -> None:
        told.append((message.payload.order_id, reason))  # type: ignore[attr-defined]
        raise ValueError("a fault here stops nothing")

    processor = run(log, handle, retries=1, given_up=given_up)
    assert told == [("1", "RuntimeError: no luck")]
    assert (processor.counts.handled, processor.counts.dead) == (1, 1)


def test_a_message_that_ends_every_process_is_given_up(tmp_path: Path) -> None:
    """Memory that runs out, a library that aborts: the process is gone before anything can be noted."""
    log = EmbeddedLog(tmp_path / "log")
    ORDERS.create(log)
    for number in "12":
        ORDERS.send(log, Order(number, 5), source="shop")
    code = f"""
import os, threading, msgspec
from pathlib import Path
from pipelines import Processor, Topic
from pipelines.transport.embedded import EmbeddedLog
from tests.unit.test_pipelines import ORDERS
folder = Path({str(tmp_path)!r})
def handle(message):
    if message.payload.order_id == "1":
        os.abort()
    (folder / "handled").write_text(message.payload.order_id)
given = lambda message, reason: (folder / "given").write_text(reason)
processor = Processor(EmbeddedLog(folder / "log"), ORDERS, "g", handle, given_up=given, unfinished=folder / "notes")
processor.run(threading.Event(), until_idle=True)
"""
    ended = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode for _ in range(4)]
    assert ended == [-6, -6, -6, 0]
    assert (tmp_path / "handled").read_text() == "2"
    assert "3 workers ended while they handled it" in (tmp_path / "given").read_text()
    assert list((tmp_path / "notes").iterdir()) == []
    log.close()


def test_what_is_given_back_alive_does_not_count(tmp_path: Path, log: MemoryLog) -> None:
    ORDERS.send(log, Order("1", 5), source="shop")

    def stop(message: Message) -> None:
        raise Interrupted

    for _ in range(5):
        Processor(log, ORDERS, "g", stop, unfinished=tmp_path).run(threading.Event())
    seen: list[object] = []
    run(log, lambda message: seen.append(message.payload), unfinished=tmp_path)
    assert seen == [Order("1", 5)]


def test_a_foreign_payload_is_not_sent(log: MemoryLog) -> None:
    class Other(msgspec.Struct):
        order_id: str

    with pytest.raises(SchemaError, match="carries Order, got Other"):
        ORDERS.send(log, Other("1"), source="shop")


def test_threads_that_come_and_go_leave_no_files_of_the_embedded_log_open(tmp_path: Path) -> None:
    log = EmbeddedLog(tmp_path)
    log.create_topic("t", 1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(40):
        thread = threading.Thread(target=log.lag, args=("g", "t"))
        thread.start()
        thread.join()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    assert log.topics() == {"t": 1}
    log.close()


def test_the_embedded_log_lets_go_of_what_every_group_has_done_after_its_days(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EmbeddedLog(tmp_path, keep_days=7)
    for topic in ("read", "unread", "read.dlq"):
        log.create_topic(topic, 1)
        log.produce_many(topic, [Outgoing(bytes([number])) for number in range(10)])
    offsets = {"quick": 9, "slow": 4}
    for group, count in offsets.items():
        consumer = log.consumer(group, ["read"])
        consumer.commit(consumer.poll(1.0)[count - 1])
        consumer.close()
    assert log.trim(7) == 0, "they are new"
    with log.transaction() as db:
        db.execute("UPDATE records SET time = time - 8 * 86400 WHERE pos != 7")

    def kept() -> dict[str, list[int]]:
        return {topic: [record.offset for record in log.read((topic, 0), 0, 100)] for topic in log.topics()}

    monkeypatch.setattr("pipelines.transport.embedded.TRIMMED", 3)
    log._trim_at = 0.0
    assert log.produce("read", b"next") == (0, 10), "old records are let go of as new ones come"
    assert kept() == {"read": [4, 5, 6, 7, 8, 9, 10], "unread": [7, 8, 9], "read.dlq": list(range(10))}
    assert log.lag("slow", "read") == {0: 7}
    consumer = log.consumer("new", ["read"])
    consumer.poll(0.0, 1)
    consumer.seek("read", 0, 2)
    assert [record.offset for record in consumer.poll(1.0)] == [4, 5, 6, 7, 8, 9, 10]
    assert sum(consumer.behind().values()) == 0
    with log.transaction() as db:
        db.execute("UPDATE records SET time = 0")
        db.execute("UPDATE offsets SET pos = 11")
    assert log.trim(7) == 2, "a group that has committed nothing reads; the last of a partition stays"
    assert kept() == {"read": [4, 5, 6, 7, 8, 9, 10], "unread": [9], "read.dlq": list(range(10))}
    consumer.close()
    assert log.trim(7) == 6
    assert kept()["read"] == [10]
    assert log.produce("unread", b"x") == (0, 10)
    log.close()


def test_the_embedded_log_is_on_disk_when_produce_returns(tmp_path: Path) -> None:
    log = EmbeddedLog(tmp_path)
    log.create_topic("t", 1)
    log.produce("t", b"kept")
    with log.connection() as db:
        mode = db.execute("PRAGMA synchronous").fetchone()[0]
    assert mode == 2, "fsync=always is SQLite's FULL"
    other = EmbeddedLog(tmp_path)
    consumer = other.consumer("g", ["t"])
    assert [r.value for r in consumer.poll(1)] == [b"kept"]
    consumer.close()
    other.close()
    log.close()
