"""One contract for every log: in memory, embedded, Kafka."""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pipelines import (
    ConsumerFencedError,
    Envelope,
    Log,
    LogUnavailableError,
    Message,
    PermanentError,
    Processor,
    Topic,
    UnknownTopicError,
    open_log,
)
from pipelines.dead_letter import send_to_dead_letters
from pipelines.processor import AT_ONCE
from pipelines.transport.base import Consumer, Outgoing, Record


class Order(msgspec.Struct, frozen=True):
    name: str
    number: int


KINDS = ["memory", "embedded", "kafka"]


@pytest.fixture(params=KINDS)
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Log]:
    if request.param == "kafka":
        address = f"kafka://{request.getfixturevalue('kafka')}"
    else:
        address = {"memory": "memory://", "embedded": f"embedded://{tmp_path}/log?fsync=os"}[request.param]
    opened = open_log(address)
    yield opened
    opened.close()


@pytest.fixture
def topic(log: Log) -> str:
    name = f"t-{uuid.uuid4().hex[:8]}"
    log.create_topic(name, 3)
    return name


def take(consumer: Consumer, count: int, timeout: float = 40) -> list[Record]:
    """Poll until `count` records came."""
    found: list[Record] = []
    deadline = time.monotonic() + timeout
    while len(found) < count and time.monotonic() < deadline:
        found += consumer.poll(timeout=0.5)
    assert len(found) >= count, f"{len(found)} of {count} records within {timeout} s"
    return found


def drain(consumer: Consumer) -> list[Record]:
    """What comes within a moment."""
    return [record for _ in range(4) for record in consumer.poll(timeout=0.3)]


def test_records_come_back_as_they_were(log: Log, topic: str) -> None:
    value = bytes(range(256))
    place = log.produce(topic, value, key="a", headers={"ce_id": b"1", "binary": b"\x00\xff"})
    consumer = log.consumer("g1", [topic])
    (record,) = take(consumer, 1)
    assert (record.partition, record.offset) == place
    assert (record.topic, record.key, record.value) == (topic, "a", value)
    assert record.headers == {"ce_id": b"1", "binary": b"\x00\xff"}
    assert abs(record.timestamp - time.time()) < 120
    consumer.close()


def test_equal_keys_keep_their_order_and_share_a_partition(log: Log, topic: str) -> None:
    for number in range(60):
        log.produce(topic, str(number).encode(), key=f"k{number % 5}")
    consumer = log.consumer("g1", [topic])
    found = take(consumer, 60)
    assert len({r.partition for r in found}) > 1
    for key, records in itertools.groupby(sorted(found, key=lambda r: r.key or ""), lambda r: r.key):
        mine = list(records)
        assert len({r.partition for r in mine}) == 1, key
        numbers = [int(r.value) for r in sorted(mine, key=lambda r: r.offset)]
        assert numbers == sorted(numbers)
    consumer.close()


def test_what_is_committed_is_not_read_again_and_the_rest_is(log: Log, topic: str) -> None:
    for number in range(6):
        log.produce(topic, str(number).encode(), key="same")
    first = log.consumer("g1", [topic])
    records = take(first, 6)
    first.commit(records[2])
    first.close()
    second = log.consumer("g1", [topic])
    assert [r.value for r in take(second, 3)] == [b"3", b"4", b"5"]
    second.close()


def test_lag_counts_what_is_not_committed(log: Log, topic: str) -> None:
    assert sum(log.lag("g1", topic).values()) == 0
    for number in range(5):
        log.produce(topic, b"x", key=str(number))
    assert sum(log.lag("g1", topic).values()) == 5
    consumer = log.consumer("g1", [topic])
    for record in take(consumer, 5):
        consumer.commit(record)
    assert sum(log.lag("g1", topic).values()) == 0
    assert sum(log.lag("g2", topic).values()) == 5
    consumer.close()


def test_groups_are_independent(log: Log, topic: str) -> None:
    log.produce(topic, b"x", key="a")
    for group in ("g1", "g2"):
        consumer = log.consumer(group, [topic])
        (record,) = take(consumer, 1)
        consumer.commit(record)
        consumer.close()


