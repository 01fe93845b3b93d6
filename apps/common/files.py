"""Files in folders that people and their systems put together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def hidden(path: Path) -> bool:
    """Whether a file or folder is one that systems leave beside others: beside `a.png` a Mac leaves `._a.png`, a notebook
    `.ipynb_checkpoints`."""
    return path.name.startswith(".")


def visible(paths: Iterable[Path]) -> list[Path]:
    """`paths` sorted, without hidden ones."""
    return sorted(path for path in paths if not hidden(path))
