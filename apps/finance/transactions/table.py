"""Tables of transactions in the handbook's columns: read from CSV or parquet and checked."""

from __future__ import annotations

import codecs
import difflib
import gzip
import os
import zlib
from pathlib import Path

import polars as pl

from apps.finance.errors import InputError
from apps.finance.transactions import columns

REQUIRED = ("TRANSACTION_ID", "TX_DATETIME", "CUSTOMER_ID", "TERMINAL_ID", "TX_AMOUNT")
IDENTIFIERS = ("TRANSACTION_ID", "CUSTOMER_ID", "TERMINAL_ID")
LABEL, SCENARIO = "TX_FRAUD", "TX_FRAUD_SCENARIO"
LARGEST_MINOR = 1_000_000_000
"""An amount above ten million units is taken for a mistake."""
EARLIEST_YEAR, LATEST_YEAR = 1990, 2100
SEPARATORS = ",;\t|"
CSV_SUFFIXES, PARQUET_SUFFIXES = (".csv", ".csv.gz"), (".parquet", ".pq")


def read_transactions(path: Path, *, labelled: bool = False) -> pl.DataFrame:
    """The table at `path` (CSV or parquet) with the handbook's columns in their types, in order of time and id.

    Other columns are dropped. With `labelled`, TX_FRAUD must be there. Raises InputError for a file that can't
    be read, wrong columns (naming the nearest match), or rows that can't be (naming the first).
    """
    table = _read(path)
    needed = [*REQUIRED, *([LABEL] if labelled else [])]
    if missing := [name for name in needed if name not in table.columns]:
        raise InputError(f"{path.name} lacks {_hints(missing, table.columns)}; expected {', '.join(needed)}")
    written = table.select(*REQUIRED, *(name for name in (LABEL, SCENARIO) if name in table.columns))
    empty = written.select(pl.all_horizontal(pl.all().is_null()).reverse().arg_min()).item() if len(written) else 0
    written = written.head(len(written) - empty)
    if not len(written):
        raise InputError(f"{path.name} holds no transactions; expected a row for each below the columns' names")
    table = _typed(written, path)
    if bad := problems(table):
        row, column, why = bad[0]
        seen = "" if (value := written[row, column]) is None else f" ({str(value)[:60]!r})"
        raise InputError(
            f"{path.name}: {len(bad)} of {len(table)} rows can't be used, the first is row {row + 1}: {column} {why}{seen};"
            " correct or remove them"
        )
    return table.sort("TX_DATETIME", "TRANSACTION_ID", maintain_order=True)


def _read(path: Path) -> pl.DataFrame:
    name = path.name.lower()
    if not path.is_file():
        raise InputError(f"no file at {path}; expected a CSV or parquet file of transactions")
    try:
        if name.endswith(PARQUET_SUFFIXES):
            with path.open("rb") as file:  # Polars takes no name that is not UTF-8
                return pl.read_parquet(file)
        if name.endswith(CSV_SUFFIXES):
            separator = _separator(path)
            with path.open("rb") as file:
                return pl.read_csv(file, separator=separator, infer_schema=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path.name} can't be read: {' '.join(str(error).split())[:300]}; expected a CSV or parquet file") from error
    raise InputError(f"{path.name} has suffix {path.suffix!r}; expected {', '.join((*CSV_SUFFIXES, *PARQUET_SUFFIXES))}")


def _separator(path: Path) -> str:
    """What stands between the columns' names in a file's first line: spreadsheets write semicolons or tabs in some countries."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        head = file.readline(1 << 16)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path.name} is written in UTF-16; expected UTF-8 (in a spreadsheet: save as CSV UTF-8)")
    return max(SEPARATORS, key=lambda separator: head.count(separator.encode()))


def _hints(missing: list[str], present: list[str]) -> str:
    upper = {name.upper(): name for name in present}
    parts = []
    for name in missing:
        near = difflib.get_close_matches(name, upper, 1, 0.5)
        parts.append(f"column {name}" + (f" (nearest is {upper[near[0]]!r})" if near else ""))
    return ", ".join(parts)


def _typed(table: pl.DataFrame, path: Path) -> pl.DataFrame:
    try:
        return table.with_columns(
            *(columns.identifiers(table[name]) for name in IDENTIFIERS),
            columns.times(table["TX_DATETIME"]),
            columns.amounts(table["TX_AMOUNT"]),
            *(columns.flags(table[name]) for name in (LABEL,) if name in table.columns),
            *(table[name].cast(pl.Int8, strict=False) for name in (SCENARIO,) if name in table.columns),
        )
    except InputError as error:
        raise InputError(f"{path.name}: {error}") from error


def problems(table: pl.DataFrame) -> list[tuple[int, str, str]]:
    """What can't be a transaction: row (from 0), column, and what is wrong with it there."""
    amount, time = pl.col("TX_AMOUNT"), pl.col("TX_DATETIME")
    checks = [
        *((name, "is missing", pl.col(name).is_null()) for name in IDENTIFIERS),
        ("TX_DATETIME", "is missing or no date with time", time.is_null()),
        ("TX_AMOUNT", "is missing or no finite number", amount.is_null() | ~amount.is_finite()),
        ("TX_AMOUNT", "is negative", amount < 0),
        ("TX_AMOUNT", f"is above {LARGEST_MINOR // 100:,}", amount * 100 > LARGEST_MINOR),
        ("TX_DATETIME", f"is outside {EARLIEST_YEAR}-{LATEST_YEAR}", ~time.dt.year().is_between(EARLIEST_YEAR, LATEST_YEAR)),
        (
            "TRANSACTION_ID",
            "stands there before",
            pl.col("TRANSACTION_ID").is_not_null() & ~pl.col("TRANSACTION_ID").is_first_distinct(),
        ),
    ]
    if LABEL in table.columns:
        checks.append((LABEL, "is neither 0 nor 1", ~pl.col(LABEL).is_in([0, 1]) & pl.col(LABEL).is_not_null()))
    numbered = table.with_row_index("row")
    found: dict[int, tuple[str, str]] = {}
    for column, why, expression in checks:
        for row in numbered.filter(expression.fill_null(False))["row"].to_list():
            found.setdefault(int(row), (column, why))
    return [(row, column, why) for row, (column, why) in sorted(found.items())]


def written_as_csv(path: Path) -> bool:
    """Whether a table is written to `path` as CSV, or else as parquet, by its suffix. Raises InputError for another one."""
    name = path.name.lower()
    if not name.endswith((".csv", *PARQUET_SUFFIXES)):
        raise InputError(f"can't write {path.name}: its suffix is {path.suffix!r}; expected .csv or .parquet")
    return name.endswith(".csv")


def check_target(path: Path) -> None:
    """Raise InputError now where a table can't be written to `path` after the work is done."""
    written_as_csv(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"can't write {path}: expected a file in a folder that can be written to")


def write_table(table: pl.DataFrame, path: Path) -> None:
    """Write a table as CSV or parquet, as `written_as_csv`."""
    write = table.write_csv if written_as_csv(path) else table.write_parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        write(file)