def test_members_of_a_group_share_the_partitions(log: Log, topic: str) -> None:
    members = [log.consumer("g1", [topic]), log.consumer("g1", [topic])]
    deadline = time.monotonic() + 40
    while True:
        for member in members:
            member.poll(timeout=0.2)
        shares = [set(member.assignment()) for member in members]
        if all(shares) and len(shares[0] | shares[1]) == 3:
            break
        assert time.monotonic() < deadline, shares
    assert not shares[0] & shares[1]
    for number in range(30):
        log.produce(topic, str(number).encode(), key=str(number))
    seen: list[int] = []
    while len(seen) < 30:
        assert time.monotonic() < deadline + 40
        for member in members:
            for record in member.poll(timeout=0.1):
                assert (record.topic, record.partition) in set(member.assignment())
                seen.append(int(record.value))
    assert sorted(seen) == list(range(30))
    for member in members:
        member.close()


def test_seek_reads_again_from_there(log: Log, topic: str) -> None:
    places = [log.produce(topic, str(number).encode(), key="same") for number in range(4)]
    consumer = log.consumer("g1", [topic])
    take(consumer, 4)
    consumer.seek(topic, *places[1])
    assert [r.value for r in take(consumer, 3)] == [b"1", b"2", b"3"]
    consumer.close()


def test_many_records_are_stored_at_once_in_order(log: Log, topic: str) -> None:
    log.produce_many(topic, [])
    log.produce_many(topic, [Outgoing(str(n).encode(), f"k{n % 4}", {"n": b"%d" % n}) for n in range(300)])
    log.produce_many(topic, [Outgoing(b"last")])
    consumer = log.consumer("g1", [topic])
    found = take(consumer, 301)
    assert sorted(int(r.value) for r in found if r.value != b"last") == list(range(300))
    assert all(r.headers["n"] == r.value for r in found if r.value != b"last")
    for key in ("k0", "k1", "k2", "k3"):
        mine = sorted((r for r in found if r.key == key), key=lambda r: r.offset)
        assert len({r.partition for r in mine}) == 1
        assert [int(r.value) for r in mine] == sorted(int(r.value) for r in mine)
    single = log.produce(topic, b"x", key="k0")
    assert single == (next(r.partition for r in found if r.key == "k0"), single[1]), "the same partition as alone"
    with pytest.raises(UnknownTopicError):
        log.produce_many("nowhere", [Outgoing(b"x")])
    consumer.close()


def test_a_member_knows_how_far_it_is_behind(log: Log, topic: str) -> None:
    log.produce_many(topic, [Outgoing(b"x", str(n)) for n in range(50)])
    consumer = log.consumer("g1", [topic])
    records = take(consumer, 50)
    assert sum(consumer.behind().values()) == 0
    log.produce_many(topic, [Outgoing(b"y", str(n)) for n in range(7)])
    assert sum(consumer.behind().values()) == 7
    take(consumer, 7)
    assert sum(consumer.behind().values()) == 0, "what was read counts, committed or not"
    consumer.seek(topic, records[0].partition, records[0].offset)
    assert sum(consumer.behind().values()) > 0
    consumer.close()


def test_a_partition_that_is_not_owned_can_not_be_sought(log: Log, topic: str) -> None:
    consumer = log.consumer("g1", [topic])
    with pytest.raises(ConsumerFencedError):
        consumer.seek("other-topic", 0, 0)
    consumer.close()


