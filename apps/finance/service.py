"""The use cases of the finance app: decide on transactions, take labels and verdicts in, score history."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import msgspec
import numpy as np
import polars as pl
from prometheus_client import Counter, Histogram

from apps.common.database import kept_text
from apps.finance.alerts.budget import ALERT, COMPROMISED_DAYS
from apps.finance.engine import Decided, Engine, Event
from apps.finance.errors import InputError
from apps.finance.features.batch import batch_features
from apps.finance.features.schema import DAY, FEATURES, SECOND, TERMINAL_SPAN, VERSION
from apps.finance.features.sequence import gather, sequence_rows
from apps.finance.messages import (
    ALERTS,
    DECISIONS,
    LABELS,
    AlertMessage,
    DecisionMessage,
    LabelMessage,
    TransactionMessage,
)
from apps.finance.scoring.scorer import FraudScorer
from apps.finance.store import FinanceStore, Transaction, storable
from apps.finance.transactions.event_time import rfc3339
from apps.finance.transactions.table import EARLIEST_YEAR, LARGEST_MINOR
from pipelines import Log, Message, Outgoing, PermanentError, PipelineError, Topic
from pipelines.errors import NOT_JSON
from pipelines.messages import check_text, child_traceparent, now_rfc3339, parse_rfc3339

logger = logging.getLogger(__name__)
SOURCE = "triscope/finance"
LATEST_DAYS, AHEAD_DAYS = 7, 1
"""A transaction may lie so far behind the stream, and so far ahead of this machine's clock."""
VERDICTS = ("fraud", "genuine", "unsure")
VERDICT_REASONS = {
    "fraud": ("customer denies it", "terminal compromised", "card stolen or copied", "pattern of known fraud", "other"),
    "genuine": ("customer confirms it", "usual for this card", "known merchant or trip", "model mistake", "other"),
    "unsure": ("customer not reached", "needs more history", "other"),
}
TAIL = 2000
SCORE_CHUNK = 4096
SCORED = pl.Schema({"score": pl.Float64, "boosting": pl.Float64, "sequence": pl.Float64, "reasons": pl.String})


class _Id(msgspec.Struct):
    transaction_id: str


decided_total = Counter("triscope_finance_decisions", "Transactions by decision.", ("decision",))
scores_seen = Histogram(
    "triscope_finance_score", "Scores of the transactions, 0 to 1.", buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
)


class _FeatureVersion(msgspec.Struct):
    feature_version: str = ""


