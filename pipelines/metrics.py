"""Prometheus metrics of the records that this process handles."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

OUTCOMES = HANDLED, RETRIED, DEAD = "handled", "retried", "dead"
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

records = Counter("triscope_records", "Records by outcome: handled, retried, dead (to the dead letters).", ("topic", "group", "outcome"))
handling_seconds = Histogram(
    "triscope_handling_seconds", "Time of one call of a topic's handler: a record, or a batch.", ("topic", "group"), buckets=SECONDS_BUCKETS
)
lag_records = Gauge("triscope_lag_records", "Records in the log that the group has not committed.", ("topic", "group"))
