"""The alert budget, the protocol, the metrics."""

from __future__ import annotations

from datetime import date, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from apps.finance.alerts.budget import ALERT, ATTACHED, KNOWN, PASS, AlertBudget
from apps.finance.errors import InputError
from apps.finance.evaluation.metrics import auc_roc, average_precision, brier, card_precision, day_bootstrap, reliability
from apps.finance.evaluation.protocol import make_folds
from apps.finance.features.schema import DAY, FEATURES, HOUR
from apps.finance.scoring.combination import Combination, logit, sigmoid
from apps.finance.scoring.reasons import reason_text


def run_days(budget: AlertBudget, days: int, cards: int, seed: int = 0, scale: float = 1.0) -> list[int]:
    """Alerts of each day when every card makes two transactions with scores of a heavy tail."""
    generator = np.random.default_rng(seed)
    counts = []
    for day in range(days):
        times = np.sort(generator.integers(0, DAY, 2 * cards))
        who, scores = generator.integers(0, cards, 2 * cards), np.clip(generator.beta(0.3, 8, 2 * cards) * scale, 0, 1)
        decisions = [budget.decide(day * DAY + int(t), int(c), float(s))[0] for t, c, s in zip(times, who, scores, strict=True)]
        counts.append(decisions.count(ALERT))
    return counts


@pytest.mark.parametrize("wanted", [20, 100, 300])
def test_the_budget_holds_within_a_tenth_on_every_day_after_the_first(wanted: int) -> None:
    counts = run_days(AlertBudget(wanted), 8, 4000)
    assert all(abs(count - wanted) <= 0.1 * wanted for count in counts[1:]), counts
    assert counts[0] <= 1.1 * wanted


def test_the_budget_holds_when_scores_drift() -> None:
    budget = AlertBudget(100)
    run_days(budget, 4, 3000)
    generator = np.random.default_rng(9)
    times = np.sort(generator.integers(0, DAY, 6000))
    scores = np.clip(generator.beta(0.3, 8, 6000) * 2, 0, 1)
    decisions = [budget.decide(4 * DAY + int(t), int(generator.integers(3000)), float(s))[0] for t, s in zip(times, scores, strict=True)]
    assert 90 <= decisions.count(ALERT) <= 110


def test_a_card_is_one_alert_a_day_and_a_compromised_one_is_none() -> None:
    budget = AlertBudget(10)
    assert budget.decide(0, "a", 0.9)[0] == ALERT
    assert budget.decide(HOUR, "a", 0.95)[0] == ATTACHED
    assert budget.decide(HOUR, "a", 0.01)[0] == PASS
    assert budget.decide(DAY, "a", 0.9)[0] == ALERT
    assert budget.alerts(DAY) == 1
    budget.mark_compromised("a", DAY + HOUR)
    assert budget.decide(2 * DAY, "a", 0.99)[0] == KNOWN
    assert budget.decide(40 * DAY, "a", 0.99)[0] == ALERT, "a new card's number may come back after a month"


def test_a_restored_budget_decides_as_the_one_that_ran_on() -> None:
    running, restored = AlertBudget(50), AlertBudget(50)
    generator = np.random.default_rng(2)
    events = [
        (int(t), int(c), float(s))
        for t, c, s in zip(
            np.sort(generator.integers(0, 4 * DAY, 8000)), generator.integers(0, 900, 8000), generator.beta(0.3, 6, 8000), strict=True
        )
    ]
    decided = [running.decide(*e)[0] for e in events[:6000]]
    for e, decision in zip(events[:6000], decided, strict=True):
        restored.restore(*e, decision)
    assert [running.decide(*e) for e in events[6000:]] == [restored.decide(*e) for e in events[6000:]]


def test_a_changed_budget_holds_the_same_day() -> None:
    budget = AlertBudget(100)
    run_days(budget, 3, 3000)
    budget.change(30)
    generator = np.random.default_rng(5)
    times = np.sort(generator.integers(0, DAY, 6000))
    decisions = [budget.decide(3 * DAY + int(t), int(generator.integers(3000)), float(generator.beta(0.3, 8)))[0] for t in times]
    assert 27 <= decisions.count(ALERT) <= 33


def labelled(days: int = 40, start: date = date(2025, 1, 1)) -> pl.DataFrame:
    """Forty cards with one transaction a day, of which about one a day is a fraud."""
    rows = [
        (datetime.combine(start, datetime.min.time()) + timedelta(days=day, minutes=card), card, int((day + 3 * card) % 37 == 0))
        for day in range(days)
        for card in range(40)
    ]
    return pl.DataFrame({"TX_DATETIME": [r[0] for r in rows], "CUSTOMER_ID": [r[1] for r in rows], "TX_FRAUD": [r[2] for r in rows]})


def test_folds_leave_out_who_is_known_as_compromised() -> None:
    table = labelled()
    (fold,) = make_folds(table, date(2025, 1, 3), 1)
    days = table["TX_DATETIME"].dt.date()
    assert sorted(set(days[fold.train])) == [date(2025, 1, 3) + timedelta(days=d) for d in range(7)]
    expected = set()
    for k in range(7):
        until = date(2025, 1, 3) + timedelta(days=6 + k)
        known = set(table.filter((days >= date(2025, 1, 3)) & (days <= until) & (pl.col("TX_FRAUD") == 1))["CUSTOMER_ID"])
        today = date(2025, 1, 3) + timedelta(days=14 + k)
        rows = table.with_row_index().filter((days == today) & ~pl.col("CUSTOMER_ID").is_in(list(known)))
        expected |= set(rows["index"])
    assert set(fold.test.tolist()) == expected
    assert 0 < len(fold.test) < 7 * 40


