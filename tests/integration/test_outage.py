"""A broker or a database dies in the middle of the work and comes back: no worker ends, nothing is lost or goes to the dead letters."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import polars as pl
import pytest

from apps.common.database import DatabaseUnavailableError
from apps.common.settings import Settings, load_settings
from apps.finance.bootstrap import open_finance
from apps.finance.messages import TRANSACTIONS
from apps.finance.transactions.generate import Generator, Population
from apps.finance.transactions.replay import replay_table
from apps.finance.worker import GROUP as FINANCE
from apps.industrial.acquisition.generated import GeneratedSource, write_dataset
from apps.industrial.bootstrap import open_industrial
from apps.industrial.evaluation.dataset import good_samples
from apps.industrial.images import png
from apps.industrial.messages import FRAMES
from apps.industrial.worker import GROUP as INDUSTRIAL
from pipelines import Log
from pipelines.topics import Topic
from tests.conftest import Commands, absent, eventually
from tests.services import KafkaBroker, Postgres

AWAY_SECONDS = 12.0
"""Longer than a member of a group may be silent."""


@pytest.fixture
def broker(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[KafkaBroker]:
    """A broker of this test's own."""
    home = os.environ.get("KAFKA_HOME")
    if not home:
        absent("KAFKA_HOME is not set: no real Kafka that may be killed")
    with KafkaBroker(Path(str(home)), tmp_path_factory.mktemp("kafka")) as started:
        monkeypatch.setenv("TRISCOPE_LOG_URL", f"kafka://{started.address}")
        yield started


def settled(log: Log, group: str, topic: Topic) -> bool:
    """Whether the group has committed everything."""
    return not any(log.lag(group, topic.name).values())


def dead_letters(log: Log, topic: Topic) -> int:
    return sum(log.lag("nobody", topic.dead_letters).values())


def test_parts_are_fed_and_judged_across_an_outage(broker: KafkaBroker, commands: Commands, settings: Settings, tmp_path: Path) -> None:
    settings = load_settings().settings
    write_dataset(tmp_path / "parts", "cast", good=12, each=1)
    service, log = open_industrial(settings)
    service.teach("cast", good_samples(tmp_path / "parts" / "train" / "good"))
    station = commands.start("industrial", "station")
    number = 120
    source = ("texture:cast", "--recipe", "cast", "--per-second", "8", "--number", str(number))
    feeder = commands.start("industrial", "feed", *source, until=None)
    eventually(lambda: service.store.counts("cast").total > 10)
    broker.kill()
    time.sleep(AWAY_SECONDS)
    assert station.poll() is None
    assert feeder.poll() is None
    broker.start()
    assert feeder.wait(120) == 0
    eventually(lambda: service.store.counts("cast").total == number, timeout=120)
    eventually(lambda: settled(log, INDUSTRIAL, FRAMES), timeout=60)
    assert dead_letters(log, FRAMES) == 0
    assert station.poll() is None
    service.close()
    log.close()


def test_transactions_are_sent_and_decided_across_an_outage(broker: KafkaBroker, commands: Commands, settings: Settings) -> None:
    settings = load_settings().settings
    table = pl.concat(Generator(Population(60, 30), date(2025, 3, 1), 5).days(4))
    service, log = open_finance(settings)
    stream = commands.start("finance", "stream")
    with ThreadPoolExecutor(1) as pool:
        replay = pool.submit(replay_table, table, log, speed=4 * 86400 / 30, with_labels=False, stop=threading.Event())
        eventually(lambda: service.store.total() > len(table) // 10)
        broker.kill()
        time.sleep(AWAY_SECONDS)
        assert stream.poll() is None
        assert not replay.done()
        broker.start()
        assert replay.result(120).transactions == len(table)
    eventually(lambda: service.store.total() == len(table), timeout=120)
    eventually(lambda: settled(log, FINANCE, TRANSACTIONS), timeout=60)
    assert dead_letters(log, TRANSACTIONS) == 0
    assert stream.poll() is None
    log.close()


def test_parts_wait_for_the_database(
    postgres_server: Postgres, commands: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRISCOPE_DATABASE_URL", postgres_server.url)
    write_dataset(tmp_path / "parts", "cast", good=12, each=1)
    service, log = open_industrial(load_settings().settings)
    service.teach("cast", good_samples(tmp_path / "parts" / "train" / "good"))
    station = commands.start("industrial", "station")
    parts = [png(image) for image, _ in GeneratedSource("cast", 20).parts()]
    for part in parts[:4]:
        service.submit(part, "cast")
    eventually(lambda: service.store.counts("cast").total == 4)
    postgres_server.stop()
    for part in parts[4:]:
        service.submit(part, "cast")
    with pytest.raises(DatabaseUnavailableError, match="does not answer"):
        service.store.counts("cast")
    time.sleep(AWAY_SECONDS)
    assert station.poll() is None
    postgres_server.start()
    eventually(lambda: service.store.counts("cast").total == len(parts))
    eventually(lambda: settled(log, INDUSTRIAL, FRAMES))
    assert dead_letters(log, FRAMES) == 0
    assert station.poll() is None
    service.close()
    log.close()


@pytest.mark.parametrize("app", ["start", "medical", "finance", "industrial"])
def test_a_page_says_that_the_database_is_away(postgres_server: Postgres, app: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import streamlit as st
    from streamlit.testing.v1 import AppTest

    import apps

    def script(app: str) -> None:
        import importlib

        import streamlit as st

        if "cleared" not in st.session_state:
            st.cache_resource.clear()
            st.session_state["cleared"] = True
        importlib.import_module(f"apps.{app}.ui.page").page()

    def opened() -> AppTest:
        if app == "start":
            st.cache_resource.clear()
            return AppTest.from_file(Path(apps.__file__).with_name("pages.py"), default_timeout=90)
        return AppTest.from_function(script, default_timeout=90, args=(app,))

    def errors() -> list[str]:
        page.run()
        assert not page.exception
        return [error.value for error in page.error if "the database at" in error.value and "does not answer" in error.value]

    monkeypatch.setenv("TRISCOPE_DATABASE_URL", postgres_server.url)
    page = opened()
    assert errors() == []
    postgres_server.stop()
    assert errors()
    postgres_server.start()
    assert errors() == []
    page = opened()
    postgres_server.stop()
    assert errors(), "a page that can't be opened"
    postgres_server.start()
    assert errors() == []
