"""The finance suites of `benchmarks/run.py`: features, protocol, stream, memory, budget.

`features`, `protocol` and `budget` need TRISCOPE_DATA_DIR with `fraud_handbook/transactions.parquet`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import psutil

from apps.common.settings import load_settings
from apps.finance.alerts.budget import ALERT, AlertBudget
from apps.finance.bootstrap import open_finance, open_scorer
from apps.finance.engine import Engine, Event
from apps.finance.evaluation.metrics import average_precision, card_precision
from apps.finance.evaluation.protocol import DELAY_DAYS, TEST_DAYS, TRAIN_DAYS, make_folds
from apps.finance.features.batch import batch_features
from apps.finance.features.schema import CUSTOMER, DAY, FEATURES, HANDBOOK, INDEX, LABEL_DELAY, TERMINAL
from apps.finance.features.sequence import LENGTH
from apps.finance.features.state import FeatureState, transaction_key
from apps.finance.messages import TransactionMessage
from apps.finance.scoring.combination import sigmoid
from apps.finance.service import parse_time
from apps.finance.training.boosting import BoostingRecipe, predict_margin, train_boosting
from apps.finance.training.prepared import Prepared
from apps.finance.training.train import Recipe, train_models
from apps.finance.transactions.generate import Generator, Population
from apps.finance.transactions.replay import replay_table
from apps.finance.transactions.table import read_transactions
from apps.finance.worker import run_worker

START = date(2018, 7, 25)
FOLDS, BUDGET = 3, 100
PUBLISHED = (
    ("XGBoost, best of the book [P]", ".869", ".687", ".303"),
    ("LSTM with attention [P]", ".874", ".667", ".295"),
    ("balanced bagging [P]", ".879", ".680", ".305"),
)


def handbook() -> Path:
    """The published transactions."""
    return Path(os.environ["TRISCOPE_DATA_DIR"]) / "fraud_handbook" / "transactions.parquet"


def features() -> dict[str, Any]:
    """All rows of the published table: largest difference of stream and batch, rows a second of both."""
    table = read_transactions(handbook(), labelled=True)
    begin = time.perf_counter()
    batch = batch_features(table)
    batch_seconds = time.perf_counter() - begin
    expected = batch.select(FEATURES).to_numpy()
    names = ("CUSTOMER_ID", "TERMINAL_ID", "TX_FRAUD", "TRANSACTION_ID")
    customers, terminals, frauds, ids = (batch[name].to_list() for name in names)
    times = batch["TX_DATETIME"].dt.epoch("us").to_list()
    amounts = (batch["TX_AMOUNT"] * 100).round().cast(pl.Int64).to_list()
    state, due, worst, seconds = FeatureState(), 0, np.zeros(len(FEATURES)), 0.0
    for low in range(0, len(times), 10_000):
        rows, begin = [], time.perf_counter()
        for i in range(low, min(low + 10_000, len(times))):
            while times[due] + LABEL_DELAY <= times[i] and due < i:
                state.label(times[due], terminals[due], transaction_key(ids[due]), bool(frauds[due]))
                due += 1
            rows.append(state.observe(times[i], customers[i], terminals[i], amounts[i], transaction_key(ids[i])))
        seconds += time.perf_counter() - begin
        worst = np.maximum(worst, np.abs(np.array(rows) - expected[low : low + len(rows)]).max(axis=0))
    of_protocol = float(worst[: len(HANDBOOK)].max())
    return {
        "rows": len(times),
        "features": len(FEATURES),
        "largest_difference_protocol": of_protocol,
        "largest_difference_all": float(worst.max()),
        "batch_rows_per_second": len(times) / batch_seconds,
        "stream_rows_per_second": len(times) / seconds,
    }


def protocol() -> dict[str, Any]:
    """`triscope finance evaluate` on three folds with 7 and with 60 days of training."""
    found = {}
    for days in (7, 60):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.json"
            options = ["--train-start", START.isoformat(), "--folds", str(FOLDS), "--train-days", str(days), "--json", str(out)]
            command = [str(Path(sys.executable).parent / "triscope"), "finance", "evaluate", "--transactions", str(handbook()), *options]
            begin = time.monotonic()
            subprocess.run(command, check=True, capture_output=True)
            found[str(days)] = {**json.loads(out.read_text()), "seconds": time.monotonic() - begin}
    return found


def stream() -> dict[str, Any]:
    """One worker over the embedded log: transactions a second and the split; then single transactions, one core."""
    table = pl.concat(Generator(Population(1000, 2000), date(2025, 1, 1), 0).days(20))
    rates = []
    with tempfile.TemporaryDirectory() as home:
        settings = load_settings({"TRISCOPE_HOME": home}).settings
        service, log = open_finance(settings)
        replay_table(table, log)
        service.scorer().boosting.plan, service.scorer().sequence.plan
        begin, cpu = time.perf_counter(), time.process_time()
        counts = run_worker(service, log, threading.Event(), until_idle=True).counts
        wall, used = time.perf_counter() - begin, time.process_time() - cpu
        rates.append(counts.handled / wall)
        split = {name: 1e6 * value / counts.handled for name, value in (service.engine().seconds | service.seconds).items()}
        service.close()
        log.close()
    return {"transactions": counts.handled, "per_second": rates[0], "cpu_share": used / wall, "split_us": split, "single": single()}


def single(number: int = 3000) -> dict[str, Any]:
    """One transaction at a time through decoding, features, both models, reasons and budget [us]."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    with tempfile.TemporaryDirectory() as home:
        scorer = open_scorer(load_settings({"TRISCOPE_HOME": home}).settings)
        engine = Engine(scorer, BUDGET)
        days = list(Generator(Population(1000, 2000), date(2025, 1, 1), 0).days(14))
        table = pl.concat(days).with_columns(pl.col("TX_DATETIME").dt.epoch("us").alias("us"))
        rows = table.select("TRANSACTION_ID", "us", "CUSTOMER_ID", "TERMINAL_ID", (pl.col("TX_AMOUNT") * 100).round().cast(pl.Int64)).rows()
        warm = [Event(str(i), us, str(c), str(t), a) for i, us, c, t, a in rows[:-number]]
        for low in range(0, len(warm), 256):
            engine.decide(warm[low : low + 256])
        times, decoded, before = [], [], dict(engine.seconds)
        for i, us, c, t, a in rows[-number:]:
            stamp = np.datetime64(us, "us").item().isoformat() + "Z"
            value = msgspec.json.encode(TransactionMessage(str(i), stamp, str(c), str(t), a))
            begin = time.perf_counter()
            m = msgspec.json.decode(value, type=TransactionMessage)
            decoded.append(1e6 * (time.perf_counter() - begin))
            engine.decide([Event(m.transaction_id, parse_time(m.event_time), m.customer_id, m.terminal_id, m.amount_minor)])
            times.append(1e6 * (time.perf_counter() - begin))
        split = {name: 1e6 * (value - before[name]) / number for name, value in engine.seconds.items()}
        row = np.zeros((1, len(FEATURES)), np.float32)
        boosting = [_timed(lambda: scorer.boosting.run({"features": row})) for _ in range(number)]
        sequence, mask = np.zeros((1, LENGTH, len(FEATURES)), np.float32), np.ones((1, LENGTH), np.float32)
        attention = [_timed(lambda: scorer.sequence.run({"sequence": sequence, "mask": mask})) for _ in range(number)]
        bare = scorer.boosting._prepared()[1]
        engine_only = [_timed(lambda: bare.run({"features": row})) for _ in range(number)]
        scorer.close()
    return {
        "p50_us": statistics.median(times),
        "p99_us": float(np.percentile(times, 99)),
        "mean_split_us": {"decode": statistics.mean(decoded), **split},
        "sequence_session_p50_us": statistics.median(attention),
        "boosting_session_p50_us": statistics.median(boosting),
        "boosting_engine_p50_us": statistics.median(engine_only),
    }


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - begin)


