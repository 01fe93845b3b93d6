"""`triscope finance`: score, evaluate, train, stream, generate, replay, ui."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Optional

import msgspec
import typer
from rich.table import Table

from apps.common.command_line import answers, console, progress, stop_on_signals, write_json
from apps.common.errors import UsageError
from apps.common.settings import load_settings
from shared_runtime.host import host, usable_cores

app = typer.Typer(no_args_is_help=True, help="Card transactions: scores with reasons, alerts within a budget.")
Json = Annotated[Optional[str], typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for standard output.")]
Transactions = Annotated[Path, typer.Option("--transactions", metavar="FILE", help="CSV or parquet in the handbook's columns.")]


@app.command()
def score(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV or parquet in the handbook's columns.")],
    out: Annotated[Optional[Path], typer.Option("--out", metavar="FILE", help="CSV or parquet for scores and reasons.")] = None,
    json: Json = None,
) -> None:
    """Scores and reasons for a history of transactions."""
    from apps.finance.bootstrap import open_scorer
    from apps.finance.service import score_table
    from apps.finance.transactions.table import check_target, read_transactions, write_table

    target = out or file.with_name(f"{file.name.split('.')[0]}.scores.parquet")
    check_target(target)
    table = read_transactions(file)
    scorer = open_scorer(load_settings().settings)
    scores = score_table(table, scorer, lambda parts: progress(parts, "scoring", len(range(0, len(table), 4096))))
    scorer.close()
    write_table(scores, target)
    best = scores.sort("score", descending=True).head(5)
    for row in best.iter_rows(named=True):
        answers(json).print(f"{row['TRANSACTION_ID']!s:>14} {row['score']:.3f}  {row['reasons']}")
    console.print(f"{len(scores)} transactions scored; {target}")
    write_json({"transactions": len(scores), "out": str(target), "model": scorer.name, "highest": best.to_dicts()}, json)


def _show(result: dict[str, Any], json: str | None) -> None:
    table = Table("model", "AUC ROC", "average precision", "CP@100", "ceiling", "Brier", "AP amount / terminal / customer")
    for name, row in result["table"].items():
        scenarios = row.get("average_precision_by_scenario", {})
        kinds = " / ".join(f"{scenarios[k]:.3f}" if k in scenarios else "-" for k in ("amount", "terminal", "customer"))
        low, high = row["intervals"]["average_precision"]
        cells = [f"{row['auc_roc']:.3f}", f"{row['average_precision']:.3f} ({low:.3f}-{high:.3f})", f"{row['card_precision_at_100']:.3f}"]
        table.add_row(name, *cells, f"{row['card_precision_at_100_ceiling']:.3f}", f"{row['brier']:.5f}", kinds)
    answers(json).print(table)


def _evaluate(transactions: Path, start: date, folds: int, train_days: int) -> tuple[dict[str, Any], Any]:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UsageError(f"this command trains models and needs torch ({error}); install it with pip install 'triscope[train]'") from error
    from apps.finance.evaluation.evaluate import evaluate as run
    from apps.finance.transactions.table import read_transactions

    table = read_transactions(transactions, labelled=True)
    if without := table["TX_FRAUD"].null_count():
        console.print(f"{without} of {len(table)} transactions have no label; they are neither learned from nor tested on")
    threads = load_settings().settings.model_threads or usable_cores()
    return run(table, start, number=folds, train_days=train_days, threads=threads, watch=lambda parts: progress(parts, "folds", folds))


def _date(option: str, text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"{option} is {text!r}; expected a date as 2018-07-25") from error


@app.command()
def evaluate(
    transactions: Transactions,
    train_start: Annotated[str, typer.Option(metavar="DATE", help="First day of the first fold's training week.")],
    folds: Annotated[int, typer.Option(min=1, help="Folds, 7 days apart.")] = 1,
    train_days: Annotated[int, typer.Option(min=7, help="Days of training that end with the training week.")] = 7,
    scores: Annotated[Optional[Path], typer.Option(metavar="FILE", help="Parquet or CSV with TRANSACTION_ID, fold, score.")] = None,
    json: Json = None,
) -> None:
    """Train and test by the published protocol: AUC ROC, average precision, card precision@100, recall a scenario."""
    from apps.finance.features.schema import VERSION
    from apps.finance.transactions.table import check_target, write_table

    if scores is not None:
        check_target(scores)
    result, scored = _evaluate(transactions, _date("--train-start", train_start), folds, train_days)
    _show(result, json)
    if scores is not None:
        write_table(scored, scores)
    about = {"train_start": train_start, "folds": folds, "train_days": train_days, "transactions": transactions.name}
    model = {"name": "fraud-boosting + fraud-sequence, trained on each fold", "feature_version": VERSION}
    write_json({**result, "model": model, "protocol": about, "host": msgspec.to_builtins(host())}, json)


@app.command()
def train(
    transactions: Transactions,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the models.")],
    days: Annotated[int, typer.Option(min=7, help="Days of history to train on, up to the last label that is known.")] = 60,
    folds: Annotated[int, typer.Option(min=1, help="Folds of the evaluation, 7 days apart, the last ones of the history.")] = 3,
    name: Annotated[str, typer.Option(help="What the data is, for the card.")] = "own transactions",
    source: Annotated[str, typer.Option(help="Where the data comes from, for the card.")] = "not stated",
    json: Json = None,
) -> None:
    """Train both models on your own history, with the protocol's table for it. Needs the extra 'train'."""
    from apps.finance.retraining import train_and_write

    result = train_and_write(
        transactions, out, days=days, folds=folds, about={"name": name, "source": source}, evaluate=_evaluate, cores=usable_cores()
    )
    _show(result, json)
    console.print(f"models in {out}; copy them to TRISCOPE_HOME/models to use them by name")
    write_json({**result, "host": msgspec.to_builtins(host())}, json)


