"""Features: the stream equals the batch, labels keep their seven days, windows end where the protocol says."""

from __future__ import annotations

import tracemalloc
from datetime import date, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.finance.errors import InputError
from apps.finance.features.batch import batch_features
from apps.finance.features.schema import DAY, FEATURES, HANDBOOK, INDEX, LABEL_DELAY, SECOND
from apps.finance.features.sequence import LENGTH, SequenceState, gather, sequence_rows
from apps.finance.features.state import FeatureState, transaction_key
from apps.finance.transactions.generate import Generator, Population, write_days
from apps.finance.transactions.table import read_transactions


def stream_features(table: pl.DataFrame) -> np.ndarray:
    """What the stream says, each label arriving exactly seven days after its transaction."""
    state, rows = FeatureState(), []
    columns = ("CUSTOMER_ID", "TERMINAL_ID", "TX_FRAUD", "TRANSACTION_ID")
    times = table["TX_DATETIME"].dt.epoch("us").to_list()
    customers, terminals, frauds, ids = (table[name].to_list() for name in columns)
    amounts = (table["TX_AMOUNT"] * 100).round().cast(pl.Int64).to_list()
    due = 0
    for i, now in enumerate(times):
        while times[due] + LABEL_DELAY <= now and due < i:
            state.label(times[due], terminals[due], transaction_key(ids[due]), bool(frauds[due]))
            due += 1
        rows.append(state.observe(now, customers[i], terminals[i], amounts[i], transaction_key(ids[i])))
    return np.array(rows)


def difference(table: pl.DataFrame) -> float:
    batch = batch_features(table)
    return float(np.abs(batch.select(FEATURES).to_numpy() - stream_features(batch)).max())


def test_stream_equals_batch_on_generated_transactions() -> None:
    table = pl.concat(Generator(Population(60, 40), date(2025, 1, 1), 3).days(75))
    assert len(table) > 5000
    assert table["TX_FRAUD"].sum() > 20
    assert difference(table) <= 1e-9


def test_stream_equals_batch_on_the_published_transactions(data_dir: Path) -> None:
    table = read_transactions(data_dir / "fraud_handbook" / "transactions.parquet", labelled=True)
    some = table.filter(pl.col("CUSTOMER_ID") % 40 == 7)
    assert len(some) > 30_000
    assert difference(some) <= 1e-9


event = st.tuples(st.integers(0, 50 * 24 * 4), st.integers(0, 2), st.integers(0, 2), st.integers(0, 30_000), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.lists(event, min_size=1, max_size=80))
def test_stream_equals_batch_whatever_comes(events: list[tuple[int, int, int, int, bool]]) -> None:
    """Ties, window edges (times are multiples of a quarter of an hour), zero amounts, single transactions."""
    zero = datetime(2025, 3, 1)
    table = pl.DataFrame(
        {
            "TRANSACTION_ID": range(len(events)),
            "TX_DATETIME": [datetime.fromtimestamp(zero.timestamp() + 900 * e[0]) for e in events],
            "CUSTOMER_ID": [e[1] for e in events],
            "TERMINAL_ID": [e[2] for e in events],
            "TX_AMOUNT": [e[3] / 100 for e in events],
            "TX_FRAUD": [int(e[4]) for e in events],
        }
    )
    assert difference(table) <= 1e-9


