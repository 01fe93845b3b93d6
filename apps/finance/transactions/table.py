"""Tables of transactions in the handbook's columns: read from CSV or parquet and checked."""

from __future__ import annotations

import difflib
import gzip
import os
import zlib
from pathlib import Path

import polars as pl

from apps.finance.errors import InputError

REQUIRED = ("TRANSACTION_ID", "TX_DATETIME", "CUSTOMER_ID", "TERMINAL_ID", "TX_AMOUNT")
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
    kept = [*REQUIRED, *(name for name in (LABEL, SCENARIO) if name in table.columns)]
    table = _typed(table.select(kept), path)
    if bad := problems(table):
        row, why = bad[0]
        raise InputError(
            f"{path.name}: {len(bad)} of {len(table)} rows can't be used, the first is row {row + 1}: {why}; correct or remove them"
        )
    return table.sort("TX_DATETIME", "TRANSACTION_ID", maintain_order=True)


def _read(path: Path) -> pl.DataFrame:
    name = path.name.lower()
    if not path.is_file():
        raise InputError(f"no file at {path}; expected a CSV or parquet file of transactions")
    try:
        if name.endswith(PARQUET_SUFFIXES):
            return pl.read_parquet(path)
        if name.endswith(CSV_SUFFIXES):
            return pl.read_csv(path, separator=_separator(path), try_parse_dates=True, infer_schema_length=10_000)
    except (pl.exceptions.PolarsError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path.name} can't be read: {' '.join(str(error).split())[:300]}; expected a CSV or parquet file") from error
    raise InputError(f"{path.name} has suffix {path.suffix!r}; expected {', '.join((*CSV_SUFFIXES, *PARQUET_SUFFIXES))}")


def _separator(path: Path) -> str:
    """What stands between the columns' names in a file's first line: spreadsheets write semicolons or tabs in some countries."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        head = file.readline(1 << 16)
    return max(SEPARATORS, key=lambda separator: head.count(separator.encode()))


def _hints(missing: list[str], present: list[str]) -> str:
    upper = {name.upper(): name for name in present}
    parts = []
    for name in missing:
        near = difflib.get_close_matches(name, upper, 1, 0.5)
        parts.append(f"column {name}" + (f" (nearest is {upper[near[0]]!r})" if near else ""))
    return ", ".join(parts)


def _typed(table: pl.DataFrame, path: Path) -> pl.DataFrame:
    when = table.schema["TX_DATETIME"]
    if isinstance(when, pl.Datetime):
        time = pl.col("TX_DATETIME").dt.convert_time_zone("UTC").dt.replace_time_zone(None) if when.time_zone else pl.col("TX_DATETIME")
        time = time.cast(pl.Datetime("us"))
    elif when == pl.String:
        time = pl.col("TX_DATETIME").str.to_datetime(time_unit="us", strict=False)
    elif when == pl.Date:
        time = pl.col("TX_DATETIME").cast(pl.Datetime("us"))
    else:
        raise InputError(f"{path.name}: TX_DATETIME is {when}; expected dates with times, as 2018-04-01 00:00:31")
    columns = [time.alias("TX_DATETIME"), pl.col("TX_AMOUNT").cast(pl.Float64, strict=False)]
    columns += [pl.col(name).cast(pl.Int8, strict=False) for name in (LABEL, SCENARIO) if name in table.columns]
    return table.with_columns(columns)


def problems(table: pl.DataFrame) -> list[tuple[int, str]]:
    """Row numbers, from 0, of what can't be a transaction, each with the reason."""
    amount, time = pl.col("TX_AMOUNT"), pl.col("TX_DATETIME")
    checks = {
        "TRANSACTION_ID is missing": pl.col("TRANSACTION_ID").is_null(),
        "CUSTOMER_ID is missing": pl.col("CUSTOMER_ID").is_null(),
        "TERMINAL_ID is missing": pl.col("TERMINAL_ID").is_null(),
        "TX_DATETIME is missing or no date with time": time.is_null(),
        "TX_AMOUNT is missing or no finite number": amount.is_null() | ~amount.is_finite(),
        "TX_AMOUNT is negative": amount < 0,
        f"TX_AMOUNT is above {LARGEST_MINOR // 100:,}": amount * 100 > LARGEST_MINOR,
        f"TX_DATETIME is outside {EARLIEST_YEAR}-{LATEST_YEAR}": ~time.dt.year().is_between(EARLIEST_YEAR, LATEST_YEAR),
        "TRANSACTION_ID stands there before": pl.col("TRANSACTION_ID").is_not_null() & ~pl.col("TRANSACTION_ID").is_first_distinct(),
    }
    if LABEL in table.columns:
        checks["TX_FRAUD is neither 0 nor 1"] = ~pl.col(LABEL).is_in([0, 1]) & pl.col(LABEL).is_not_null()
    numbered = table.with_row_index("row")
    found: dict[int, str] = {}
    for why, expression in checks.items():
        for row in numbered.filter(expression.fill_null(False))["row"].to_list():
            found.setdefault(int(row), why)
    return sorted(found.items())


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
    write(path)
