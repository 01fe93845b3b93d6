"""The handbook's columns as files write them -> the types that the features take. What can't be read becomes null.

Files differ: spreadsheets write 31.12.2024 or 12/31/2024 and 12,50; a column with gaps goes through floats (596.0); a card's
number may begin with zeros.
"""

from __future__ import annotations

import polars as pl

from apps.finance.errors import InputError

CLOCKS = (" %H:%M:%S%.f", " %H:%M", " %I:%M:%S %p", " %I:%M %p", "")
DAY_FIRST, MONTH_FIRST = ("%d/%m/%Y",), ("%m/%d/%Y",)
UNAMBIGUOUS = ("%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y")
EXPECTED_TIME = "expected dates with times, as 2018-04-01 00:00:31"
DECIMAL_COMMA = r"^-?(?:\d+|\d{1,3}(?:\.\d{3})+)(?:,\d{1,2})?$"
YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
NEITHER = -1
"""What `flags` gives for what is neither."""


def identifiers(column: pl.Series) -> pl.Series:
    """Identifiers as whole numbers where each is written as one (without leading zeros), as text otherwise."""
    if column.dtype.is_integer():
        return column
    text = _text(column)
    if text.str.contains(r"^\d+\.0$").all():
        text = text.str.strip_suffix(".0")
    whole = text.cast(pl.Int64, strict=False)
    return whole if whole.cast(pl.String).eq_missing(text).all() else text


def amounts(column: pl.Series) -> pl.Series:
    """Amounts as floats. 1.234,50 is read as such where all are written with a comma before the cents, or as whole numbers."""
    if column.dtype.is_numeric():
        return column.cast(pl.Float64)
    text = _text(column)
    if text.str.contains(",", literal=True).any() and text.str.contains(DECIMAL_COMMA).all():
        text = text.str.replace_all(".", "", literal=True).str.replace(",", ".", literal=True)
    return text.cast(pl.Float64, strict=False)


def flags(column: pl.Series) -> pl.Series:
    """0 or 1 from numbers, truth values or words; null where there is nothing, NEITHER for anything else."""
    text = _text(column).str.to_lowercase()
    known = pl.when(text.is_in(YES)).then(1).when(text.is_in(NO)).then(0).when(text.is_null()).then(None).otherwise(NEITHER)
    return pl.select(known.cast(pl.Int8).alias(column.name)).to_series()


def times(column: pl.Series) -> pl.Series:
    """Times in UTC, to the microsecond; one without an offset is in UTC. Raises InputError where day and month can't be told apart."""
    if isinstance(column.dtype, pl.Datetime) and column.dtype.time_zone:
        column = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    if isinstance(column.dtype, pl.Datetime) or column.dtype == pl.Date:
        return column.cast(pl.Datetime("us"))
    if column.dtype.is_numeric():
        raise InputError(f"{column.name} is {column.dtype}; {EXPECTED_TIME}")
    text = _text(column)
    plain = text.str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us", strict=False)
    return plain if plain.null_count() == text.null_count() else _written_times(text)


def _written_times(text: pl.Series) -> pl.Series:
    text = text.str.replace(r"^([\d/.-]{8,10})T", "${1} ").str.replace(r"\s*(?:Z|UTC)$", "+0000")
    text = text.str.replace(r"(:\d{2}),(\d+)", "${1}.${2}").str.replace(r"^(\d{1,2})-(\d{1,2})-(\d{4})", "${1}/${2}/${3}")
    offset = text.str.extract(r":\d{2}(?:\.\d+)?\s*([+-]\d{2}:?\d{2})$").str.replace(":", "", literal=True)
    local = text.str.replace(r"(:\d{2}(?:\.\d+)?)\s*[+-]\d{2}:?\d{2}$", "${1}")
    found = pl.Series(text.name, [None] * len(text), pl.Datetime("us"))
    for date in (*UNAMBIGUOUS, *_order(local)):
        for clock in CLOCKS:
            found = found.zip_with(found.is_not_null(), local.str.to_datetime(date + clock, time_unit="us", strict=False))
    minutes = offset.str.slice(1, 2).cast(pl.Int64) * 60 + offset.str.slice(3, 2).cast(pl.Int64)
    ahead = pl.when(offset.str.starts_with("-")).then(-minutes).otherwise(minutes).fill_null(0)
    return pl.select((found - pl.duration(minutes=ahead)).alias(text.name)).to_series()


def _order(local: pl.Series) -> tuple[str, ...]:
    """The format of dates such as 04/13/2018, told by the numbers above 12."""
    first, second = (local.str.extract(r"^(\d{1,2})/(\d{1,2})/\d{4}", group).cast(pl.Int64) for group in (1, 2))
    if first.null_count() == len(first):
        return ()
    day_first, month_first = bool((first > 12).any()), bool((second > 12).any())
    if day_first == month_first:
        example = local.filter(first.is_not_null())[0]
        raise InputError(
            f"{local.name} holds {example!r}, in which day and month can't be told apart"
            f" ({'both orders occur' if day_first else 'no number is above 12'}); {EXPECTED_TIME}"
        )
    return DAY_FIRST if day_first else MONTH_FIRST


def _text(column: pl.Series) -> pl.Series:
    """Any scalar column as text without blanks at its ends, null where nothing is left. Raises InputError for lists and the like."""
    if column.dtype.is_nested() or column.dtype == pl.Object:
        raise InputError(f"{column.name} is {column.dtype}; expected a number or text in each row")
    try:
        text = column.cast(pl.String, strict=False).str.strip_chars()
    except pl.exceptions.PolarsError as error:  # durations, say
        raise InputError(f"{column.name} is {column.dtype}; expected a number or text in each row") from error
    return text.set(text == "", None)