@app.command()
def stream() -> None:
    """One worker process in the foreground: finance.transactions -> finance.decisions, finance.alerts and store."""
    from apps.common.workers import reporting
    from apps.finance.bootstrap import open_finance
    from apps.finance.worker import REPORTS, run_worker

    settings = load_settings().settings
    with reporting(settings, REPORTS), stop_on_signals() as stop:
        service, log = open_finance(settings)
        run_worker(service, log, stop)
        service.close()
        log.close()


app.command(name="worker", hidden=True, help="The same as stream.")(stream)


@app.command()
def generate(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="CSV or parquet file.")],
    rows: Annotated[int, typer.Option(min=1, help="About so many transactions.")] = 100_000,
    days: Annotated[int, typer.Option(min=1)] = 90,
    start: Annotated[str, typer.Option(metavar="DATE")] = "2025-01-01",
    seed: int = 0,
    json: Json = None,
) -> None:
    """Make simulated card transactions with three kinds of fraud; the same seed makes the same file."""
    from apps.finance.transactions.generate import Population, write_days

    number = write_days(Population.for_rows(rows, days), _date("--start", start), days, seed, out)
    console.print(f"{number} transactions in {out}")
    write_json({"transactions": number, "out": str(out)}, json)


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV or parquet in the handbook's columns.")],
    speed: Annotated[float, typer.Option(min=0, help="Times real time; 0 for as fast as the log takes it.")] = 0.0,
    labels: Annotated[bool, typer.Option(help="Also send the labels, seven days after each transaction.")] = True,
    shift: Annotated[bool, typer.Option(help="Shift event times so that the last one is now.")] = False,
    json: Json = None,
) -> None:
    """Send a file's transactions, and their labels, to the log in the order of event time."""
    from apps.finance.bootstrap import open_finance
    from apps.finance.transactions.replay import replay_table
    from apps.finance.transactions.table import read_transactions

    table = read_transactions(file)
    service, log = open_finance(load_settings().settings)
    with stop_on_signals() as stop:
        sent = replay_table(table, log, speed=speed, with_labels=labels, shift=shift, stop=stop)
        console.print(f"{sent.transactions} transactions and {sent.labels} labels sent")
        write_json(msgspec.to_builtins(sent), json)
    service.close()
    log.close()


@app.command()
def ui(port: Annotated[Optional[int], typer.Option(help="Port of the pages.")] = None) -> None:
    """Serve the pages (all apps together)."""
    from apps.common.ui.server import serve_pages

    settings = load_settings().settings
    serve_pages(settings.ui_address, port or settings.ui_port)
