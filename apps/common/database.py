"""The database engine, its migrations and the audit log."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy import event

from pipelines import UnavailableError
from pipelines.messages import TRACEPARENT, now_rfc3339, printable, trace_id
from pipelines.patience import away

metadata = sa.MetaData()
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("time", sa.String(32), nullable=False),
    sa.Column("actor", sa.String(200), nullable=False),
    sa.Column("action", sa.String(100), nullable=False),
    sa.Column("subject", sa.String(200), nullable=False, index=True),
    sa.Column("detail", sa.JSON, nullable=False),
    sa.Column("trace_id", sa.String(32), nullable=False),
)
MIGRATION_LOCK = 0x7415C0  # any number that other programs on the same PostgreSQL are unlikely to use


class DatabaseUnavailableError(UnavailableError, sa.exc.SQLAlchemyError):
    """The database server does not answer, or SQLite can't read or write its file now."""


def open_database(url: str) -> sa.Engine:
    """An engine for `url` with the schema brought up to date; several processes may do so at once.

    Raises DatabaseUnavailableError, as do later calls, where its server does not answer or its disk is full or gone.
    """
    address = sa.make_url(url)
    if address.get_backend_name() == "sqlite" and address.database:
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(address, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "handle_error", _unavailable)
    _migrate(engine)
    return engine


def _unavailable(context: sa.ExceptionContext) -> None:
    """Say that it is the server or the disk that fails, and not what it was asked."""
    if context.dialect.name == "sqlite":
        unavailable = away(context.original_exception)
    else:
        unavailable = not context.is_pre_ping and (context.is_disconnect or context.connection is None)
    if unavailable:
        place = context.engine.url.render_as_string() if context.engine is not None else "its address"
        error = context.original_exception
        raise DatabaseUnavailableError(f"the database at {place} does not answer: {' '.join(str(error).split())}") from error


def _configure_sqlite(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA busy_timeout=60000")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _migrate(engine: sa.Engine) -> None:
    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        elif engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.commit()


def kept_text(text: str, most: int = 200) -> str:
    """The text as far as a column of `most` characters holds it: PostgreSQL takes no NUL, no database half of a surrogate pair."""
    return printable(text).replace("\0", "")[:most]


def write_audit(connection: sa.Connection, actor: str, action: str, subject: str, **detail: Any) -> None:
    """Record who did what to what, in the caller's transaction."""
    connection.execute(
        audit.insert().values(
            time=now_rfc3339(), actor=actor, action=action, subject=subject, detail=detail, trace_id=trace_id(TRACEPARENT.get())
        )
    )
