"""Files in folders that people and their systems put together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def visible(paths: Iterable[Path]) -> list[Path]:
    """`paths` sorted, without hidden ones: beside `a.png` a Mac leaves `._a.png`, a notebook `.ipynb_checkpoints`."""
    return sorted(path for path in paths if not path.name.startswith("."))
