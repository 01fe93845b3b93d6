"""The stream of the finance app: through a log, both models and the store, with bad input, labels and faults."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
import sqlalchemy as sa

from apps.common.database import audit, open_database
from apps.common.settings import Settings
from apps.finance.bootstrap import open_finance, open_scorer
from apps.finance.engine import Event
from apps.finance.errors import InputError, ModelMismatchError, UnknownTransactionError
from apps.finance.features.schema import FEATURES, INDEX, VERSION
from apps.finance.messages import (
    ALERTS,
    DECISIONS,
    LABELS,
    TRANSACTIONS,
    AlertMessage,
    DecisionMessage,
    LabelMessage,
    TransactionMessage,
)
from apps.finance.service import FinanceService, score_table
from apps.finance.store import transactions as stored
from apps.finance.transactions.generate import Generator, Population
from apps.finance.transactions.replay import replay_table
from apps.finance.worker import GROUP, run_worker
from pipelines import Log, Outgoing, Record
from tests.conftest import Commands, eventually

MINUTE = "2025-03-01T12:{:02d}:00Z"


def records(log: Log, topic: str) -> list[Record]:
    """Everything in a topic."""
    consumer = log.consumer(f"reader-{time.monotonic()}", [topic])
    deadline = time.monotonic() + 40
    while not consumer.assignment():
        first = consumer.poll(0.2)
        assert time.monotonic() < deadline
        if first:
            break
    else:
        first = []
    while any(consumer.behind().values()):
        first += consumer.poll(0.5, 5000)
    consumer.close()
    return first


def decisions(log: Log) -> list[DecisionMessage]:
    return [msgspec.json.decode(r.value, type=DecisionMessage) for r in records(log, DECISIONS.name)]


def send(log: Log, *rows: dict[str, Any]) -> None:
    """Transactions as a stranger would send them: bare JSON."""
    for row in rows:
        log.produce(TRANSACTIONS.name, json.dumps(row).encode(), key=str(row.get("customer_id")))


def transaction(number: int, **changes: Any) -> dict[str, Any]:
    plain = {"customer_id": "c1", "terminal_id": "t1", "amount_minor": 2500, "currency": "EUR"}
    return {"transaction_id": f"tx{number}", "event_time": MINUTE.format(number), **plain, **changes}


@pytest.fixture(params=["embedded", "kafka"])
def finance(request: pytest.FixtureRequest, settings: Settings) -> Iterator[tuple[FinanceService, Log]]:
    if request.param == "kafka":
        address = f"kafka://{request.getfixturevalue('kafka')}"
        settings = msgspec.structs.replace(settings, log_url=address)
    service, log = open_finance(settings)
    if request.param == "kafka":  # the broker is shared by all tests: what others left is not ours
        run_worker(service, log, threading.Event(), until_idle=True)
    yield service, log
    service.close()
    log.close()


@pytest.fixture
def embedded(settings: Settings) -> Iterator[tuple[FinanceService, Log]]:
    service, log = open_finance(settings)
    yield service, log
    service.close()
    log.close()


def run(service: FinanceService, log: Log) -> Any:
    return run_worker(service, log, threading.Event(), until_idle=True).counts


def test_the_streams_scores_are_those_of_the_batch(embedded: tuple[FinanceService, Log], settings: Settings) -> None:
    """Labels, sequences, both models and the order of event time over four partitions: all agree, row by row."""
    service, log = embedded
    table = pl.concat(Generator(Population(60, 60), date(2025, 1, 1), 3).days(45))
    sent = replay_table(table, log)
    assert sent.transactions == len(table)
    assert run(service, log).handled == len(table)
    scorer = open_scorer(settings)
    offline = score_table(table, scorer)
    expected = dict(zip(offline["TRANSACTION_ID"].cast(pl.String), offline["score"], strict=True))
    found = decisions(log)
    assert Counter(d.transaction_id for d in found) == Counter(expected.keys()), "one decision a transaction"
    assert max(abs(d.score - expected[d.transaction_id]) for d in found) < 2e-6
    for decision in found[:: len(found) // 20]:
        assert len(decision.reasons) <= 4
        assert [r.contribution for r in decision.reasons] == sorted((r.contribution for r in decision.reasons), reverse=True)
        assert sum(decision.attention) == pytest.approx(1, abs=0.01)
        assert decision.feature_version == VERSION
    alerted = {d.transaction_id for d in found if d.decision == "alert"}
    assert {msgspec.json.decode(r.value, type=AlertMessage).transaction_id for r in records(log, ALERTS.name)} == alerted
    scorer.close()


def test_reasons_add_up_to_the_boostings_log_odds(embedded: tuple[FinanceService, Log]) -> None:
    service, _ = embedded
    generator = np.random.default_rng(0)
    features = generator.uniform(0, 50, (40, len(FEATURES))).astype(np.float32)
    explainer = service.scorer()._explainer
    shares = explainer.contributions(features)
    probability = service.scorer().boosting.run({"features": features})["probability"][:, 0].astype(float)
    base = np.log(probability / (1 - probability)) - shares.sum(axis=1)
    assert np.ptp(base) < 1e-3, "the rest is the same expected value for every row"
    with pytest.raises(ModelMismatchError, match="26 features, got 40"):
        explainer.contributions(np.zeros((40, 40), np.float32))


BAD = [
    ({"terminal_id": "t\0"}, "without the character NUL"),
    ({"amount_minor": -5}, "amount_minor is -5"),
    ({"amount_minor": 10**12}, "amount_minor is 1000000000000"),
    ({"amount_minor": 12.5}, "amount_minor"),
    ({"amount_minor": None}, "amount_minor"),
    ({"amount_minor": float("nan")}, "JSON is malformed"),
    ({"currency": "XXX"}, "currency is 'XXX'"),
    ({"event_time": "2199-01-01T00:00:00Z"}, "in the future"),
    ({"event_time": "1970-01-01T00:00:00Z"}, "before 1990"),
    ({"event_time": "2025-01-01T00:00:00Z"}, "days behind the stream"),
    ({"event_time": "yesterday"}, "expected RFC 3339"),
    ({"event_time": "2025-03-01T12:00:00"}, "no offset from UTC"),
    ({"customer_id": ""}, "customer_id has 0 characters"),
    ({"terminal_id": 5}, "terminal_id"),
]


def test_bad_transactions_are_dead_letters_and_the_rest_flows(finance: tuple[FinanceService, Log]) -> None:
    service, log = finance
    tag = f"{time.time():.6f}"
    card = {"customer_id": f"c{tag}"}
    dead = len(records(log, TRANSACTIONS.dead_letters))
    send(log, *(transaction(n, transaction_id=f"{tag}-{n}", **card) for n in range(10)))
    for number, (change, _) in enumerate(BAD):
        send(log, {**transaction(10, transaction_id=f"{tag}-bad{number}", **card), **change})
    missing = transaction(11, transaction_id=f"{tag}-missing", **card)
    del missing["terminal_id"]
    send(log, missing, transaction(12, transaction_id=f"{tag}-3", amount_minor=99, **card))
    log.produce(TRANSACTIONS.name, b'{"transaction_id": "x', key="c1")
    log.produce(TRANSACTIONS.name, b"\xff\xfe", key="c1")
    newer = json.dumps(transaction(13, transaction_id=f"{tag}-v9", **card)).encode()
    log.produce(TRANSACTIONS.name, newer, key="c1", headers={"ce_type": b"finance.transactions.v9"})
    send(log, transaction(20, transaction_id=f"{tag}-20", **card))
    run(service, log)
    mine = [d.transaction_id for d in decisions(log) if d.transaction_id.startswith(tag)]
    assert sorted(mine) == sorted([*(f"{tag}-{n}" for n in range(10)), f"{tag}-20"])
    letters = records(log, TRANSACTIONS.dead_letters)[dead:]
    reasons = [r.headers["dlq_error"].decode() for r in letters]
    expected = [*(words for _, words in BAD), "terminal_id", f"duplicate transaction_id '{tag}-3'", "truncated", "not a finance", "v9"]
    assert len(letters) == len(expected), reasons
    for words in expected:
        assert any(words in reason for reason in reasons), (words, reasons)
    assert newer in {r.value for r in letters}, "the bytes are kept"


def test_labels_may_come_late_twice_early_or_for_nothing(embedded: tuple[FinanceService, Log]) -> None:
    service, log = embedded
    send(log, transaction(1), transaction(2))
    LABELS.send(log, LabelMessage("tx3", "2025-03-02T00:00:00Z", True, "bank"), "test")
    run(service, log)
    for _ in range(2):
        LABELS.send(log, LabelMessage("tx1", "2025-03-20T00:00:00Z", True, "bank"), "test")
    LABELS.send(log, LabelMessage("nobody", "2025-03-20T00:00:00Z", True, "bank"), "test")
    log.produce(LABELS.name, b'{"transaction_id": "tx2", "event_time": "soon", "fraud": true}', key="tx2")
    send(log, transaction(3, customer_id="c2"))
    send(log, transaction(4, customer_id="c3", event_time="2025-03-09T13:00:00Z"))
    run(service, log)
    assert [service.store.get(f"tx{n}").fraud for n in (1, 2, 3)] == [True, None, True]
    features = np.frombuffer(service.store.get("tx4").transaction.features)
    assert features[INDEX["TERMINAL_ID_NB_TX_7DAY_WINDOW"]] == 3
    assert features[INDEX["TERMINAL_ID_RISK_7DAY_WINDOW"]] == pytest.approx(2 / 3), "an early and a late label, each once"
    LABELS.send(log, LabelMessage("tx1", "2025-03-01T00:00:00Z", False, "old news"), "test")
    LABELS.send(log, LabelMessage("tx1", "2199-03-01T00:00:00Z", False, "a clock that is wrong"), "test")
    run(service, log)
    assert service.store.get("tx1").fraud is True, "of two labels the later event wins"
    letters = [record.headers["dlq_error"].decode() for record in records(log, LABELS.dead_letters)]
    assert ["RFC 3339" in letters[0], "lies in the future" in letters[1]] == [True, True]


def test_a_crash_between_store_and_topic_publishes_each_decision_once(settings: Settings) -> None:
    service, log = open_finance(settings)
    send(log, *(transaction(n) for n in range(5)))
    run(service, log)
    send(log, *(transaction(n) for n in range(5, 9)))
    produce, calls = log.produce_many, []

    def crash(topic: str, rows: Any) -> None:
        calls.append(topic)
        if topic == DECISIONS.name and len(calls) > 1:
            produce(topic, rows[:2])
            raise KeyboardInterrupt
        produce(topic, rows)

    log.produce_many = crash  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(service, log)
    produce(DECISIONS.name, [Outgoing(b"not ours"), Outgoing(b"\xff"), Outgoing(b"[1]")])
    log.close()
    service, log = open_finance(settings)
    run(service, log)
    ours = [r for r in records(log, DECISIONS.name) if r.key]
    assert Counter(r.key for r in ours) == Counter(f"tx{n}" for n in range(9))
    assert service.store.unpublished() == []
    log.close()


def test_a_store_of_another_feature_version_goes_on(embedded: tuple[FinanceService, Log], settings: Settings) -> None:
    """After an upgrade the stored features are of no use: they are computed again, and the next scores are the same."""
    service, log = embedded
    table = pl.concat(Generator(Population(40, 40), date(2025, 1, 1), 3).days(38))
    replay_table(table, log)
    run(service, log)
    service.reset()
    newest = service.store.latest().event_us
    coming = [Event(f"new-{i}", newest + i * 60_000_000, str(i % 40), str(i % 40), 2500 + 700 * i) for i in range(1, 200)]
    expected = service.engine().decide(coming)
    engine = open_database(settings.database_url)
    with engine.begin() as connection:
        for key, detail in list(connection.execute(sa.select(stored.c.transaction_id, stored.c.detail))):
            old = {**msgspec.json.decode(detail), "feature_version": "1"}
            change = stored.update().where(stored.c.transaction_id == key)
            connection.execute(change.values(features=b"\0" * 8 * 40, detail=msgspec.json.encode(old)))
    upgraded, _ = open_finance(settings, log)
    found = upgraded.engine().decide(coming)
    assert [d.features.tolist() for d in found] == [pytest.approx(d.features.tolist(), abs=1e-9) for d in expected]
    assert [d.score for d in found] == pytest.approx([d.score for d in expected], abs=2e-6)
    assert len({round(d.score, 6) for d in found}) > 50
    upgraded.close()


def test_a_worker_killed_at_work_decides_nothing_twice_and_loses_nothing(commands: Commands, settings: Settings) -> None:
    service, log = open_finance(settings)
    table = pl.concat(Generator(Population(150, 100), date(2025, 1, 1), 6).days(20))
    replay_table(table, log)
    for wait in (0.4, 0.9, 0.2):
        process = commands.start("finance", "stream")
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert service.store.total() < len(table), "it was killed at work"
    process = commands.start("finance", "stream")
    eventually(lambda: sum(log.lag(GROUP, TRANSACTIONS.name).values()) == 0, timeout=120)
    code, seconds = commands.stop(process)
    assert (code, seconds < 5) == (0, True)
    found = Counter(d.transaction_id for d in decisions(log))
    assert set(found) == set(table["TRANSACTION_ID"].cast(pl.String))
    assert set(found.values()) == {1}
    scorer = open_scorer(settings)
    offline = score_table(table, scorer)
    expected = dict(zip(offline["TRANSACTION_ID"].cast(pl.String), offline["score"], strict=True))
    assert max(abs(d.score - expected[d.transaction_id]) for d in decisions(log)) < 2e-6, "the state came back"
    scorer.close()
    log.close()


def test_a_second_worker_stands_by_and_takes_over(commands: Commands, settings: Settings) -> None:
    service, log = open_finance(settings)
    first = commands.start("finance", "stream")
    second = commands.start("finance", "stream", until=None)
    send(log, *(transaction(n) for n in range(5)))
    eventually(lambda: service.store.total() == 5)
    commands.stop(first)
    send(log, *(transaction(n) for n in range(5, 8)))
    eventually(lambda: len(service.store.known([f"tx{n}" for n in range(8)])) == 8)
    assert commands.stop(second)[0] == 0
    assert Counter(d.transaction_id for d in decisions(log)) == Counter(f"tx{n}" for n in range(8))
    log.close()


def test_a_verdict_reaches_store_labels_and_audit(embedded: tuple[FinanceService, Log], settings: Settings) -> None:
    service, log = embedded
    send(log, transaction(1))
    run(service, log)
    service.judge("tx1", "unsure", "needs more history", "", "anna")
    assert records(log, LABELS.name) == []
    service.judge("tx1", "fraud", "customer denies it", "called at noon", "anna")
    run(service, log)
    case = service.store.get("tx1")
    assert (case.verdict, case.verdict_reason, case.note, case.fraud) == ("fraud", "customer denies it", "called at noon", True)
    (label,) = (msgspec.json.decode(r.value, type=LabelMessage) for r in records(log, LABELS.name))
    assert (label.transaction_id, label.fraud, label.source) == ("tx1", True, "analyst anna")
    with open_database(settings.database_url).connect() as connection:
        actions = [row.action for row in connection.execute(audit.select().where(audit.c.subject == "tx1"))]
    assert actions == ["verdict unsure", "verdict fraud"]
    with pytest.raises(InputError, match="reason for 'genuine'"):
        service.judge("tx1", "genuine", "because", "", "anna")
    with pytest.raises(InputError, match="verdict is 'maybe'"):
        service.judge("tx1", "maybe", "other", "", "anna")
    with pytest.raises(UnknownTransactionError):
        service.judge("tx77", "fraud", "other", "", "anna")


def test_the_analysts_budget_is_followed_by_a_running_worker(embedded: tuple[FinanceService, Log]) -> None:
    service, log = embedded
    service.set_budget(7, "anna")
    send(log, transaction(1))
    run(service, log)
    assert service.engine().budget.budget == 7
    service.store.set_budget(9, "anna")
    service.follow_budget()
    assert service.engine().budget.budget == 9
    with pytest.raises(InputError):
        service.set_budget(0, "anna")


def test_the_store_on_postgresql(postgres: str, settings: Settings) -> None:
    service, log = open_finance(msgspec.structs.replace(settings, database_url=postgres))
    send(log, *(transaction(n) for n in range(6)))
    LABELS.send(log, LabelMessage("tx2", "2025-03-08T13:00:00Z", True, "bank"), "test")
    run(service, log)
    LABELS.send(log, LabelMessage("tx2", "2025-03-09T13:00:00Z", False, "bank"), "test")
    service.judge("tx3", "genuine", "other", "note", "anna")
    service.set_budget(11, "anna")
    run(service, log)
    store = service.store
    assert store.total() == 6
    assert store.get("tx2").fraud is False
    assert store.get("tx3").verdict == "genuine"
    assert store.budget() == 11
    assert len(store.timeline(terminal="t1", until_us=2**60)) == 6
    assert store.unpublished() == []
    service.reset()
    send(log, transaction(7))
    assert run(service, log).handled == 1, "on with the restored state"
    seen = np.frombuffer(store.get("tx7").transaction.features)[INDEX["CUSTOMER_ID_NB_TX_1DAY_WINDOW"]]
    assert seen == 7
    service.close()
    log.close()


def test_no_card_number_is_logged(commands: Commands, settings: Settings) -> None:
    _, log = open_finance(settings)
    send(log, transaction(1, customer_id="4556737586899855"), transaction(2, customer_id="4556737586899855", amount_minor=-1))
    log.produce(TRANSACTIONS.name, b'{"transaction_id": "4556737586899855"', key="4556737586899855")
    process = commands.start("--log-format", "json", "--log-level", "debug", "finance", "stream")
    eventually(lambda: sum(log.lag(GROUP, TRANSACTIONS.name).values()) == 0)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    assert "4556737586899855" not in process.stderr.read()
    process.wait()
    log.close()


def test_history_is_scored_from_a_file(commands: Commands, tmp_path: Path) -> None:
    made = commands.run("finance", "generate", "--out", tmp_path / "cards.parquet", "--rows", "3000", "--days", "20", "--json", "-")
    assert made.returncode == 0, made.stderr
    answer = commands.run("finance", "score", tmp_path / "cards.parquet", "--out", tmp_path / "scores.csv", "--json", "-")
    assert answer.returncode == 0, answer.stderr
    scores = pl.read_csv(tmp_path / "scores.csv")
    assert scores.columns == ["TRANSACTION_ID", "score", "boosting", "sequence", "reasons"]
    assert len(scores) == json.loads(made.stdout)["transactions"] == json.loads(answer.stdout)["transactions"]
    assert scores["score"].is_between(0, 1).all()
    pl.read_parquet(tmp_path / "cards.parquet").rename({"TX_AMOUNT": "AMOUNT_TX"}).write_csv(tmp_path / "wrong.csv")
    answer = commands.run("finance", "score", tmp_path / "wrong.csv")
    assert answer.returncode == 2
    assert "lacks column TX_AMOUNT (nearest is 'AMOUNT_TX')" in answer.stderr


def test_evaluate_writes_the_documented_json_and_scores(commands: Commands, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from sklearn.metrics import average_precision_score

    commands.run("finance", "generate", "--out", tmp_path / "cards.parquet", "--rows", "70000", "--days", "56", "--seed", "2")
    arguments = ("--train-start", "2025-01-26", "--folds", "2", "--scores", tmp_path / "scores.parquet", "--json", tmp_path / "r.json")
    answer = commands.run("finance", "evaluate", "--transactions", tmp_path / "cards.parquet", *arguments, timeout=500)
    assert answer.returncode == 0, answer.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    for metric in ("average_precision", "card_precision_at_100", "auc_roc"):
        low, high = result["metrics"][f"{metric}_interval"]
        assert 0 <= low <= high <= 1
    assert {"host", "model", "table", "folds", "reliability"} <= set(result)
    scores = pl.read_parquet(tmp_path / "scores.parquet")
    assert scores.columns == ["TRANSACTION_ID", "fold", "score"]
    joined = scores.join(pl.read_parquet(tmp_path / "cards.parquet"), on="TRANSACTION_ID")
    again = [average_precision_score(part["TX_FRAUD"], part["score"]) for part in joined.partition_by("fold", maintain_order=True)]
    assert result["metrics"]["average_precision"] == pytest.approx(np.mean(again), abs=1e-9)
    assert result["metrics"]["average_precision"] > 0.3
    answer = commands.run("finance", "evaluate", "--transactions", tmp_path / "cards.parquet", "--train-start", "2025-03-01")
    assert answer.returncode == 2
    assert "the table holds labels of 2025-01-01" in answer.stderr


def test_models_trained_on_own_history_take_the_place_of_the_shipped_ones(commands: Commands, tmp_path: Path, settings: Settings) -> None:
    pytest.importorskip("onnxmltools")
    commands.run("finance", "generate", "--out", tmp_path / "cards.parquet", "--rows", "24000", "--days", "50", "--seed", "2")
    table = pl.read_parquet(tmp_path / "cards.parquet")
    late = pl.col("TX_DATETIME") >= datetime(2025, 2, 14)  # labels that are not known yet
    table.with_columns(pl.when(~late).then("TX_FRAUD").alias("TX_FRAUD")).write_parquet(tmp_path / "history.parquet")
    out = settings.home_path / "models"
    arguments = ("--transactions", tmp_path / "history.parquet", "--out", out, "--days", "14", "--folds", "1", "--json", "-")
    answer = commands.run("finance", "train", *arguments, timeout=500)
    assert answer.returncode == 0, answer.stderr
    assert {"protocol", "boosting", "sequence", "combination"} <= set(json.loads(answer.stdout)["table"])
    shipped, trained = open_scorer(msgspec.structs.replace(settings, home=str(tmp_path))), open_scorer(settings)
    assert shipped.boosting.model.sha256 != trained.boosting.model.sha256
    assert trained.boosting.model.card["data"]["name"] == "own transactions"
    assert trained.boosting.model.card["data"]["period"] == "2025-01-31 to 2025-02-13"
    scores = score_table(table, trained)
    assert scores["score"].is_between(0, 1).all()
    joined = table.join(scores, on="TRANSACTION_ID")
    assert joined.filter(pl.col("TX_FRAUD") == 1)["score"].mean() > 5 * joined.filter(pl.col("TX_FRAUD") == 0)["score"].mean()
    (out / "fraud-sequence" / "card.toml").write_text(
        (out / "fraud-sequence" / "card.toml").read_text().replace('version = "2"', 'version = "0"')
    )
    with pytest.raises(ModelMismatchError, match="features version '0'"):
        open_scorer(settings)
    for scorer in (shipped, trained):
        scorer.close()


def test_replay_sends_transactions_and_labels(commands: Commands, settings: Settings, tmp_path: Path) -> None:
    commands.run("finance", "generate", "--out", tmp_path / "cards.parquet", "--rows", "1000", "--days", "10")
    answer = commands.run("finance", "replay", tmp_path / "cards.parquet", "--shift", "--json", "-")
    assert answer.returncode == 0, answer.stderr
    sent = json.loads(answer.stdout)
    _, log = open_finance(settings)
    transactions = [msgspec.json.decode(r.value, type=TransactionMessage) for r in records(log, TRANSACTIONS.name)]
    labels = records(log, LABELS.name)
    assert (len(transactions), len(labels)) == (sent["transactions"], sent["labels"])
    assert 0 < len(labels) < len(transactions)
    newest = max(t.event_time for t in transactions)
    assert abs(time.time() - datetime.fromisoformat(newest).timestamp()) < 120
    log.close()
