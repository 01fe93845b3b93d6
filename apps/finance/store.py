"""Transactions with their decisions, labels, verdicts and settings in the database. Nothing else of the app knows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from apps.common.database import metadata, write_audit
from apps.finance.alerts.budget import ALERT, DEFAULT_BUDGET
from apps.finance.errors import UnknownTransactionError
from apps.finance.messages import DecisionMessage
from pipelines.messages import now_rfc3339

transactions = sa.Table(
    "finance_transactions",
    metadata,
    sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("transaction_id", sa.String(200), nullable=False, unique=True),
    sa.Column("event_us", sa.BigInteger, nullable=False, index=True),
    sa.Column("customer_id", sa.String(200), nullable=False),
    sa.Column("terminal_id", sa.String(200), nullable=False),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.String(3), nullable=False),
    sa.Column("features", sa.LargeBinary, nullable=False),
    sa.Column("score", sa.Float, nullable=False),
    sa.Column("decision", sa.String(8), nullable=False),
    sa.Column("threshold", sa.Float, nullable=False),
    sa.Column("detail", sa.LargeBinary, nullable=False),
    sa.Column("traceparent", sa.String(64), nullable=False),
    sa.Column("published", sa.Boolean, nullable=False),
    sa.Column("part", sa.Integer, nullable=False),
    sa.Column("pos", sa.BigInteger, nullable=False),
)
labels = sa.Table(
    "finance_labels",
    metadata,
    sa.Column("transaction_id", sa.String(200), primary_key=True),
    sa.Column("fraud", sa.Boolean, nullable=False),
    sa.Column("event_us", sa.BigInteger, nullable=False),
    sa.Column("source", sa.String(200), nullable=False),
)
verdicts = sa.Table(
    "finance_verdicts",
    metadata,
    sa.Column("transaction_id", sa.String(200), primary_key=True),
    sa.Column("verdict", sa.String(16), nullable=False),
    sa.Column("reason", sa.String(100), nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("actor", sa.String(200), nullable=False),
    sa.Column("time", sa.String(32), nullable=False),
)
settings = sa.Table(
    "finance_settings", metadata, sa.Column("name", sa.String(64), primary_key=True), sa.Column("value", sa.JSON, nullable=False)
)
BUDGET = "alerts_a_day"
NOTHING = float("1e9")
"""Stands for an infinite threshold (the day's budget is spent), which not every database holds."""
CHUNK = 500


class Transaction(msgspec.Struct, frozen=True):
    """A row: a transaction and its decision. `detail` is the decision as JSON, `traceparent` the trace that it belongs to."""

    transaction_id: str
    event_us: int
    customer_id: str
    terminal_id: str
    amount_minor: int
    currency: str
    features: bytes
    score: float
    decision: str
    threshold: float
    detail: bytes
    traceparent: str
    part: int
    pos: int
    published: bool = False

    @property
    def message(self) -> DecisionMessage:
        """The decision."""
        return msgspec.json.decode(self.detail, type=DecisionMessage)


class Case(msgspec.Struct, frozen=True):
    """A transaction with what is known of it: its label and the analyst's verdict, where there are any."""

    transaction: Transaction
    fraud: bool | None
    verdict: str | None
    verdict_reason: str | None
    note: str | None


ROW = [transactions.c[field] for field in Transaction.__struct_fields__]


class FinanceStore:
    """The app's tables in one database."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def known(self, ids: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Which of `ids` were decided, and where in the log (partition, offset) each stood."""
        query = sa.select(transactions.c.transaction_id, transactions.c.part, transactions.c.pos)
        return {i: (part, pos) for i, part, pos in self._for_ids(query, transactions.c.transaction_id, ids)}

    def add(self, rows: Sequence[Transaction], published: Sequence[str] = ()) -> None:
        """Store decisions, and note in the same transaction that those of the ids `published` reached their topic."""
        with self._engine.begin() as connection:
            for part in _chunks(published):
                connection.execute(transactions.update().where(transactions.c.transaction_id.in_(part)).values(published=True))
            if rows:
                connection.execute(transactions.insert(), [msgspec.structs.asdict(row) for row in rows])

    def unpublished(self) -> list[Transaction]:
        """Decisions that may not have reached their topic, in order."""
        query = sa.select(*ROW).where(sa.not_(transactions.c.published)).order_by(transactions.c.sequence)
        with self._engine.connect() as connection:
            return [Transaction(*row) for row in connection.execute(query)]

    def history(self, since_us: int) -> Iterator[tuple[Transaction, bool]]:
        """Transactions from `since_us` on in order of event time, each with whether it is labelled as fraud."""
        query = (
            sa.select(*ROW, sa.func.coalesce(labels.c.fraud, sa.false()))
            .join(labels, labels.c.transaction_id == transactions.c.transaction_id, isouter=True)
            .where(transactions.c.event_us >= since_us)
            .order_by(transactions.c.event_us, transactions.c.sequence)
        )
        with self._engine.connect() as connection:
            for row in connection.execution_options(stream_results=True, yield_per=5000).execute(query):
                yield Transaction(*row[:-1]), bool(row[-1])

    def put_labels(self, rows: Iterable[tuple[str, bool, int, str]]) -> list[str]:
        """Store labels (id, fraud, event time [us], source); of two for one id the later event wins. The ids that changed."""
        latest: dict[str, tuple[str, bool, int, str]] = {}
        for row in rows:
            if row[0] not in latest or latest[row[0]][2] <= row[2]:
                latest[row[0]] = row
        with self._engine.begin() as connection:
            query = sa.select(labels.c.transaction_id, labels.c.fraud, labels.c.event_us)
            stored = {i: (fraud, at) for i, fraud, at in self._for_ids(query, labels.c.transaction_id, list(latest), connection)}
            changed = [r for r in latest.values() if r[0] not in stored or (stored[r[0]][1] <= r[2] and stored[r[0]] != (r[1], r[2]))]
            if changed:
                values = [dict(zip(("transaction_id", "fraud", "event_us", "source"), row, strict=True)) for row in changed]
                connection.execute(self._upsert(labels, "transaction_id", ("fraud", "event_us", "source")), values)
        return [row[0] for row in changed]

    def labels_of(self, ids: Sequence[str]) -> dict[str, tuple[bool, int]]:
        """Labels by id: fraud, event time [us]."""
        query = sa.select(labels.c.transaction_id, labels.c.fraud, labels.c.event_us)
        return {i: (bool(fraud), at) for i, fraud, at in self._for_ids(query, labels.c.transaction_id, ids)}

    def compromised(self, since_us: int) -> list[tuple[str, int]]:
        """Customers with a fraud label from `since_us` on, and when it became known [us]."""
        query = (
            sa.select(transactions.c.customer_id, sa.func.max(labels.c.event_us))
            .join(labels, labels.c.transaction_id == transactions.c.transaction_id)
            .where(labels.c.fraud, labels.c.event_us >= since_us)
            .group_by(transactions.c.customer_id)
        )
        with self._engine.connect() as connection:
            return [(customer, int(at)) for customer, at in connection.execute(query)]

    def places(self, ids: Sequence[str]) -> dict[str, tuple[int, str, str]]:
        """Of the decided ones among `ids`: event time [us], terminal, customer."""
        c = transactions.c
        query = sa.select(c.transaction_id, c.event_us, c.terminal_id, c.customer_id)
        return {i: (at, terminal, customer) for i, at, terminal, customer in self._for_ids(query, c.transaction_id, ids)}

    def get(self, transaction_id: str) -> Case:
        """One transaction. Raises UnknownTransactionError."""
        found = self._cases(self._case_query().where(transactions.c.transaction_id == transaction_id))
        if not found:
            raise UnknownTransactionError(f"no transaction {transaction_id!r} in the store")
        return found[0]

    def alerts(self, limit: int = 200, *, open_only: bool = False) -> list[Case]:
        """The newest alerts first."""
        query = self._case_query().where(transactions.c.decision == ALERT)
        if open_only:
            query = query.where(verdicts.c.verdict.is_(None))
        return self._cases(query.order_by(transactions.c.event_us.desc(), transactions.c.sequence.desc()).limit(limit))

    def timeline(self, *, customer: str | None = None, terminal: str | None = None, until_us: int, limit: int = 100) -> list[Case]:
        """A card's or a terminal's last transactions up to `until_us`, newest first."""
        column, value = (transactions.c.customer_id, customer) if customer is not None else (transactions.c.terminal_id, terminal)
        query = self._case_query().where(column == value, transactions.c.event_us <= until_us)
        return self._cases(query.order_by(transactions.c.event_us.desc(), transactions.c.sequence.desc()).limit(limit))

    def total(self) -> int:
        """How many transactions were decided (the last number that was given)."""
        with self._engine.connect() as connection:
            return int(connection.execute(sa.select(sa.func.max(transactions.c.sequence))).scalar_one_or_none() or 0)

    def latest(self) -> Transaction | None:
        """The transaction that was decided last."""
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(*ROW).order_by(transactions.c.sequence.desc()).limit(1)).one_or_none()
        return None if row is None else Transaction(*row)

    def alerts_between(self, since_us: int, until_us: int) -> int:
        """Alerts with event times in [since_us, until_us)."""
        inside = sa.and_(transactions.c.event_us >= since_us, transactions.c.event_us < until_us)
        query = sa.select(sa.func.count()).where(transactions.c.decision == ALERT, inside)
        with self._engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def recent_scores(self, limit: int = 5000) -> list[float]:
        """Scores of the transactions that were decided last."""
        query = sa.select(transactions.c.score).order_by(transactions.c.sequence.desc()).limit(limit)
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def matured(self, until_us: int, since_us: int) -> tuple[int, int]:
        """Alerts with event times in [since_us, until_us], and how many of them are labelled as fraud."""
        fraud = sa.func.sum(sa.case((labels.c.fraud, 1), else_=0))
        query = (
            sa.select(sa.func.count(), sa.func.coalesce(fraud, 0))
            .select_from(transactions.join(labels, labels.c.transaction_id == transactions.c.transaction_id, isouter=True))
            .where(transactions.c.decision == ALERT, transactions.c.event_us.between(since_us, until_us))
        )
        with self._engine.connect() as connection:
            alerts, frauds = connection.execute(query).one()
        return int(alerts), int(frauds)

    def alerts_by_day(self) -> list[tuple[int, int]]:
        """Alerts by day since the epoch."""
        day = (transactions.c.event_us // 86_400_000_000).label("day")
        query = sa.select(day, sa.func.count()).where(transactions.c.decision == ALERT).group_by(day).order_by(day)
        with self._engine.connect() as connection:
            return [(int(number), int(count)) for number, count in connection.execute(query)]

    def judge(self, transaction_id: str, verdict: str, reason: str, note: str, actor: str) -> None:
        """Record an analyst's verdict, with the audit log; a second one replaces the first, which the audit keeps."""
        self.get(transaction_id)
        values = {"verdict": verdict, "reason": reason, "note": note, "actor": actor, "time": now_rfc3339()}
        with self._engine.begin() as connection:
            statement = self._upsert(verdicts, "transaction_id", tuple(values))
            connection.execute(statement, [{"transaction_id": transaction_id, **values}])
            write_audit(connection, actor, f"verdict {verdict}", transaction_id, reason=reason, note=note)

    def budget(self) -> int:
        """Alerts a day."""
        with self._engine.connect() as connection:
            value = connection.execute(sa.select(settings.c.value).where(settings.c.name == BUDGET)).scalar_one_or_none()
        return DEFAULT_BUDGET if value is None else int(value)

    def set_budget(self, budget: int, actor: str) -> None:
        """Change the alerts a day, with the audit log."""
        with self._engine.begin() as connection:
            connection.execute(self._upsert(settings, "name", ("value",)), [{"name": BUDGET, "value": budget}])
            write_audit(connection, actor, "alert budget", BUDGET, budget=budget)

    def _case_query(self) -> sa.Select[Any]:
        joined = transactions.join(labels, labels.c.transaction_id == transactions.c.transaction_id, isouter=True)
        joined = joined.join(verdicts, verdicts.c.transaction_id == transactions.c.transaction_id, isouter=True)
        return sa.select(*ROW, labels.c.fraud, verdicts.c.verdict, verdicts.c.reason, verdicts.c.note).select_from(joined)

    def _cases(self, query: sa.Select[Any]) -> list[Case]:
        with self._engine.connect() as connection:
            return [Case(Transaction(*row[:-4]), *row[-4:]) for row in connection.execute(query)]

    def _for_ids(
        self, query: sa.Select[Any], column: sa.Column[Any], ids: Sequence[str], connection: sa.Connection | None = None
    ) -> list[Any]:
        if connection is None:
            with self._engine.connect() as own:
                return self._for_ids(query, column, ids, own)
        return [row for part in _chunks(ids) for row in connection.execute(query.where(column.in_(part)))]

    def _upsert(self, table: sa.Table, key: str, columns: Sequence[str]) -> Any:
        dialect = postgresql if self._engine.dialect.name == "postgresql" else sqlite
        statement = dialect.insert(table)
        return statement.on_conflict_do_update(index_elements=[key], set_={name: statement.excluded[name] for name in columns})


def _chunks(values: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), CHUNK):
        yield values[start : start + CHUNK]


def storable(threshold: float) -> float:
    """A threshold as the store keeps it."""
    return min(threshold, NOTHING)