def memory(cards: int = 100_000) -> dict[str, Any]:
    """What the engine's state of `cards` cards takes after 40 days, in a process of its own [MB]."""
    code = f"from benchmarks.finance import fill; fill({cards})"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def _resident_mb() -> float:
    """Memory of this process, with what the allocator holds in reserve given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss / 2**20


def fill(cards: int) -> None:
    """Restore 40 days of `cards` cards into an engine and print what it took."""
    with tempfile.TemporaryDirectory() as home:
        engine = Engine(open_scorer(load_settings({"TRISCOPE_HOME": home}).settings), BUDGET)
        row = np.zeros(len(FEATURES))
        engine.restore(Event("x", 0, "x", "x", 1), row, 0.1, "pass")
        generator = Generator(Population(cards, 2 * cards), date(2025, 1, 1), 0)
        begin, number = _resident_mb(), 0
        for day in generator.days(40):
            columns = day.select(
                pl.col("TX_DATETIME").dt.epoch("us"), "CUSTOMER_ID", "TERMINAL_ID", (pl.col("TX_AMOUNT") * 100).cast(pl.Int64)
            )
            for us, c, t, a in columns.rows():
                engine.restore(Event(str(number), us, f"card-{c}", f"terminal-{t}", a), row, 0.01, "pass")
                number += 1
            del columns
        del generator, day
        used = _resident_mb() - begin
    print(json.dumps({"cards": cards, "transactions": number, "state_mb": used, "kb_per_card": 1024 * used / cards}))


def budget() -> dict[str, Any]:
    """Three folds replayed with a budget of 100 alerts a day: alerts each day, and CP@100 beside the offline figure."""
    data = Prepared(read_transactions(handbook(), labelled=True))
    folds = []
    for fold in make_folds(data.table, START, FOLDS):
        train = fold.train
        trained = train_models(data.features, data.rows[train], data.labels[train], data.customers[train], data.known[train], Recipe(), 2)
        zero = (fold.start - date(1970, 1, 1)).days + TRAIN_DAYS
        replayed = np.flatnonzero((data.days >= zero) & (data.days < zero + DELAY_DAYS + TEST_DAYS))
        score = sigmoid(trained.log_odds(data.features, data.rows[replayed])["combination"])
        folds.append({"fold": fold.number, **_hold(data, fold.test, replayed, score, zero)})
    online, offline = (float(np.mean([f[k] for f in folds])) for k in ("online", "offline"))
    return {"budget": BUDGET, "folds": folds, "online_card_precision": online, "offline_card_precision": offline, "ratio": online / offline}


def _hold(data: Prepared, test: np.ndarray, replayed: np.ndarray, score: np.ndarray, zero: int) -> dict[str, Any]:
    """Replay two weeks; on the test week only cards that the protocol keeps take part, and those found in it drop out the next day.

    The week of delay only shows the rule what scores look like: the offline figure knows nothing of alerts in it.
    """
    rule, kept = AlertBudget(BUDGET), set(test.tolist())
    times = data.table["TX_DATETIME"].dt.epoch("us").to_numpy()
    alerts: dict[int, list[int]] = {}
    last = -1
    for row, value in zip(replayed.tolist(), score.tolist(), strict=True):
        day = int(data.days[row])
        if day != last:
            for found in [r for r in alerts.get(last, []) if data.labels[r] and last >= zero + DELAY_DAYS]:
                rule.mark_compromised(data.customers[found].item(), day * DAY)
            last = day
        if day >= zero + DELAY_DAYS and row not in kept:
            continue
        if rule.decide(int(times[row]), data.customers[row].item(), value)[0] == ALERT:
            alerts.setdefault(day, []).append(row)
    days = range(zero + DELAY_DAYS, zero + DELAY_DAYS + TEST_DAYS)
    counts = [len(alerts.get(day, [])) for day in days]
    fraud_cards = [_fraud_cards(data, alerts.get(day, []), day, kept) for day in days]
    at = {row: i for i, row in enumerate(replayed.tolist())}
    table = data.table[test].with_columns(pl.Series("score", score[[at[row] for row in test.tolist()]]))
    return {"alerts_by_day": counts, "online": float(np.mean(fraud_cards)) / BUDGET, "offline": float(np.mean(card_precision(table)[0]))}


def _fraud_cards(data: Prepared, rows: list[int], day: int, kept: set[int]) -> int:
    """How many of a day's alerted cards are compromised that day, as card precision counts them."""
    today = np.flatnonzero((data.days == day) & (data.labels == 1))
    bad = {data.customers[row].item() for row in today.tolist() if row in kept}
    return sum(data.customers[row].item() in bad for row in rows)


