"""The `triscope` command: each app adds its own sub-commands."""

from __future__ import annotations

import errno
import io
import logging
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Optional

import typer
from rich.table import Table

from apps.common.command_line import BAD_INPUT, answers, console, write_json
from apps.common.errors import TriscopeError
from apps.common.logs import configure_logs, redact
from apps.common.settings import load_settings
from apps.finance.cli import app as finance
from apps.finance.errors import FinanceError
from apps.industrial.cli import app as industrial
from apps.industrial.errors import IndustrialError
from apps.medical.cli import app as medical
from apps.medical.errors import MedicalError
from apps.model_cli import app as model_app
from pipelines.errors import PipelineError
from shared_runtime.errors import SharedRuntimeError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
pipeline_app = typer.Typer(no_args_is_help=True, help="The log: topics, lag.")
app.add_typer(medical, name="medical")
app.add_typer(finance, name="finance")
app.add_typer(industrial, name="industrial")
app.add_typer(model_app, name="model")
app.add_typer(pipeline_app, name="pipeline")
OF_FILES = (errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)
"""What goes wrong with a file or folder that the user named."""
Json = Annotated[Optional[str], typer.Option("--json", metavar="FILE", help="Write the result as JSON; - for standard output.")]


@app.callback()
def common(
    log_format: Annotated[Optional[str], typer.Option("--log-format", help="text or json.")] = None,
    log_level: Annotated[Optional[str], typer.Option("--log-level", help="debug, info, warning or error.")] = None,
) -> None:
    """Triscope: medical images, card transactions, inspected parts."""
    settings = load_settings().settings
    configure_logs(log_level or settings.log_level, log_format or settings.log_format)


@app.command()
def doctor(
    json: Json = None,
    settings: Annotated[bool, typer.Option("--settings", help="Print the settings and where each came from.")] = False,
) -> None:
    """What this machine has, what each backend lacks, which services answer."""
    from apps.common.doctor import examine, settings_rows, show

    loaded = load_settings()
    if settings:
        rows = settings_rows(loaded)
        table = Table("setting", "value", "from")
        for row in rows:
            table.add_row(row["name"], row["value"], row["origin"])
        answers(json).print(table)
        write_json({"settings": rows}, json)
        return
    findings = examine(loaded.settings)
    show(findings, answers(json))
    write_json(findings, json)


@app.command()
def demo(
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Run the apps without the pages.")] = False,
    port: Annotated[Optional[int], typer.Option(help="Port of the pages.")] = None,
    json: Json = None,
) -> None:
    """Every app at work on the samples that travel with Triscope, then the pages."""
    from apps.demo import run_demo

    run_demo(load_settings().settings, ui=not no_ui, port=port, report=console.print, publish=lambda summary: write_json(summary, json))


@app.command()
def bench(suite: Annotated[str, typer.Argument(help="A suite of benchmarks/run.py, such as optimise.")]) -> None:
    """Measure again what the docs state. Needs a checkout: benchmarks are not installed."""
    script = Path(__file__).parent.parent / "benchmarks" / "run.py"
    if not script.is_file():
        raise TriscopeError("benchmarks are part of a checkout and this is an installed package; clone the repository and run it there")
    known = subprocess.run([sys.executable, str(script), "--list"], capture_output=True, text=True, check=True).stdout.split()
    if suite not in known:
        raise TriscopeError(f"unknown suite {suite!r}; expected one of {', '.join(known)}")
    raise typer.Exit(subprocess.run([sys.executable, str(script), suite], check=False).returncode)


@pipeline_app.command("topics")
def pipeline_topics(
    apply: Annotated[bool, typer.Option("--apply", help="Make the topics that are missing.")] = False, json: Json = None
) -> None:
    """The topics of all apps, and whether the log has them."""
    from apps.topics import TOPICS
    from pipelines import open_log

    log = open_log(load_settings().settings.log_url)
    if apply:
        for topic in TOPICS:
            topic.create(log)
    present = log.topics()
    log.close()
    rows = [{"topic": n, "partitions": present.get(n, 0), "present": n in present} for t in TOPICS for n in (t.name, t.dead_letters)]
    out = answers(json)
    for row in rows:
        out.print(f"{row['topic']:28} {'partitions ' + str(row['partitions']) if row['present'] else 'missing'}")
    write_json({"topics": rows}, json)


@pipeline_app.command("lag")
def pipeline_lag(group: str, topic: str, json: Json = None) -> None:
    """Records of TOPIC that GROUP has not committed, by partition."""
    from pipelines import open_log

    log = open_log(load_settings().settings.log_url)
    lag = dict(log.lag(group, topic))
    log.close()
    answers(json).print(f"{group} on {topic}: {sum(lag.values())} waiting {lag}")
    write_json({"group": group, "topic": topic, "lag": lag, "total": sum(lag.values())}, json)


def _terminated(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    """Run the command; errors of input and usage become one line and exit code 2. SIGTERM leaves no temporary folder behind."""
    signal.signal(signal.SIGTERM, _terminated)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: a file's name may be no UTF-8
    try:
        app()
    except (TriscopeError, MedicalError, FinanceError, IndustrialError, PipelineError, SharedRuntimeError) as error:
        sys.stderr.write("triscope: " + redact(" ".join(str(error).split())) + "\n")
        sys.exit(BAD_INPUT)
    except OSError as error:
        if error.errno not in OF_FILES and not isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        logging.getLogger(__name__).debug("a file can't be used", exc_info=True)
        what = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
        sys.stderr.write("triscope: " + redact(what) + "\n")
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(130)
