"""The worklist in the database: one row a study. Nothing else of the app knows the database."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import sqlalchemy as sa

from apps.common.database import kept_text, metadata, write_audit
from apps.medical.errors import StudyNotFoundError
from pipelines.messages import TRACEPARENT, now_rfc3339, trace_id

studies = sa.Table(
    "medical_studies",
    metadata,
    sa.Column("study_id", sa.String(64), primary_key=True),
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("received", sa.String(32), nullable=False, index=True),
    sa.Column("updated", sa.String(32), nullable=False),
    sa.Column("source", sa.String(200), nullable=False),
    sa.Column("blob", sa.String(80), nullable=False),
    sa.Column("patient", sa.String(200), nullable=False),
    sa.Column("description", sa.String(200), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("report", sa.JSON, nullable=False),
    sa.Column("files", sa.JSON, nullable=False),
    sa.Column("trace_id", sa.String(32), nullable=False),
)
LONGEST_REASON = 4000
RECEIVED, DONE, REFUSED = "received", "done", "refused"
SETTLED = (DONE, REFUSED)


class Study(msgspec.Struct, frozen=True):
    """A row of the worklist. `files`: blob references by file name. `report`: as in `report.json`."""

    study_id: str
    status: str
    received: str
    updated: str
    source: str
    blob: str
    patient: str
    description: str
    reason: str
    report: dict[str, Any]
    files: dict[str, str]
    trace_id: str


class MedicalStore:
    """Reads and writes studies, each change with its line in the audit log."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def add(self, study_id: str, *, source: str, blob: str, patient: str = "", description: str = "") -> bool:
        """Note a study as received; False where it is known already."""
        now = now_rfc3339()
        row = {
            "study_id": study_id,
            "status": RECEIVED,
            "received": now,
            "updated": now,
            "source": kept_text(source),
            "blob": blob,
            "patient": kept_text(patient),
            "description": kept_text(description),
            "reason": "",
            "report": {},
            "files": {},
            "trace_id": trace_id(TRACEPARENT.get()),
        }
        try:
            with self._engine.begin() as connection:
                connection.execute(studies.insert().values(**row))
                write_audit(connection, "system", "study received", study_id, source=source)
        except sa.exc.IntegrityError:
            return False
        return True

    def settle(
        self,
        study_id: str,
        status: str,
        *,
        reason: str = "",
        report: Mapping[str, Any] | None = None,
        files: Mapping[str, str] | None = None,
        patient: str | None = None,
        description: str | None = None,
    ) -> None:
        """Record the outcome of a study: DONE with report and files, or REFUSED with the reason."""
        values: dict[str, Any] = {
            "status": status,
            "updated": now_rfc3339(),
            "reason": kept_text(reason, LONGEST_REASON),
            "report": dict(report or {}),
            "files": dict(files or {}),
            "trace_id": trace_id(TRACEPARENT.get()),
        }
        values |= {k: kept_text(v) for k, v in (("patient", patient), ("description", description)) if v is not None}
        with self._engine.begin() as connection:
            changed = connection.execute(studies.update().where(studies.c.study_id == study_id).values(**values))
            if changed.rowcount != 1:
                raise StudyNotFoundError(f"no study {study_id!r} in the store")
            write_audit(connection, "system", f"study {status}", study_id, reason=reason)

    def get(self, study_id: str) -> Study:
        """One study. Raises StudyNotFoundError."""
        with self._engine.connect() as connection:
            row = connection.execute(studies.select().where(studies.c.study_id == study_id)).mappings().one_or_none()
        if row is None:
            raise StudyNotFoundError(f"no study {study_id!r} in the store")
        return Study(**row)

    def find(self, study_id: str) -> Study | None:
        """One study, or None."""
        try:
            return self.get(study_id)
        except StudyNotFoundError:
            return None

    def latest(self, limit: int = 200) -> list[Study]:
        """The newest studies first."""
        query = studies.select().order_by(studies.c.received.desc(), studies.c.study_id).limit(limit)
        with self._engine.connect() as connection:
            return [Study(**row) for row in connection.execute(query).mappings()]

    def counts(self) -> dict[str, int]:
        """Studies by status."""
        query = sa.select(studies.c.status, sa.func.count()).group_by(studies.c.status)
        with self._engine.connect() as connection:
            return {status: int(count) for status, count in connection.execute(query)}