GROUPS = {
    "this amount against them": ("AMOUNT_TO_MEDIAN", "AMOUNT_TO_UPPER_QUARTILE"),
    "the card's largest amounts lately": tuple(f"CUSTOMER_MAX_TO_MEDIAN_{days}DAY" for days in (1, 7, 14)),
    "the terminal's frauds, ordinary and high": ("TERMINAL_NB_ORDINARY_FRAUD", "TERMINAL_NB_HIGH_FRAUD"),
    "since the terminal's last fraud and genuine one": ("TERMINAL_DAYS_SINCE_FRAUD", "TERMINAL_DAYS_SINCE_GENUINE"),
    "the terminal's present run of frauds": ("TERMINAL_FRAUD_RUN", "TERMINAL_DAYS_SINCE_RUN_START"),
    "all of ours about the card": CUSTOMER,
    "all of ours about the terminal": TERMINAL,
}
SEEDS = (0, 1)


def ablation() -> dict[str, Any]:
    """The boosting with a group of our features left out: mean average precision of the three folds and two seeds, 7 days."""
    data = Prepared(read_transactions(handbook(), labelled=True))
    folds = make_folds(data.table, START, FOLDS)

    def measure(left_out: tuple[str, ...]) -> float:
        kept = [INDEX[name] for name in FEATURES if name not in left_out]
        values = []
        for fold in folds:
            train, test = (np.ascontiguousarray(data.features[rows][:, kept]) for rows in (fold.train, fold.test))
            for seed in SEEDS:
                booster = train_boosting(train, data.labels[fold.train], BoostingRecipe(seed=seed), 2)
                values.append(average_precision(data.labels[fold.test].astype(float), predict_margin(booster, test)))
        return float(np.mean(values))

    return {"all": measure(()), "without": {name: measure(group) for name, group in GROUPS.items()}}