class FinanceService:
    """The use cases over a log and a store. `open_scorer` is called once, when the first decision is due."""

    def __init__(self, log: Log, store: FinanceStore, open_scorer: Callable[[], FraudScorer], currencies: Sequence[str] = ("EUR",)) -> None:
        self._log, self.store, self._open_scorer = log, store, open_scorer
        self._currencies = frozenset(currencies)
        self._scorer: FraudScorer | None = None
        self._engine: Engine | None = None
        self._published: list[str] = []
        self._lock = threading.Lock()
        self.seconds: dict[str, float] = {"store": 0.0, "produce": 0.0, "check": 0.0}

    def scorer(self) -> FraudScorer:
        """Both models, opened once."""
        with self._lock:
            if self._scorer is None:
                self._scorer = self._open_scorer()
            return self._scorer

    def engine(self) -> Engine:
        """The deciding engine with its state as the store has it."""
        if self._engine is None:
            self._engine = self._restored(Engine(self.scorer(), self.store.budget()))
        return self._engine

    def reset(self) -> None:
        """Forget the state, which is restored from the store when it is next needed."""
        self.flush()
        self._engine = None

    def _restored(self, engine: Engine) -> Engine:
        latest, start, number = self.store.latest(), time.monotonic(), 0
        if latest is None:
            return engine
        newest = latest.event_us
        for row, fraud in self.store.history(newest - TERMINAL_SPAN - LATEST_DAYS * DAY):
            event = Event(row.transaction_id, row.event_us, row.customer_id, row.terminal_id, row.amount_minor, fraud)
            current = msgspec.json.decode(row.detail, type=_FeatureVersion).feature_version == VERSION
            engine.restore(event, np.frombuffer(row.features) if current else None, row.score, row.decision)
            number += 1
        for customer, known in self.store.compromised(newest - COMPROMISED_DAYS * DAY):
            engine.budget.mark_compromised(customer, known)
        logger.info("state restored", extra={"transactions": number, "seconds": round(time.monotonic() - start, 2)})
        return engine

    def recover(self) -> int:
        """Publish decisions that a process stored and may not have published before it ended; how many it had not."""
        rows = self.store.unpublished()
        if not rows:
            return 0
        decided, alerted = self._tail_ids(DECISIONS), self._tail_ids(ALERTS)
        missing = [row for row in rows if row.transaction_id not in decided]
        self._publish(missing, without_alert=alerted)
        self.store.add([], [row.transaction_id for row in rows])
        logger.info("recovered decisions", extra={"published": len(missing), "were_there": len(rows) - len(missing)})
        return len(missing)

    def _tail_ids(self, topic: Topic) -> set[str]:
        """Transactions among the last records of `topic`."""
        group = f"finance-recovery-{uuid.uuid4()}"
        consumer = self._log.consumer(group, [topic.name])
        try:
            deadline = time.monotonic() + 60
            while not consumer.assignment():
                consumer.poll(0.2)
                if time.monotonic() > deadline:
                    raise PipelineError(f"no partition of {topic.name!r} was assigned within 60 s; check the log")
            for partition, end in self._log.lag(group, topic.name).items():
                consumer.seek(topic.name, partition, max(0, end - TAIL))
            found: set[str] = set()
            while any(consumer.behind().values()):
                for record in consumer.poll(1.0, 1000):
                    with suppress(*NOT_JSON):  # another's record, which is none of ours
                        found.add(msgspec.json.decode(record.value, type=_Id).transaction_id)
            return found
        finally:
            consumer.close()

    def check(self, message: Message) -> Event:
        """The message as an event. Raises PermanentError for what no decision can be made on."""
        m = message.payload
        if not isinstance(m, TransactionMessage):
            raise PermanentError(f"expected a transaction, got {type(m).__name__}")
        for name in ("transaction_id", "customer_id", "terminal_id"):
            check_text(name, getattr(m, name), least=1)
        if not 0 <= m.amount_minor <= LARGEST_MINOR:
            raise PermanentError(f"amount_minor is {m.amount_minor}; expected 0 to {LARGEST_MINOR} minor units")
        if m.currency not in self._currencies:
            raise PermanentError(
                f"currency is {m.currency[:10]!r}; expected {', '.join(sorted(self._currencies))} (TRISCOPE_FINANCE_CURRENCIES)"
            )
        when = _not_ahead(m.event_time)
        clock = self.engine().clock.now
        if clock is not None and when < clock - LATEST_DAYS * DAY:
            raise PermanentError(
                f"event_time {m.event_time} lies more than {LATEST_DAYS} days behind the stream, which is at {rfc3339(clock)}; "
                "score old transactions with 'triscope finance score'"
            )
        return Event(m.transaction_id, when, m.customer_id, m.terminal_id, m.amount_minor)

    def process(self, messages: list[Message]) -> list[tuple[Message, str]]:
        """Decide on each transaction once: store, `finance.decisions`, `finance.alerts`. The refused ones with the reason.

        One that was decided already is not decided again: where the same record comes again it is passed over,
        where another record carries its identifier it is refused.
        """
        start = time.perf_counter()
        accepted, rejected = self._accept(messages)
        self.seconds["check"] += time.perf_counter() - start
        engine = self.engine()
        try:
            decided = engine.decide([event for _, event in accepted])
            rows = [self._row(message, event, d) for (message, event), d in zip(accepted, decided, strict=True)]
            start = time.perf_counter()
            self.store.add(rows, self._published)
        except BaseException:
            self._engine = None  # its state may hold what the store does not; it is restored from there
            raise
        self.seconds["store"] += time.perf_counter() - start
        self._published = []
        start = time.perf_counter()
        self._publish(rows)
        self._published = [row.transaction_id for row in rows]
        for row in rows:
            decided_total.labels(row.decision).inc()
            scores_seen.observe(row.score)
        self.seconds["produce"] += time.perf_counter() - start
        return rejected

    def flush(self) -> None:
        """Note that everything decided so far was published; call it when the stream pauses."""
        if self._published:
            self.store.add([], self._published)
            self._published = []

    def _accept(self, messages: list[Message]) -> tuple[list[tuple[Message, Event]], list[tuple[Message, str]]]:
        accepted: list[tuple[Message, Event]] = []
        rejected: list[tuple[Message, str]] = []
        for message in messages:
            try:
                accepted.append((message, self.check(message)))
                self.engine().clock.see(accepted[-1][1].time_us)
            except PermanentError as error:
                rejected.append((message, str(error)))
        ids = [event.transaction_id for _, event in accepted]
        known, labelled = self.store.known(ids), self.store.labels_of(ids)
        fresh: list[tuple[Message, Event]] = []
        places = dict(known)
        for message, event in accepted:
            place = (message.record.partition, message.record.offset)
            before = places.setdefault(event.transaction_id, place)
            if event.transaction_id in known and before == place:
                continue
            if before != place:
                where = f"partition {before[0]}, offset {before[1]}"
                rejected.append(
                    (message, f"duplicate transaction_id {event.transaction_id!r}: decided already ({where}); each needs its own")
                )
                continue
            if labelled.get(event.transaction_id, (False, 0))[0]:
                event = Event(event.transaction_id, event.time_us, event.customer_id, event.terminal_id, event.amount_minor, True)
            fresh.append((message, event))
        return fresh, rejected

    def _row(self, message: Message, event: Event, d: Decided) -> Transaction:
        m = message.payload
        assert isinstance(m, TransactionMessage)
        trace = child_traceparent(message.envelope.traceparent)
        threshold = storable(d.threshold)
        decision = DecisionMessage(
            event.transaction_id,
            m.event_time,
            event.customer_id,
            event.terminal_id,
            round(d.score, 6),
            d.decision,
            round(threshold, 6),
            d.reasons,
            self.scorer().name,
            VERSION,
            d.scores,
            d.attention,
        )
        return Transaction(
            transaction_id=event.transaction_id,
            event_us=event.time_us,
            customer_id=event.customer_id,
            terminal_id=event.terminal_id,
            amount_minor=event.amount_minor,
            currency=m.currency,
            features=d.features.tobytes(),
            score=d.score,
            decision=d.decision,
            threshold=threshold,
            detail=msgspec.json.encode(decision),
            traceparent=trace,
            part=message.record.partition,
            pos=message.record.offset,
        )

    def _publish(self, rows: Sequence[Transaction], without_alert: Iterable[str] = ()) -> None:
        known = set(without_alert)
        alerts = [
            ALERTS.outgoing(_alert(row), SOURCE, row.traceparent, f"alert-{row.transaction_id}")
            for row in rows
            if row.decision == ALERT and row.transaction_id not in known
        ]
        self._log.produce_many(ALERTS.name, alerts)
        self._log.produce_many(DECISIONS.name, [_outgoing(row) for row in rows])

    def apply_labels(self, messages: list[Message]) -> list[tuple[Message, str]]:
        """Take labels into store and state. One may come late, twice, or before its transaction."""
        rows: list[tuple[str, bool, int, str]] = []
        rejected: list[tuple[Message, str]] = []
        for message in messages:
            label = message.payload
            try:
                if not isinstance(label, LabelMessage):
                    raise PermanentError(f"expected a label, got {type(label).__name__}")
                check_text("transaction_id", label.transaction_id, least=1)
                when = _not_ahead(label.event_time)  # a later one could never correct it
                rows.append((label.transaction_id, label.fraud, when, kept_text(label.source)))
            except PermanentError as error:
                rejected.append((message, str(error)))
        changed = set(self.store.put_labels(rows))
        places = self.store.places(list(changed))
        latest = {row[0]: row for row in sorted(rows, key=lambda r: r[2])}
        for transaction_id, (time_us, terminal, customer) in places.items():
            _, fraud, known_us, _ = latest[transaction_id]
            self.engine().label(transaction_id, time_us, customer, terminal, fraud, max(known_us, time_us))
        return rejected

    def judge(self, transaction_id: str, verdict: str, reason: str, note: str, actor: str) -> None:
        """An analyst's verdict: store, audit log, and `finance.labels` where it says fraud or genuine.

        Raises InputError for an unknown verdict or reason, UnknownTransactionError.
        """
        if verdict not in VERDICTS:
            raise InputError(f"verdict is {verdict!r}; expected {', '.join(VERDICTS)}")
        if reason not in VERDICT_REASONS[verdict]:
            raise InputError(f"reason for {verdict!r} is {reason!r}; expected one of: {', '.join(VERDICT_REASONS[verdict])}")
        case = self.store.get(transaction_id)
        self.store.judge(transaction_id, verdict, reason, note[:2000], actor)
        if verdict != "unsure":
            LABELS.send(
                self._log,
                LabelMessage(transaction_id, now_rfc3339(), verdict == "fraud", f"analyst {actor}"),
                SOURCE,
                child_traceparent(case.transaction.traceparent),
            )

    def set_budget(self, budget: int, actor: str) -> None:
        """Change the alerts a day; a running worker follows within seconds."""
        if not 1 <= budget <= 1_000_000:
            raise InputError(f"the alert budget is {budget}; expected 1 to 1,000,000 alerts a day")
        self.store.set_budget(budget, actor)

    def follow_budget(self) -> None:
        """Take over a budget that the analyst changed."""
        self.engine().budget.change(self.store.budget())

    def close(self) -> None:
        """Note what was published and free the engines."""
        self.flush()
        if self._scorer is not None:
            self._scorer.close()


