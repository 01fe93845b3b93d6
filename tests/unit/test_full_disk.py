"""A disk that is full: SQLite's files say so as an outage, and work goes on when there is room."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from apps.common.database import DatabaseUnavailableError, open_database, write_audit
from pipelines import LogUnavailableError
from pipelines.transport import open_log
from pipelines.transport.embedded import EmbeddedLog

LARGE = b"x" * 1_000_000


def full(log: EmbeddedLog) -> None:
    """No page more for the connections that it has."""
    with log.connection() as db:
        db.execute("PRAGMA max_page_count=1")


def test_a_log_whose_disk_is_full(tmp_path: Path) -> None:
    log = open_log(f"embedded://{tmp_path}")
    assert isinstance(log, EmbeddedLog)
    log.create_topic("parts", 1)
    log.produce("parts", b"first")
    full(log)
    with pytest.raises(LogUnavailableError, match="full; check its disk"):
        log.produce("parts", LARGE)
    assert log.lag("nobody", "parts") == {0: 1}, "nothing half written"
    assert log.produce("parts", LARGE) == (0, 1)
    log.close()


def test_a_database_whose_disk_is_full(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path}/triscope.sqlite")
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=1")
    with pytest.raises(DatabaseUnavailableError, match="full"), engine.begin() as connection:
        write_audit(connection, "me", "note", "part", text=LARGE.decode())
    with pytest.raises(sa.exc.OperationalError), engine.begin() as connection:
        connection.execute(sa.text("SELECT * FROM nothing"))
    engine.dispose()
    with engine.begin() as connection:
        write_audit(connection, "me", "note", "part", text=LARGE.decode())