SUITES: dict[str, Callable[[], dict[str, Any]]] = {
    "features": features,
    "protocol": protocol,
    "stream": stream,
    "memory": memory,
    "budget": budget,
    "ablation": ablation,
}
NEED_DATA = {"features", "protocol", "budget", "ablation"}


def report_lines(load: Callable[[str], dict[str, Any] | None], where: Callable[[dict[str, Any]], str]) -> list[str]:
    """The finance part of docs/benchmarks.md."""
    lines = [
        "# Finance",
        "",
        "All of this is on simulated cards. It proves nothing about real ones: on the book's own real data average precision is about 0.1.",
        "",
    ]
    if found := load("protocol"):
        lines += _protocol_lines(found)
    if found := load("ablation"):
        whole, without = found["result"]["all"], found["result"]["without"]
        lines += [
            "## What each group of our features adds",
            "",
            f"Average precision of the boosting alone, 7 days of training, mean of three folds and two seeds: {whole:.4f} with all. Changes below",
            "0.001 are within what another seed does.",
            "",
            "| left out | average precision | change |",
            "|---|---|---|",
            *(f"| {name} | {value:.4f} | {value - whole:+.4f} |" for name, value in sorted(without.items(), key=lambda item: item[1])),
            "",
        ]
    if found := load("features"):
        r = found["result"]
        lines += [
            "## Features: stream and batch",
            "",
            f"{r['rows']:,} published rows: the largest difference of stream and batch is {r['largest_difference_protocol']:.1e} over the protocol's",
            f"15 features and {r['largest_difference_all']:.1e} over all {r['features']}. The batch makes {r['batch_rows_per_second']:,.0f} rows/s, the stream",
            f"{r['stream_rows_per_second']:,.0f} (Python, one thread; {where(found)}).",
            "",
        ]
    if found := load("stream"):
        lines += _stream_lines(found, where)
    if found := load("memory"):
        r = found["result"]
        lines += [
            f"State of {r['cards']:,} cards after {r['transactions']:,} transactions in 40 days: {r['state_mb']:.0f} MB, {r['kb_per_card']:.1f} kB a card.",
            "",
        ]
    if found := load("budget"):
        r = found["result"]
        counts = [c for f in r["folds"] for c in f["alerts_by_day"]]
        lines += [
            "## Alert budget",
            "",
            f"Three test weeks replayed with {r['budget']} alerts a day: {min(counts)} to {max(counts)} alerts on each of {len(counts)} days; card precision",
            f"{r['online_card_precision']:.4f} while the threshold moves, {r['offline_card_precision']:.4f} offline with the whole day known: a ratio of {r['ratio']:.3f}.",
            "",
        ]
    return lines