def test_longer_training_ends_with_the_same_week_and_tests_the_same_rows() -> None:
    table = labelled(60)
    short, long = (make_folds(table, date(2025, 2, 5), 1, days)[0] for days in (7, 30))
    assert long.test.tolist() == short.test.tolist()
    assert len(long.train) == 30 * 40
    assert long.train[-1] == short.train[-1]


def test_what_has_no_label_is_neither_learned_from_nor_tested_on() -> None:
    table = labelled()
    gap = pl.int_range(pl.len()) % 7 == 3
    gaps = table.with_columns(pl.when(gap).then(None).otherwise("TX_FRAUD").alias("TX_FRAUD"))
    (whole,), (some,) = make_folds(table, date(2025, 1, 3), 1), make_folds(gaps, date(2025, 1, 3), 1)
    assert some.train.tolist() == [row for row in whole.train if row % 7 != 3]
    assert len(some.test)
    assert not any(row % 7 == 3 for row in some.test)
    recent = table.with_columns(pl.when(pl.col("TX_DATETIME") < datetime(2025, 2, 1)).then("TX_FRAUD").alias("TX_FRAUD"))
    with pytest.raises(InputError, match="the table holds labels of 2025-01-01 to 2025-01-31"):
        make_folds(recent, date(2025, 1, 20), 1)
    with pytest.raises(InputError, match="no transactions with a label"):
        make_folds(table.with_columns(pl.lit(None).alias("TX_FRAUD")), date(2025, 1, 3), 1)


def test_folds_that_do_not_fit_say_what_is_there() -> None:
    with pytest.raises(InputError, match="the table holds labels of 2025-01-01 to 2025-02-09"):
        make_folds(labelled(), date(2025, 1, 20), 2)
    with pytest.raises(InputError, match="needs 2024-12-29"):
        make_folds(labelled(), date(2025, 1, 15), 1, 24)


def test_card_precision_against_a_day_worked_out_by_hand() -> None:
    table = pl.DataFrame(
        {
            "TX_DATETIME": [datetime(2025, 1, 1, h) for h in range(5)] + [datetime(2025, 1, 2, h) for h in range(4)],
            "CUSTOMER_ID": [1, 1, 2, 3, 4, 1, 2, 3, 4],
            "TX_FRAUD": [0, 1, 0, 1, 0, 1, 1, 0, 0],
            "score": [0.1, 0.9, 0.8, 0.2, 0.1, 0.99, 0.7, 0.6, 0.1],
        }
    )
    # Day 1: cards 1 and 2, one of them compromised. Day 2: card 1 is known; of 2 and 3 one is.
    assert card_precision(table, k=2) == ([0.5, 0.5], [1.0, 0.5])


def test_metrics_of_known_rankings() -> None:
    fraud = np.array([0, 0, 1, 1.0])
    assert auc_roc(fraud, np.array([0.1, 0.4, 0.35, 0.8])) == pytest.approx(0.75)
    assert average_precision(fraud, np.array([0.1, 0.4, 0.35, 0.8])) == pytest.approx(5 / 6)
    assert brier(fraud, np.array([0, 0, 1, 0.5])) == pytest.approx(0.0625)
    assert np.isnan(auc_roc(np.ones(3), np.ones(3)))
    rows = reliability(fraud, np.array([0.002, 0.002, 0.2, 0.95]))
    assert sum(r["transactions"] for r in rows) == 4
    assert rows[0]["fraud_share"] == 0
    low, high = day_bootstrap(np.repeat(np.arange(30), 4), lambda r: float(np.tile(fraud, 30)[r].mean()))
    assert low == high == 0.5


def test_log_odds_and_back() -> None:
    p = np.array([1e-6, 0.2, 0.5, 0.999])
    np.testing.assert_allclose(sigmoid(logit(p)), p, rtol=1e-9)
    assert Combination(1.0, 0.0, 0.0).probability(logit(p), np.zeros(4)) == pytest.approx(p)
    assert sigmoid(np.array([1e4, -1e4])).tolist() == [1.0, 0.0]


def test_every_feature_has_words() -> None:
    values = dict.fromkeys(FEATURES, 0.25) | {"TERMINAL_ID_NB_TX_7DAY_WINDOW": 8.0, "TERMINAL_ID_RISK_7DAY_WINDOW": 0.4}
    texts = [reason_text(name, values) for name in FEATURES]
    assert all(texts)
    assert len(set(texts)) > len(FEATURES) - 3
    assert reason_text("TERMINAL_ID_RISK_7DAY_WINDOW", values) == "terminal had 40% fraud among 8 transactions, 7 days up to a week ago"
    assert (
        reason_text("CUSTOMER_ID_NB_TX_1DAY_WINDOW", values | {"CUSTOMER_ID_NB_TX_1DAY_WINDOW": 1.0})
        == "card made 1 transaction within 1 day"
    )
    since = "TERMINAL_DAYS_SINCE_GENUINE"
    assert reason_text(since, values | {since: 60.0}) == "no transaction known as genuine at the terminal within the known month"
    assert reason_text(since, values | {since: 12.0}) == "a transaction known as genuine at the terminal 12 days ago"
