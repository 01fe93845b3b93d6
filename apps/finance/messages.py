"""What the finance app sends and receives: the four `finance.*` topics, v1."""

from __future__ import annotations

import msgspec

from pipelines import Topic


class TransactionMessage(msgspec.Struct, frozen=True):
    """A card transaction. `event_time` is RFC 3339; `amount_minor` counts cents."""

    transaction_id: str
    event_time: str
    customer_id: str
    terminal_id: str
    amount_minor: int
    currency: str = "EUR"


class LabelMessage(msgspec.Struct, frozen=True):
    """What a transaction turned out to be. `event_time` is when that became known."""

    transaction_id: str
    event_time: str
    fraud: bool
    source: str = "unknown"


class Reason(msgspec.Struct, frozen=True):
    """Why a score is what it is: a feature, its value, its share of the log-odds, and the same in words."""

    feature: str
    value: float
    contribution: float
    text: str


class DecisionMessage(msgspec.Struct, frozen=True):
    """The decision on one transaction. `decision` is "alert" or "pass"; `score` the probability of fraud."""

    transaction_id: str
    event_time: str
    customer_id: str
    terminal_id: str
    score: float
    decision: str
    threshold: float
    reasons: list[Reason]
    model: str
    feature_version: str
    scores: dict[str, float] = {}
    attention: list[float] = []


class AlertMessage(msgspec.Struct, frozen=True):
    """A transaction that an analyst should see."""

    transaction_id: str
    event_time: str
    customer_id: str
    terminal_id: str
    amount_minor: int
    currency: str
    score: float
    reasons: list[Reason]


TRANSACTIONS = Topic("finance.transactions", TransactionMessage, key="customer_id")
LABELS = Topic("finance.labels", LabelMessage, key="transaction_id", partitions=1)
"""One partition: labels stay in order, and the worker that owns it is the one that decides."""
DECISIONS = Topic("finance.decisions", DecisionMessage, key="transaction_id")
ALERTS = Topic("finance.alerts", AlertMessage, key="transaction_id")
TOPICS = (TRANSACTIONS, LABELS, DECISIONS, ALERTS)