def _protocol_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "## The published protocol",
        "",
        "`python benchmarks/run.py protocol`: folds whose training weeks start 2018-07-25, 08-01 and 08-08; means over the folds, 95 % intervals",
        "by drawing days. [P]: published, Le Borgne et al., on four folds of which these are three. CP@100 of perfect scores: "
        f"{found['result']['7']['metrics']['card_precision_at_100_ceiling']:.3f}.",
        "",
        "| | training | AUC ROC | average precision | CP@100 | Brier | AP amount / terminal / customer |",
        "|---|---|---|---|---|---|---|",
        *(f"| {n} | 7 days | {a} | {p} | {c} | | |" for n, a, p, c in PUBLISHED),
    ]
    names = {
        "protocol": "the protocol's 15 features, its hyper-parameters",
        "boosting": "our features, boosting",
        "sequence": "our features, sequence",
        "combination": "combination",
    }
    for days, result in found["result"].items():
        for key, name in names.items():
            row = result["table"][key]
            low, high = row["intervals"]["average_precision"]
            kinds = " / ".join(f"{row['average_precision_by_scenario'][k]:.3f}" for k in ("amount", "terminal", "customer"))
            lines += [
                f"| {name} | {days} days | {row['auc_roc']:.3f} | {row['average_precision']:.3f} ({low:.3f}-{high:.3f}) "
                f"| {row['card_precision_at_100']:.3f} | {row['brier']:.5f} | {kinds} |"
            ]
    lines += [
        "",
        "AP of a scenario counts its frauds against the genuine transactions alone. What the combination says and what came true (7 days):",
        "",
    ]
    lines += ["| score | transactions | mean score | fraud |", "|---|---|---|---|"]
    lines += [
        f"| {r['from']:.3f}-{r['to']:.3f} | {r['transactions']:,} | {r['mean_score']:.4f} | {r['fraud_share']:.4f} |"
        for r in found["result"]["7"]["reliability"]
    ]
    return [*lines, ""]


def _stream_lines(found: dict[str, Any], where: Callable[[dict[str, Any]], str]) -> list[str]:
    r = found["result"]
    one = r["single"]
    split = ", ".join(f"{k} {v:.0f}" for k, v in r["split_us"].items())
    alone = ", ".join(f"{k} {v:.0f}" for k, v in one["mean_split_us"].items())
    return [
        "## Stream",
        "",
        f"One worker, embedded log, every decision with exact TreeSHAP reasons, stored and published: {r['per_second']:,.0f} transactions/s",
        f"({r['transactions']:,} of them, {where(found)}). Microseconds a transaction: {split}.",
        "",
        f"One transaction at a time on one core: p50 {one['p50_us'] / 1000:.2f} ms, p99 {one['p99_us'] / 1000:.2f} ms (mean microseconds: {alone}).",
        f"The boosting alone: p50 {one['boosting_engine_p50_us']:.1f} us in its engine, {one['boosting_session_p50_us']:.1f} us with the runtime's checks;",
        f"the sequence model {one['sequence_session_p50_us']:.1f} us.",
        "",
    ]
