"""Magnetic tiles, and the industrial app's sessions, as its benchmarks use them."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import shared_runtime as rt
from apps.industrial.features import MODEL


def tile_folder() -> Path:
    """The data set."""
    return Path(os.environ["TRISCOPE_DATA_DIR"]) / "magnetic_tile"


def open_session(model: Path | None = None, threads: int | None = None) -> rt.Session:
    """The shipped network, or that in a folder, on the CPU."""
    return rt.Session(rt.load(MODEL if model is None else model), "cpu", threads=threads)


def tile_groups() -> dict[tuple[str, str], str]:
    """The physical tile of each photograph, by split and file."""
    with (tile_folder() / "groups.csv").open(newline="") as stream:
        return {(row["split"], row["file"]): row["tile_group"] for row in csv.DictReader(stream)}
