"""Migrations: a database of each previous version, with its rows, is brought up to date; on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event

import apps.common.database
from apps.common.database import metadata, open_database
from apps.common.settings import Settings
from apps.finance.bootstrap import open_finance
from apps.finance.store import FinanceStore
from apps.industrial.bootstrap import open_industrial
from apps.industrial.messages import VerdictMessage
from apps.industrial.spc import p_chart
from apps.industrial.store import IndustrialStore
from apps.medical.bootstrap import open_medical

MIGRATIONS = Path(apps.common.database.__file__).parent / "migrations"


def config() -> Config:
    made = Config()
    made.set_main_option("script_location", str(MIGRATIONS))
    return made


VERSIONS = [script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()][::-1]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'old.sqlite'}" if request.param == "sqlite" else str(request.getfixturevalue("postgres"))


def test_a_database_of_the_first_version_keeps_its_rows(url: str, settings: Settings) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        settings_of_alembic = config()
        settings_of_alembic.attributes["connection"] = connection
        command.upgrade(settings_of_alembic, VERSIONS[0])
        old = sa.MetaData()
        old.reflect(connection)
        row = {"actor": "someone", "action": "old", "subject": "kept", "detail": {}, "time": "2026-01-01T00:00:00Z", "trace_id": ""}
        connection.execute(old.tables["audit"].insert().values(row))
        assert "workers" not in old.tables
    engine.dispose()
    upgraded = open_database(url)
    with upgraded.connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() == VERSIONS[-1]
        assert connection.execute(sa.text("SELECT subject FROM audit")).scalars().all() == ["kept"]
    upgraded.dispose()
    chosen = msgspec.structs.replace(settings, database_url=url)
    for opened in (open_medical, open_finance, open_industrial):
        service, log = opened(chosen)
        service.store.latest()
        service.store._engine.dispose()
        log.close()


def test_every_step_up_and_the_tables_are_those_of_the_code(url: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        made = config()
        made.attributes["connection"] = connection
        for version in VERSIONS:
            command.upgrade(made, version)
        inspector = sa.inspect(connection)
        for table in metadata.sorted_tables:
            stored = {column["name"] for column in inspector.get_columns(table.name)}
            assert stored == {column.name for column in table.columns}, table.name
            indexes = {index["name"] for index in inspector.get_indexes(table.name)}
            assert {index.name for index in table.indexes} <= indexes, table.name
    engine.dispose()


def test_verdicts_of_the_previous_version_keep_their_pictures(url: str, settings: Settings) -> None:
    engine, blob = sa.create_engine(url), "sha256:" + "a" * 64
    message = VerdictMessage("f1", "2026-01-01T00:00:00Z", "s", "plate", "pass", 0.5, [], blob=blob)
    row = dict.fromkeys(("lot", "judged", "judged_by", "note", "trace_id"), "")
    row |= {name: getattr(message, name) for name in ("frame_id", "event_time", "station", "recipe", "verdict", "score")}
    with engine.begin() as connection:
        made = config()
        made.attributes["connection"] = connection
        command.upgrade(made, "0004")
        old = sa.MetaData()
        old.reflect(connection)
        insert = old.tables["industrial_verdicts"].insert()
        connection.execute(insert.values(row | {"detail": msgspec.json.encode(message)}))
        connection.execute(insert.values(row | {"detail": b"{}", "frame_id": "f0"}))
    engine.dispose()
    service, log = open_industrial(msgspec.structs.replace(settings, database_url=url))
    found = service.store.find("f1")
    assert found is not None
    assert found.verdict == message
    assert list(service.store.passed_pictures("2026-01-02T00:00:00Z")) == [[blob]]
    service.store._engine.dispose()
    service.close()
    log.close()


def test_pictures_that_nothing_needs_any_more(url: str, settings: Settings) -> None:
    service, log = open_industrial(msgspec.structs.replace(settings, database_url=url))
    store = service.store
    for number, (verdict, day) in enumerate([("pass", 1), ("pass", 1), ("pass", 2), ("fail", 1), ("review", 1), ("pass", 9), ("pass", 2)]):
        blob = f"sha256:{0 if number == 6 else number:064d}"  # the last part shares the first one's picture
        store.add(VerdictMessage(f"f{number}", f"2026-01-0{day}T00:00:00Z", "s", "plate", verdict, 0.0, [], blob=blob))
    store.judge("f1", "good", "operator")

    def spare(before: str, limit: int) -> list[int]:
        return [int(blob[7:]) for blobs in store.passed_pictures(before, limit) for blob in blobs]

    for limit in (1, 2, 500):
        assert sorted(set(spare("2026-01-05T00:00:00Z", limit))) == [0, 2]
        assert spare("2026-01-02T00:00:00Z", limit) == [], "the first is the seventh's, too"
    assert store.forget_pictures([f"sha256:{0:064d}"]) == 2
    assert spare("2026-01-05T00:00:00Z", 500) == [2]
    part = store.find("f6")
    assert part is not None
    assert (part.verdict.blob, part.verdict.verdict) == ("", "pass")
    store._engine.dispose()
    service.close()
    log.close()


def read_steps(engine: sa.Engine, asks: Sequence[Callable[[], object]]) -> list[str]:
    """How SQLite reads what these ask."""
    asked: list[tuple[str, Any]] = []
    event.listen(engine, "before_cursor_execute", lambda _c, _k, statement, parameters, *_: asked.append((statement, parameters)))
    for ask in asks:
        ask()
    queries = list(asked)
    assert len(queries) >= len(asks)
    with engine.connect() as connection:
        return [str(row.detail) for text, given in queries for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", given)]


def test_what_the_station_asks_every_second_is_read_from_indexes(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path}/triscope.sqlite")
    store = IndustrialStore(engine)
    steps = read_steps(
        engine,
        [
            lambda: store.counts("plate", "lot"),
            lambda: store.counts("plate"),
            store.counts,
            store.undecided,
            store.to_review,
            lambda: store.latest(20, recipe="plate"),
            lambda: store.judged("plate"),
            lambda: store.series("plate"),
        ],
    )
    assert [step for step in steps if "industrial_verdicts" in step and "INDEX" not in step] == []
    for name in ("of_lot", "outcome", "undecided", "decided", "of_recipe"):
        assert any(f"ix_industrial_verdicts_{name}" in step for step in steps), name
    assert not [step for step in steps if "ORDER BY" in step], "nothing is sorted"
    engine.dispose()


def test_what_a_finance_worker_asks_first_is_read_from_indexes(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path}/triscope.sqlite")
    store = FinanceStore(engine)
    steps = read_steps(engine, [store.unpublished, lambda: store.compromised(0), store.alerts, lambda: store.alerts_between(0, 1)])
    assert [step for step in steps if "finance_" in step and "INDEX" not in step] == []
    for name in ("finance_unpublished", "finance_frauds", "finance_by_decision"):
        assert any(name in step for step in steps), name
    engine.dispose()


def test_the_industrial_store(url: str, settings: Settings) -> None:
    service, log = open_industrial(msgspec.structs.replace(settings, database_url=url))
    for number in range(60):
        verdict = ("pass", "review", "fail")[0 if number % 10 else 1 + number % 20 // 10]
        message = VerdictMessage(
            f"f{number}", f"2026-01-01T00:{number:02d}:00Z", "s", "plate", verdict, number / 10, [], lot=f"lot {number // 30}"
        )
        assert service.store.add(message)
        assert not service.store.add(message), "one verdict a frame"
    assert (service.store.counts("plate").total, service.store.counts("plate", "lot 1").total) == (60, 30)
    assert service.store.counts("plate").passed == 54
    assert [part.verdict.frame_id for part in service.store.latest(2)] == ["f59", "f58"]
    waiting = [part.verdict.frame_id for part in service.store.to_review()]
    assert sorted(waiting) == ["f0", "f10", "f20", "f30", "f40", "f50"]
    service.judge(waiting[0], "good", "operator", "dust")
    assert (len(service.store.to_review(3)), service.store.undecided()) == (3, 5)
    service.judge("f1", "defect", "operator", "a scratch that was missed")
    counts = service.store.counts("plate")
    assert (counts.passed, counts.review, counts.failed) == (54, 2, 4), "the operator's word counts"
    assert [part.note for part in service.store.judged("plate")] == ["dust", "a scratch that was missed"]
    assert len(p_chart([v != "pass" for _, v, _ in service.store.series("plate")]).values) >= 2
    with service.store._engine.connect() as connection:
        assert connection.execute(sa.text("SELECT action, subject FROM audit")).all() == [
            ("industrial.judge", "f0"),
            ("industrial.judge", "f1"),
        ]
    service.store._engine.dispose()
    service.close()
    log.close()
