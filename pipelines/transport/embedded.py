"""The embedded log: one SQLite file in WAL mode that any number of processes of one machine share.

Every append and commit is one SQLite transaction, so `kill -9` at any instant loses nothing that was
acknowledged; with `fsync=always` a power cut does not either. Partitions of a group are leased to its
members. A lease lapses when its holder misses its heartbeats, or at once when its process is gone.
"""

from __future__ import annotations

import itertools
import os
import socket
import sqlite3
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil

from pipelines.errors import ConsumerFencedError, LogUnavailableError, UnknownTopicError
from pipelines.patience import away
from pipelines.topics import DEAD_LETTER_SUFFIX
from pipelines.transport.base import Outgoing, Record

FILE = "log.sqlite"
SESSION_SECONDS, HEARTBEAT_SECONDS, POLL_SECONDS = 10.0, 2.0, 0.02
TRIM_SECONDS, TRIMMED, MOST_TRIMS = 60.0, 2000, 10
"""How often a process that appends looks for old records, how many it deletes in one transaction, and in how many of them."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS topics (name TEXT PRIMARY KEY, partitions INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (
  topic TEXT NOT NULL, part INTEGER NOT NULL, pos INTEGER NOT NULL, key TEXT, value BLOB NOT NULL,
  headers BLOB NOT NULL, time REAL NOT NULL, PRIMARY KEY (topic, part, pos));
CREATE TABLE IF NOT EXISTS offsets (
  grp TEXT NOT NULL, topic TEXT NOT NULL, part INTEGER NOT NULL, pos INTEGER NOT NULL,
  PRIMARY KEY (grp, topic, part)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS members (
  id TEXT PRIMARY KEY, grp TEXT NOT NULL, topics BLOB NOT NULL, process TEXT NOT NULL, expires REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases (
  grp TEXT NOT NULL, topic TEXT NOT NULL, part INTEGER NOT NULL, member TEXT NOT NULL,
  PRIMARY KEY (grp, topic, part)) WITHOUT ROWID;
"""

Partition = tuple[str, int]
Headers = dict[str, bytes]


def _process_identity() -> str:
    return f"{socket.gethostname()}/{os.getpid()}/{psutil.Process().create_time():.2f}"


def _gone(process: str) -> bool:
    """Whether a process of this machine has ended; one of another machine is judged by its heartbeat alone."""
    hostname, pid, created = process.rsplit("/", 2)
    if hostname != socket.gethostname():
        return False
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" != created
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