def test_a_card_with_very_many_transactions_takes_no_more_memory_than_others() -> None:
    """A table with a column for each transaction of its longest window would be 3 GB here."""
    number, random = 20_000, np.random.default_rng(0)
    zero = np.datetime64("2025-01-01", "us")
    table = pl.DataFrame(
        {
            "TRANSACTION_ID": range(number),
            "TX_DATETIME": zero + np.sort(random.integers(0, 29 * 86_400, number)).astype("timedelta64[s]"),
            "CUSTOMER_ID": np.zeros(number, int),
            "TERMINAL_ID": random.integers(0, 5, number),
            "TX_AMOUNT": random.gamma(2, 20, number).round(2),
            "TX_FRAUD": np.zeros(number, int),
        }
    )
    tracemalloc.start()
    batch = batch_features(table)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    last, before = batch["TX_AMOUNT"][-1], np.sort(table["TX_AMOUNT"].to_numpy()[:-1])
    assert batch["AMOUNT_TO_MEDIAN"][-1] == pytest.approx(last / before[(number - 2) // 2])
    assert difference(table.head(1500)) <= 1e-9


def test_the_protocols_features_against_a_calculation_by_hand() -> None:
    """Brute force over all pairs: another way to the same numbers."""
    table = pl.concat(Generator(Population(12, 6), date(2025, 1, 1), 1).days(50))
    batch = batch_features(table)
    times = batch["TX_DATETIME"].dt.epoch("us").to_numpy()
    customer, terminal = batch["CUSTOMER_ID"].to_numpy(), batch["TERMINAL_ID"].to_numpy()
    amount, fraud = batch["TX_AMOUNT"].to_numpy(), batch["TX_FRAUD"].to_numpy()
    order = np.arange(len(batch))
    for i in range(0, len(batch), 7):
        for days in (1, 7, 30):
            mine = (customer == customer[i]) & (times > times[i] - days * DAY) & (order <= i)
            assert batch[f"CUSTOMER_ID_NB_TX_{days}DAY_WINDOW"][i] == mine.sum()
            assert batch[f"CUSTOMER_ID_AVG_AMOUNT_{days}DAY_WINDOW"][i] == pytest.approx(amount[mine].mean(), abs=1e-9)
            old = (terminal == terminal[i]) & (times > times[i] - LABEL_DELAY - days * DAY) & (times <= times[i] - LABEL_DELAY)
            assert batch[f"TERMINAL_ID_NB_TX_{days}DAY_WINDOW"][i] == old.sum()
            risk = fraud[old].mean() if old.any() else 0.0
            assert batch[f"TERMINAL_ID_RISK_{days}DAY_WINDOW"][i] == pytest.approx(risk, abs=1e-9)
    assert batch["TX_DURING_WEEKEND"].to_list() == [float(t.weekday() >= 5) for t in batch["TX_DATETIME"]]
    assert batch["TX_DURING_NIGHT"].to_list() == [float(t.hour <= 6) for t in batch["TX_DATETIME"]]


def test_a_label_counts_only_after_seven_days_even_if_it_came_at_once() -> None:
    state = FeatureState()
    state.observe(0, "a", "shop", 5000, 1)
    assert state.label(0, "shop", 1, True)
    risk = INDEX["TERMINAL_ID_RISK_1DAY_WINDOW"]
    assert state.observe(LABEL_DELAY - 1, "b", "shop", 100, 2)[risk] == 0
    assert state.observe(LABEL_DELAY, "b", "shop", 100, 3)[risk] == 1


def test_a_label_that_is_taken_back_is_forgotten() -> None:
    state = FeatureState()
    state.observe(0, "a", "shop", 5000, 1)
    state.label(0, "shop", 1, True)
    state.label(0, "shop", 1, False)
    assert state.observe(8 * DAY, "b", "shop", 100, 2)[INDEX["TERMINAL_NB_ORDINARY_FRAUD"]] == 0
    assert not state.label(1, "shop", 1, True), "another instant"
    assert not state.label(0, "nowhere", 1, True)


@pytest.mark.parametrize("labelled", range(3))
def test_of_transactions_at_one_instant_the_one_that_was_meant_is_labelled(labelled: int) -> None:
    """Three cards at one terminal at one instant, each with another amount against its habit: only one is high."""
    state = FeatureState()
    for card in range(3):
        state.observe(0, f"card {card}", "elsewhere", 1000, card)
    for card, amount in enumerate((1000, 9000, 1000)):
        state.observe(DAY, f"card {card}", "shop", amount, 10 + card)
    assert state.label(DAY, "shop", 10 + labelled, True)
    seen = state.observe(9 * DAY, "another", "shop", 100, 99)
    assert seen[INDEX["TERMINAL_NB_HIGH_FRAUD"]] == (1 if labelled == 1 else 0)
    assert seen[INDEX["TERMINAL_NB_ORDINARY_FRAUD"]] == (0 if labelled == 1 else 1)
    state.label(DAY, "shop", 10 + labelled, False)
    assert state.observe(9 * DAY, "another", "shop", 100, 98)[INDEX["TERMINAL_ID_RISK_7DAY_WINDOW"]] == 0


def test_state_does_not_grow_with_time() -> None:
    state = FeatureState()
    for day in range(400):
        state.observe(day * DAY, "a", "shop", 100, day)
    customer, terminal = state._customers["a"], state._terminals["shop"]
    assert len(customer.times) < 60
    assert len(terminal.times) < 60
    state.forget(10_000 * DAY)
    assert state.sizes() == (0, 0)


def test_one_transaction_far_ahead_does_not_empty_a_terminal() -> None:
    state = FeatureState()
    for day in range(100):
        state.clock = day * DAY
        state.observe(day * DAY, "a", "shop", 100, day)
    state.observe(5000 * DAY, "a", "shop", 100, 999)
    assert state.observe(100 * DAY, "a", "shop", 100, 1000)[INDEX["TERMINAL_ID_NB_TX_30DAY_WINDOW"]] == 30


def test_sequences_of_the_stream_equal_those_of_the_batch() -> None:
    table = batch_features(pl.concat(Generator(Population(20, 10), date(2025, 1, 1), 5).days(45)))
    features = table.select(FEATURES).to_numpy().astype(np.float32)
    values, mask = gather(features, sequence_rows(table))
    state = SequenceState()
    times, customers = table["TX_DATETIME"].dt.epoch("us").to_list(), table["CUSTOMER_ID"].to_list()
    for i in range(len(table)):
        one, one_mask = state.sequence(customers[i], times[i], features[i])
        np.testing.assert_array_equal(one, values[i])
        np.testing.assert_array_equal(one_mask, mask[i])
    assert mask[:, -1].all()
    assert values.shape == (len(table), LENGTH, len(FEATURES))


def test_the_place_of_a_forgotten_customer_is_clean_for_the_next() -> None:
    state, row = SequenceState(), np.ones(len(FEATURES), np.float32)
    for day in range(5):
        state.sequence("old", day * DAY, row)
    state.sequence("fresh", 40 * DAY, row)
    state.forget(60 * DAY)
    values, mask = state.sequence("new", 5 * DAY, row)
    assert mask.tolist() == [0.0] * (LENGTH - 1) + [1.0]
    assert not values[:-1].any()
    assert state.sequence("fresh", 41 * DAY, row)[1].sum() == 2, "who is younger stays"


def test_the_protocol_has_its_15_features_under_their_names() -> None:
    assert len(HANDBOOK) == 15
    assert {"TX_AMOUNT", "CUSTOMER_ID_AVG_AMOUNT_7DAY_WINDOW", "TERMINAL_ID_RISK_30DAY_WINDOW"} <= set(HANDBOOK)
    assert len(set(FEATURES)) == len(FEATURES)


def test_an_empty_table_has_the_columns() -> None:
    table = pl.concat(Generator(Population(3, 3), date(2025, 1, 1), 0).days(2)).clear()
    assert set(FEATURES) <= set(batch_features(table).columns)


def test_the_generator_is_reproducible_and_a_day_does_not_depend_on_how_many_follow(tmp_path: Path) -> None:
    population = Population.for_rows(4000, 20)
    first = list(Generator(population, date(2025, 1, 1), 7).days(20))
    again = list(Generator(population, date(2025, 1, 1), 7).days(5))
    assert all(a.equals(b) for a, b in zip(first, again, strict=False))
    assert not first[0].equals(next(iter(Generator(population, date(2025, 1, 1), 8).days(1))))
    number = write_days(population, date(2025, 1, 1), 20, 7, tmp_path / "t.parquet")
    table = read_transactions(tmp_path / "t.parquet", labelled=True)
    assert number == len(table) == sum(len(day) for day in first)
    write_days(population, date(2025, 1, 1), 20, 7, tmp_path / "t.csv")
    assert read_transactions(tmp_path / "t.csv", labelled=True).equals(table.cast({"CUSTOMER_ID": pl.Int64, "TERMINAL_ID": pl.Int64}))
    with pytest.raises(InputError, match=r"expected \.csv or \.parquet"):
        write_days(population, date(2025, 1, 1), 1, 7, tmp_path / "t.txt")
    assert table["TRANSACTION_ID"].to_list() == list(range(number))
    assert table["TX_DATETIME"].is_sorted()
    assert 0.9 * 4000 < number < 1.1 * 4000
    assert (table["TX_DATETIME"].max() - table["TX_DATETIME"].min()).total_seconds() < 20 * DAY / SECOND


def test_a_feature_that_never_changed_in_training_says_next_to_nothing() -> None:
    """In a history of some days no terminal has a known fraud; the first one later was a thousand deviations off."""
    torch = pytest.importorskip("torch")
    from apps.finance.training.sequence import SequenceNetwork, SequenceRecipe

    torch.manual_seed(0)
    sample = torch.rand(200, len(FEATURES)) * 50
    sample[:, 3] = 60.0
    network = SequenceNetwork(sample, SequenceRecipe()).eval()
    sequence, mask = sample[:8, None].repeat(1, LENGTH, 1), torch.ones(8, LENGTH)
    changed, other = sequence.clone(), sequence.clone()
    changed[:, :, 3], other[:, :, 4] = 12.0, 12.0
    with torch.no_grad():
        usual, _ = network(sequence, mask)
        assert (network(changed, mask)[0] - usual).abs().max() < 1e-3
        assert (network(other, mask)[0] - usual).abs().max() > 1e-3
