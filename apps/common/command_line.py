"""Habits that every command shares: JSON to a file, progress on a terminal, errors as one line."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import msgspec
from rich.console import Console
from rich.progress import track

from apps.common.errors import UsageError
from pipelines.messages import printable
from pipelines.processor import Interrupted

T = TypeVar("T")
BAD_INPUT = 2
console = Console(stderr=True, highlight=False, soft_wrap=True)
"""What a command says of its work."""
PIPED_COLUMNS = 160


def answers(json: str | None) -> Console:
    """Where a command prints what it was asked for: standard output, or standard error where `json` ("-") goes there."""
    width = None if sys.stdout.isatty() else PIPED_COLUMNS
    return console if json == "-" else Console(highlight=False, soft_wrap=True, width=width)


def write_json(value: Any, destination: str | None) -> None:
    """Write `value` as JSON to a file, or to standard output for `-`; nothing for None."""
    if destination is None:
        return
    text = msgspec.json.format(msgspec.json.encode(_encodable(value)), indent=2).decode() + "\n"
    if destination == "-":
        sys.stdout.write(text)
    else:
        Path(destination).parent.mkdir(parents=True, exist_ok=True)
        Path(destination).write_text(text, encoding="utf-8")


def _encodable(value: Any) -> Any:
    """`value` with the names of files in it as `printable`."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_encodable(key): _encodable(each) for key, each in value.items()}
    return [_encodable(each) for each in value] if isinstance(value, (list, tuple)) else value


def learning_device(name: str) -> str:
    """`name`, where it says where to learn. Raises UsageError."""
    if name not in ("auto", "cuda", "cpu"):
        raise UsageError(f"--device is {name!r}; expected auto, cuda or cpu")
    return name


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """`items` with a progress bar where standard error is a terminal."""
    return track(items, description, total=total, console=console, disable=not console.is_terminal)


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; they also break into what the main thread is doing."""
    stop = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        if not stop.is_set():
            stop.set()
            raise Interrupted

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except Interrupted:
        return
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
