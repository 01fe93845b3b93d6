"""Tables of transactions: what is read, in which forms, and what is refused."""

from __future__ import annotations

import gzip
import os
import re
from datetime import datetime, time, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from apps.finance.errors import InputError
from apps.finance.transactions.table import problems, read_transactions, write_table

GOOD = {
    "TRANSACTION_ID": [1, 2],
    "TX_DATETIME": ["2025-01-01 10:00:00", "2025-01-01 09:00:00"],
    "CUSTOMER_ID": [1, 2],
    "TERMINAL_ID": [5, 6],
    "TX_AMOUNT": [10.5, 20.0],
    "TX_FRAUD": [0, 1],
}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_is_read_in_order_of_time(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"t.{suffix}"
    write_table(pl.DataFrame(GOOD), file)
    table = read_transactions(file, labelled=True)
    assert table["TRANSACTION_ID"].to_list() == [2, 1]
    assert table["TX_DATETIME"].dtype == pl.Datetime("us")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"TX_AMOUNT": None}, "lacks column TX_AMOUNT"),
        ({"TX_AMOUNT": None, "Tx_Amount_EUR": [1.0, 2.0]}, "nearest is 'Tx_Amount_EUR'"),
        ({"TX_FRAUD": None}, "lacks column TX_FRAUD"),
        ({"TX_AMOUNT": [10.0, -1.0]}, "row 2: TX_AMOUNT is negative"),
        ({"TX_AMOUNT": [float("nan"), 1.0]}, "row 1: TX_AMOUNT is missing or no finite number"),
        ({"TX_AMOUNT": ["ten", "2"]}, "row 1: TX_AMOUNT is missing or no finite number"),
        ({"TX_AMOUNT": [1e12, 1.0]}, "TX_AMOUNT is above"),
        ({"TRANSACTION_ID": [7, 7]}, "row 2: TRANSACTION_ID stands there before"),
        ({"TX_DATETIME": ["2025-01-01 10:00:00", "soon"]}, "row 2: TX_DATETIME is missing"),
        ({"TX_DATETIME": ["2025-01-01 10:00:00", "1825-01-01 10:00:00"]}, "row 2: TX_DATETIME is outside"),
        ({"TX_FRAUD": [0, 2]}, "row 2: TX_FRAUD is neither"),
        ({"TX_FRAUD": ["no", "perhaps"]}, "row 2: TX_FRAUD is neither 0 nor 1 ('perhaps')"),
        ({"TX_FRAUD": [0.5, 300.0]}, "2 of 2 rows can't be used, the first is row 1: TX_FRAUD is neither"),
        ({"CUSTOMER_ID": [None, 2]}, "row 1: CUSTOMER_ID is missing"),
        ({"CUSTOMER_ID": [[1], [2]]}, "CUSTOMER_ID is List"),
        ({"TX_AMOUNT": [[1.0], [2.0]]}, "TX_AMOUNT is List"),
        ({"TX_DATETIME": [timedelta(1), timedelta(2)]}, "TX_DATETIME"),
        ({"TX_DATETIME": [time(10), time(11)]}, "row 1: TX_DATETIME is missing or no date with time ('10:00:00')"),
        ({"TX_DATETIME": [None, None]}, "row 1: TX_DATETIME is missing"),
        ({"TX_DATETIME": [1522540831, 1522540832]}, "TX_DATETIME is Int64; expected dates"),
        ({"TX_DATETIME": ["04/01/2018 10:00", "03/02/2018 11:00"]}, "day and month can't be told apart (no number is above 12)"),
        ({"TX_DATETIME": ["14/01/2018 10:00", "03/22/2018 11:00"]}, "day and month can't be told apart (both orders occur)"),
    ],
)
def test_a_table_that_can_not_be_used_says_why(tmp_path: Path, change: dict[str, object], words: str) -> None:
    file = tmp_path / "t.parquet"
    pl.DataFrame({k: v for k, v in {**GOOD, **change}.items() if v is not None}).write_parquet(file)
    with pytest.raises(InputError, match=re.escape(words)):
        read_transactions(file, labelled=True)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_spreadsheets_separator_is_understood(tmp_path: Path, separator: str) -> None:
    text = pl.DataFrame(GOOD).write_csv(separator=separator)
    (tmp_path / "t.csv").write_text(text, encoding="utf-8-sig")
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    read = read_transactions(tmp_path / "t.csv")
    assert read["TX_AMOUNT"].to_list() == [20.0, 10.5]
    assert read.equals(read_transactions(tmp_path / "t.csv.gz"))
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode())[:-20])
    with pytest.raises(InputError, match="can't be read"):
        read_transactions(tmp_path / "t.csv.gz")