def score_table(
    transactions: pl.DataFrame, scorer: FraudScorer, watch: Callable[[Iterable[int]], Iterable[int]] = lambda parts: parts
) -> pl.DataFrame:
    """Scores and reasons of a table in the handbook's columns, in order of time and id."""
    table = batch_features(transactions)
    values = table.select(FEATURES).to_numpy()
    features, rows = values.astype(np.float32), sequence_rows(table)
    parts = []
    for start in watch(range(0, len(table), SCORE_CHUNK)):
        part = slice(start, start + SCORE_CHUNK)
        scores = scorer.score(features[part], *gather(features, rows[part]))
        reasons = ["; ".join(r.text for r in each) for each in scorer.reasons(features[part], values[part])]
        columns = pl.DataFrame(
            {"score": scores.probability, "boosting": scores.boosting, "sequence": scores.sequence, "reasons": reasons}, schema=SCORED
        )
        parts.append(pl.concat([table[part].select("TRANSACTION_ID"), columns], how="horizontal"))
    return pl.concat(parts) if parts else pl.concat([table.select("TRANSACTION_ID"), pl.DataFrame(schema=SCORED)], how="horizontal")


def parse_time(text: str) -> int:
    """RFC 3339 -> microseconds since the epoch. Raises PermanentError."""
    when = parse_rfc3339(text)
    if when.year < EARLIEST_YEAR:
        raise PermanentError(f"event_time {text[:40]!r} lies before {EARLIEST_YEAR}; check the sender's clock")
    return round(when.timestamp() * SECOND)


def _not_ahead(text: str) -> int:
    """As `parse_time`, of an event that has happened by this machine's clock."""
    when = parse_time(text)
    if when > time.time() * SECOND + AHEAD_DAYS * DAY:
        raise PermanentError(
            f"event_time {text[:40]} lies in the future; expected at most {AHEAD_DAYS} day ahead of now: check the sender's clock"
        )
    return when


def _alert(row: Transaction) -> AlertMessage:
    decision = row.message
    place = (decision.event_time, row.customer_id, row.terminal_id, row.amount_minor, row.currency)
    return AlertMessage(row.transaction_id, *place, decision.score, decision.reasons)


def _outgoing(row: Transaction) -> Outgoing:
    return DECISIONS.stored(row.detail, row.transaction_id, SOURCE, row.traceparent, f"decision-{row.transaction_id}")