class EmbeddedLog:
    """A log in `folder`. `fsync`: "always" (each append survives a power cut) or "os" (survives a crash).

    `keep_days`: records are deleted after so many days, once every group that ever committed in their topic, or reads it, has committed
    them; of a topic that none ever read, by their age alone. Dead letters stay. Without `keep_days` everything does.
    """

    def __init__(self, folder: Path, *, fsync: str = "always", keep_days: float | None = None) -> None:
        self._file, self._fsync, self._keep_days = folder / FILE, fsync, keep_days
        self._trim_at = time.monotonic() + TRIM_SECONDS
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.transaction() as db:
                for statement in SCHEMA.split(";"):
                    db.execute(statement)
        except (OSError, sqlite3.Error, LogUnavailableError) as error:
            why = error.__cause__ or error
            raise LogUnavailableError(f"the embedded log {self._file} can't be opened: {why}; check the folder and its rights") from error

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """A connection for one piece of work. They are few and shared: threads come and go, files must not.

        Raises LogUnavailableError where the file can't be read or written now.
        """
        with self._lock:
            db = self._idle.pop() if self._idle else None
        try:
            if db is None:
                db = sqlite3.connect(self._file, timeout=60, isolation_level=None, check_same_thread=False)
                db.execute("PRAGMA journal_mode=WAL")
                db.execute(f"PRAGMA synchronous={'FULL' if self._fsync == 'always' else 'NORMAL'}")
            yield db
        except sqlite3.Error as error:
            if not away(error):
                raise
            if db is not None:
                db.close()
                db = None
            raise LogUnavailableError(f"the embedded log {self._file} does not answer: {error}; check its disk and rights") from error
        finally:
            self._keep(db)

    def _keep(self, db: sqlite3.Connection | None) -> None:
        if db is not None:
            with self._lock:
                if self._closed:
                    db.close()
                else:
                    self._idle.append(db)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: taken at once, committed at the end, rolled back on any error."""
        with self.connection() as db:
            try:
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, parameters: tuple[object, ...] = ()) -> list[Any]:
        with self.connection() as db:
            return db.execute(query, parameters).fetchall()

    def create_topic(self, name: str, partitions: int) -> None:
        if name in self.topics():
            return
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO topics VALUES (?, ?)", (name, partitions))

    def topics(self) -> Mapping[str, int]:
        return dict(self._rows("SELECT name, partitions FROM topics ORDER BY name"))

    def partitions(self, topic: str) -> int:
        """How many partitions `topic` has. Raises UnknownTopicError."""
        found = self._rows("SELECT partitions FROM topics WHERE name = ?", (topic,))
        if not found:
            known = ", ".join(self.topics()) or "none"
            raise UnknownTopicError(f"no topic {topic!r} in {self._file}; known: {known}; run 'triscope pipeline topics --apply'")
        return int(found[0][0])

    def produce(self, topic: str, value: bytes, *, key: str | None = None, headers: Mapping[str, bytes] | None = None) -> tuple[int, int]:
        return self._append(topic, [Outgoing(value, key, dict(headers or {}))])

    def produce_many(self, topic: str, records: Sequence[Outgoing]) -> None:
        if records:
            self._append(topic, records)

    def _append(self, topic: str, records: Sequence[Outgoing]) -> tuple[int, int]:
        """Append `records` in one transaction; where the last one stands."""
        count, now = self.partitions(topic), time.time()
        with self.transaction() as db:
            ends = [
                0 if last is None else int(last) + 1
                for (last,) in (
                    db.execute("SELECT MAX(pos) FROM records WHERE topic = ? AND part = ?", (topic, partition)).fetchone()
                    for partition in range(count)
                )
            ]
            rows = []
            for record in records:
                partition = (sum(ends) if record.key is None else zlib.crc32(record.key.encode())) % count
                packed = msgspec.msgpack.encode(record.headers)
                rows.append((topic, partition, ends[partition], record.key, bytes(record.value), packed, now))
                ends[partition] += 1
            db.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        if self._keep_days is not None and time.monotonic() >= self._trim_at:
            self._trim_at = time.monotonic() + TRIM_SECONDS
            with suppress(LogUnavailableError):
                self.trim(self._keep_days)
        return rows[-1][1], rows[-1][2]

    def trim(self, days: float) -> int:
        """Delete records that are older than `days`, as `keep_days` has it, up to MOST_TRIMS times TRIMMED; how many.

        The last of a partition stays: it says where the next one stands.
        """
        old, left, deleted = time.time() - 86_400 * days, MOST_TRIMS, 0
        for topic, count in self.topics().items():
            for partition in range(0 if topic.endswith(DEAD_LETTER_SUFFIX) else count):
                more = True
                while more and left:
                    number = self._trimmed(topic, partition, old)
                    left, deleted, more = left - (number > 0), deleted + number, number == TRIMMED
        return deleted

    def _trimmed(self, topic: str, partition: int, old: float) -> int:
        part = (topic, partition)
        with self.transaction() as db:
            groups = {group for (group,) in db.execute("SELECT DISTINCT grp FROM offsets WHERE topic = ?", (topic,))}
            members = db.execute("SELECT grp, topics FROM members").fetchall()
            groups |= {group for group, packed in members if topic in msgspec.msgpack.decode(packed)}
            done = dict(db.execute("SELECT grp, pos FROM offsets WHERE topic = ? AND part = ?", part).fetchall())
            (last,) = db.execute("SELECT MAX(pos) FROM records WHERE topic = ? AND part = ?", part).fetchone()
            end = min([last or 0, *(done.get(group, 0) for group in groups)])
            query = "SELECT pos, time FROM records WHERE topic = ? AND part = ? AND pos < ? ORDER BY pos LIMIT ?"
            rows = [pos for pos, at in itertools.takewhile(lambda row: row[1] < old, db.execute(query, (*part, end, TRIMMED)))]
            if rows:
                db.execute("DELETE FROM records WHERE topic = ? AND part = ? AND pos <= ?", (*part, rows[-1]))
        return len(rows)

    def consumer(self, group: str, topics: Sequence[str]) -> EmbeddedConsumer:
        for topic in topics:
            self.partitions(topic)
        return EmbeddedConsumer(self, group, tuple(topics))

    def lag(self, group: str, topic: str) -> Mapping[int, int]:
        return {partition: end - self.committed(group, topic, partition) for partition, end in self.ends(topic).items()}

    def ends(self, topic: str) -> dict[int, int]:
        """The offset that the next record of each partition will have."""
        query = "SELECT MAX(pos) FROM records WHERE topic = ? AND part = ?"
        last = {partition: self._rows(query, (topic, partition))[0][0] for partition in range(self.partitions(topic))}
        return {partition: 0 if at is None else int(at) + 1 for partition, at in last.items()}

    def committed(self, group: str, topic: str, partition: int) -> int:
        """The next offset that `group` has not committed."""
        found = self._rows("SELECT pos FROM offsets WHERE grp = ? AND topic = ? AND part = ?", (group, topic, partition))
        return int(found[0][0]) if found else 0

    def read(self, part: Partition, offset: int, limit: int) -> list[Record]:
        """Up to `limit` records of a partition from `offset` on."""
        query = "SELECT pos, key, value, headers, time FROM records WHERE topic = ? AND part = ? AND pos >= ? ORDER BY pos LIMIT ?"
        rows = self._rows(query, (*part, offset, limit))
        return [
            Record(part[0], part[1], pos, key, bytes(value), msgspec.msgpack.decode(headers, type=Headers), at)
            for pos, key, value, headers, at in rows
        ]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for db in self._idle:
                db.close()
            self._idle.clear()


class EmbeddedConsumer:
    """One member of a group; a thread of its own keeps its membership alive while a record is handled."""

    def __init__(self, log: EmbeddedLog, group: str, topics: tuple[str, ...]) -> None:
        self._log, self._group, self._topics = log, group, topics
        self._id = str(uuid.uuid4())
        self._process = _process_identity()
        self._position: dict[Partition, int] = {}
        self._owned: list[Partition] = []
        self._rebalance_at = 0.0
        self._stop = threading.Event()
        self._beat()
        self._heart = threading.Thread(target=self._heartbeats, name="log-heartbeat", daemon=True)
        self._heart.start()

    def _beat(self) -> None:
        row = (self._id, self._group, msgspec.msgpack.encode(self._topics), self._process, time.time() + SESSION_SECONDS)
        with self._log.transaction() as db:
            db.execute("INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?, ?)", row)

    def _heartbeats(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self._beat()
            except (sqlite3.Error, LogUnavailableError):
                if self._stop.is_set():
                    return
        # The next poll or commit of the owner meets whatever the file's trouble was.

    def _rebalance(self) -> None:
        """Drop dead members, give up what is not ours any more, take what is ours and free."""
        now = time.time()
        with self._log.transaction() as db:
            for member, process, expires in db.execute("SELECT id, process, expires FROM members WHERE grp = ?", (self._group,)).fetchall():
                if expires < now or _gone(process):
                    db.execute("DELETE FROM members WHERE id = ?", (member,))
            row = (self._id, self._group, msgspec.msgpack.encode(self._topics), self._process, now + SESSION_SECONDS)
            db.execute("INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?, ?)", row)
            db.execute("DELETE FROM leases WHERE member NOT IN (SELECT id FROM members)")
            members = db.execute("SELECT id, topics FROM members WHERE grp = ? ORDER BY id", (self._group,)).fetchall()
            leased = {(t, p): m for t, p, m in db.execute("SELECT topic, part, member FROM leases WHERE grp = ?", (self._group,))}
            owned = []
            for topic in self._topics:
                readers = [m for m, packed in members if topic in msgspec.msgpack.decode(packed)]
                for partition in range(self._log.partitions(topic)):
                    part, mine = (topic, partition), readers[partition % len(readers)] == self._id
                    holder = leased.get(part)
                    if mine and holder in (None, self._id):
                        db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)", (self._group, *part, self._id))
                        owned.append(part)
                    elif holder == self._id:
                        db.execute("DELETE FROM leases WHERE grp = ? AND topic = ? AND part = ?", (self._group, *part))
        self._position = {part: at for part, at in self._position.items() if part in owned}
        self._owned = sorted(owned)
        self._rebalance_at = time.monotonic() + (0.2 if len(owned) == 0 else 1.0)

    def poll(self, timeout: float = 1.0, max_records: int = 100) -> list[Record]:
        deadline = time.monotonic() + timeout
        while True:
            if time.monotonic() >= self._rebalance_at:
                self._rebalance()
            found: list[Record] = []
            for parts, part in zip(range(len(self._owned), 0, -1), self._owned, strict=True):
                at = self._position.get(part)
                if at is None:
                    at = self._log.committed(self._group, *part)
                records = self._log.read(part, at, max(1, (max_records - len(found)) // parts))
                self._position[part] = records[-1].offset + 1 if records else at
                found += records
                if len(found) >= max_records:
                    break
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            time.sleep(min(POLL_SECONDS, left))

    def commit(self, record: Record) -> None:
        with self._log.transaction() as db:
            query = "SELECT member FROM leases WHERE grp = ? AND topic = ? AND part = ?"
            holder = db.execute(query, (self._group, record.topic, record.partition)).fetchone()
            if holder is None or holder[0] != self._id:
                raise ConsumerFencedError(
                    f"{record.topic}-{record.partition} belongs to another member of {self._group!r}; its records come again there"
                )
            db.execute(
                "INSERT OR REPLACE INTO offsets VALUES (?, ?, ?, ?)",
                (self._group, record.topic, record.partition, record.offset + 1),
            )

    def seek(self, topic: str, partition: int, offset: int) -> None:
        if (topic, partition) not in self._owned:
            raise ConsumerFencedError(f"{topic}-{partition} is not owned by this member of {self._group!r}; poll until it is")
        self._position[(topic, partition)] = offset

    def behind(self) -> Mapping[Partition, int]:
        ends = {topic: self._log.ends(topic) for topic in {name for name, _ in self._owned}}
        read = {part: self._position[part] if part in self._position else self._log.committed(self._group, *part) for part in self._owned}
        return {part: ends[part[0]][part[1]] - at for part, at in read.items()}

    def assignment(self) -> Sequence[Partition]:
        return tuple(self._owned)

    def close(self) -> None:
        self._stop.set()
        self._heart.join(timeout=5)
        with suppress(LogUnavailableError), self._log.transaction() as db:  # what is not given back lapses
            db.execute("DELETE FROM leases WHERE member = ?", (self._id,))
            db.execute("DELETE FROM members WHERE id = ?", (self._id,))