def test_what_waits_behind_a_slow_record_goes_to_a_member_that_joins(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member reads several records at once; while each takes long, the others are anybody's, the oldest first."""
    monkeypatch.setattr("pipelines.processor.SLOW", 0.5)
    orders = Topic(f"t-{uuid.uuid4().hex[:8]}", Order, "name", partitions=2)
    orders.create(log)
    for number in range(AT_ONCE):
        orders.send(log, Order(f"k{number}", number), "test")
    handled: list[tuple[str, int]] = []
    stop = threading.Event()

    def member(name: str) -> threading.Thread:
        def handle(message: Message) -> None:
            assert isinstance(message.payload, Order)
            if name == "first" and other.ident is None:
                other.start()
            time.sleep(1.0)
            handled.append((name, message.payload.number))
            if {number for _, number in handled} == set(range(AT_ONCE)):
                stop.set()

        return threading.Thread(target=Processor(log, orders, "g1", handle).run, args=(stop,))

    first, other = member("first"), member("second")
    first.start()
    stop.wait(120)
    stop.set()
    for thread in (first, other):
        thread.join(60)
    numbers = [number for _, number in handled]
    assert set(numbers) == set(range(AT_ONCE))
    assert len(numbers) <= AT_ONCE + 1, "at most the one at work when its partition moved comes twice"
    assert {name for name, _ in handled} == {"first", "second"}


def test_unknown_topics_are_named(log: Log) -> None:
    with pytest.raises(UnknownTopicError, match="nowhere"):
        log.produce("nowhere", b"x")
    with pytest.raises(UnknownTopicError, match="nowhere"):
        log.consumer("g1", ["nowhere"])


def test_making_a_topic_twice_changes_nothing(log: Log, topic: str) -> None:
    log.create_topic(topic, 7)
    assert log.topics()[topic] == 3


def test_an_empty_topic_gives_nothing(log: Log, topic: str) -> None:
    consumer = log.consumer("g1", [topic])
    assert drain(consumer) == []
    consumer.close()


@pytest.mark.parametrize(
    "url", ["embedded://", "http://x", "embedded:///x?fsync=never", "embedded:///x?keep_days=week", "embedded:///x?keep=7"]
)
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(LogUnavailableError, match="expected embedded:///DIR"):
        open_log(url)


def test_a_broker_that_is_not_there_is_named(free_port: int) -> None:
    with pytest.raises(LogUnavailableError, match=f"127.0.0.1:{free_port}"):
        open_log(f"kafka://127.0.0.1:{free_port}")


def test_a_record_that_the_brokers_do_not_take_is_no_outage(kafka: str) -> None:
    """Sent again it would be refused again."""
    log = open_log(f"kafka://{kafka}")
    name = f"t-{uuid.uuid4().hex[:8]}"
    log.create_topic(name, 1)
    with pytest.raises(PermanentError, match="larger than"):
        log.produce(name, b"x" * 3_000_000)
    log.produce(name, b"x")
    log.close()


def test_a_record_that_is_too_large_with_its_reason_is_a_dead_letter_without_its_bytes(kafka: str) -> None:
    log, orders = open_log(f"kafka://{kafka}"), Topic(f"t-{uuid.uuid4().hex[:8]}", Envelope, "id", partitions=1)
    orders.create(log)
    log.produce(orders.name, b"x" * 1_048_000, key="a", headers={"ce_id": b"7"})
    consumer = log.consumer("g1", [orders.name])
    (record,) = take(consumer, 1)
    send_to_dead_letters(log, orders, record, "why " * 400, 1)
    letters = log.consumer("g2", [orders.dead_letters])
    (letter,) = take(letters, 1)
    assert letter.value == b""
    assert letter.headers["dlq_error"].startswith(b"why")
    assert letter.headers["dlq_left_out"].startswith(f"1048000 bytes, which stand at {orders.name}/0/0".encode())
    for client in (consumer, letters, log):
        client.close()


def test_markers_and_records_that_a_transaction_took_back_do_not_wait_for_ever(kafka: str) -> None:
    """Behind a transaction stands its marker, which is no record: a station would say for ever that a frame waits."""
    from kafka import KafkaProducer

    log, topic = open_log(f"kafka://{kafka}"), f"t-{uuid.uuid4().hex[:8]}"
    log.create_topic(topic, 1)
    producer = KafkaProducer(bootstrap_servers=kafka, transactional_id=topic)
    producer.init_transactions()
    for settle, word in ((producer.commit_transaction, b"kept"), (producer.abort_transaction, b"gone")):
        producer.begin_transaction()
        for _ in range(3):
            producer.send(topic, word)
        producer.flush()
        settle()
    consumer = log.consumer("g1", [topic])
    records = take(consumer, 3)
    assert drain(consumer) == []
    assert [record.value for record in records] == [b"kept"] * 3
    assert log.lag("g1", topic)[0] == 8, "nothing is committed before its record is"
    consumer.commit(records[1])
    assert drain(consumer) == []
    assert log.lag("g1", topic)[0] == 6
    consumer.commit(records[2])
    assert drain(consumer) == []
    assert log.lag("g1", topic)[0] == 0
    log.produce(topic, b"next")
    assert [record.value for record in take(consumer, 1)] == [b"next"]
    for client in (consumer, producer, log):
        client.close()