@pytest.mark.parametrize(
    ("column", "written", "read"),
    [
        ("TX_DATETIME", ("13.01.2025 10:00", "05.01.2025 09:00:01"), (datetime(2025, 1, 13, 10), datetime(2025, 1, 5, 9, 0, 1))),
        ("TX_DATETIME", ("1/13/2025 1:05:31 PM", "1/5/2025 12:00 AM"), (datetime(2025, 1, 13, 13, 5, 31), datetime(2025, 1, 5))),
        ("TX_DATETIME", ("13-01-2025 10:00", "5-1-2025 9:00"), (datetime(2025, 1, 13, 10), datetime(2025, 1, 5, 9))),
        (
            "TX_DATETIME",
            ("2025-01-13T10:00:00Z", "2025-01-05T09:00:00,5+02:00"),
            (datetime(2025, 1, 13, 10), datetime(2025, 1, 5, 7, 0, 0, 500000)),
        ),
        ("TX_DATETIME", ("2025/01/13 10:00 -0330", "2025-01-05"), (datetime(2025, 1, 13, 13, 30), datetime(2025, 1, 5))),
        ("TX_AMOUNT", ("1.234,5", "12,50"), (1234.5, 12.5)),
        ("TX_AMOUNT", ("12.345", "0.5"), (12.345, 0.5)),
        ("CUSTOMER_ID", ("007", "7"), ("007", "7")),
        ("CUSTOMER_ID", ("596.0", "7.0"), (596, 7)),
        ("CUSTOMER_ID", ("c-1", " c-2 "), ("c-1", "c-2")),
        ("TX_FRAUD", ("1.0", ""), (1, None)),
        ("TX_FRAUD", ("TRUE", "no"), (1, 0)),
    ],
)
def test_what_spreadsheets_and_tables_with_gaps_write_is_understood(
    tmp_path: Path, column: str, written: tuple[str, str], read: tuple[object, object]
) -> None:
    text = pl.DataFrame({**GOOD, column: list(written)}).write_csv(quote_style="necessary")
    (tmp_path / "t.csv").write_text(text + ",,,,,\n\n")
    table = read_transactions(tmp_path / "t.csv").sort("TRANSACTION_ID")
    assert tuple(table[column].to_list()) == read


def test_thousands_with_a_comma_are_no_decimals(tmp_path: Path) -> None:
    pl.DataFrame({**GOOD, "TX_AMOUNT": ["1,234.50", "12.50"]}).write_csv(tmp_path / "t.csv", separator="\t")
    with pytest.raises(InputError, match=re.escape("no finite number ('1,234.50')")):
        read_transactions(tmp_path / "t.csv")


def test_a_damaged_parquet_file_is_refused_whatever_its_reader_does(tmp_path: Path) -> None:
    whole = pl.DataFrame({name: np.resize(np.array(value), 300) for name, value in GOOD.items()})
    whole = whole.with_columns(pl.arange(300).alias("TRANSACTION_ID"))
    whole.write_parquet(tmp_path / "whole.parquet")
    generator, refused = np.random.default_rng(0), 0
    for _ in range(150):
        damaged = np.frombuffer((tmp_path / "whole.parquet").read_bytes(), np.uint8).copy()
        damaged[generator.integers(0, len(damaged), 3)] ^= generator.integers(1, 256, 3, dtype=np.uint8)
        damaged.tofile(tmp_path / "damaged.parquet")
        try:
            read_transactions(tmp_path / "damaged.parquet")
        except InputError:
            refused += 1
    assert refused > 30


def test_a_name_that_is_no_utf8_is_one_all_the_same(tmp_path: Path) -> None:
    """As a share has it that another system writes with names in Latin-1."""
    for suffix in ("csv", "parquet"):
        file = tmp_path / os.fsdecode(b"j\xe4nner." + suffix.encode())
        write_table(pl.DataFrame(GOOD), file)
        assert len(read_transactions(file)) == 2


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    (tmp_path / "x.xlsx").write_bytes(b"")
    (tmp_path / "wide.csv").write_bytes(pl.DataFrame(GOOD).write_csv().encode("utf-16"))
    pl.DataFrame(GOOD).clear().write_csv(tmp_path / "empty.csv")
    cases = {"x.parquet": "can't be read", "x.xlsx": "suffix", "none.csv": "no file", "wide.csv": "UTF-16", "empty.csv": "no transactions"}
    for name, words in cases.items():
        with pytest.raises(InputError, match=words):
            read_transactions(tmp_path / name)
    with pytest.raises(InputError, match="suffix"):
        write_table(pl.DataFrame(GOOD), tmp_path / "out.txt")
    assert problems(pl.DataFrame(GOOD).with_columns(pl.col("TX_DATETIME").str.to_datetime())) == []
