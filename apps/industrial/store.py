"""Verdicts and the operator's decisions in the database. Nothing else of the app knows the database."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from apps.common.database import metadata, write_audit
from apps.industrial.errors import InputError
from apps.industrial.messages import VerdictMessage
from pipelines.messages import TRACEPARENT, now_rfc3339, trace_id

verdicts = sa.Table(
    "industrial_verdicts",
    metadata,
    sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("frame_id", sa.String(200), nullable=False, unique=True),
    sa.Column("event_time", sa.String(40), nullable=False, index=True),
    sa.Column("station", sa.String(200), nullable=False),
    sa.Column("recipe", sa.String(64), nullable=False),
    sa.Column("lot", sa.String(200), nullable=False),
    sa.Column("verdict", sa.String(8), nullable=False),
    sa.Column("score", sa.Float, nullable=False),
    sa.Column("detail", sa.LargeBinary, nullable=False),
    sa.Column("judged", sa.String(8), nullable=False),
    sa.Column("judged_by", sa.String(200), nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("trace_id", sa.String(32), nullable=False),
    sa.Column("blob", sa.String(80), nullable=False, index=True),
)
"""`blob`: of the frame, or empty where its picture is not kept any more."""
EMPTY: sa.ColumnElement[str] = sa.literal_column("''")
"""Written out: an index of some rows serves a query that says the same."""
THERE, DECIDED = verdicts.c.blob != EMPTY, verdicts.c.judged != EMPTY
FOUND: sa.ColumnElement[bool] = verdicts.c.verdict != sa.literal_column("'pass'")
UNDECIDED = FOUND & ~DECIDED
GOOD, DEFECT = "good", "defect"


def _index(name: str, *columns: sa.ColumnElement[Any], where: sa.ColumnElement[bool] | None = None) -> None:
    sa.Index(f"ix_industrial_verdicts_{name}", *columns, sqlite_where=where, postgresql_where=where)


# The page asks every second, of millions of parts.
_index("pictures", verdicts.c.event_time, verdicts.c.sequence, where=THERE)
_index("of_recipe", verdicts.c.recipe, verdicts.c.sequence)
_index("of_lot", verdicts.c.recipe, verdicts.c.lot)
_index("outcome", verdicts.c.recipe, verdicts.c.lot, verdicts.c.verdict, verdicts.c.judged, where=FOUND | DECIDED)
_index("undecided", verdicts.c.verdict.desc(), verdicts.c.sequence, where=UNDECIDED)
_index("decided", verdicts.c.recipe, verdicts.c.sequence, where=DECIDED)


class Part(msgspec.Struct, frozen=True):
    """A part that was judged. `judged`: what the operator said of it, "good" or "defect", or empty."""

    sequence: int
    verdict: VerdictMessage
    judged: str
    judged_by: str
    note: str
    trace_id: str


class Counts(msgspec.Struct, frozen=True):
    """Parts of a recipe (and lot): by what the operator said of them, otherwise by their verdict."""

    passed: int = 0
    review: int = 0
    failed: int = 0

    @property
    def total(self) -> int:
        """All parts."""
        return self.passed + self.review + self.failed


def _part(row: Any) -> Part:
    message = msgspec.structs.replace(msgspec.json.decode(row.detail, type=VerdictMessage), blob=row.blob)
    return Part(row.sequence, message, row.judged, row.judged_by, row.note, row.trace_id)


class IndustrialStore:
    """Reads and writes verdicts, each of the operator's decisions with its line in the audit log."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def add(self, verdict: VerdictMessage) -> bool:
        """Keep a verdict; False where its frame has one already."""
        row = {
            "frame_id": verdict.frame_id,
            "event_time": verdict.event_time,
            "station": verdict.station,
            "recipe": verdict.recipe,
            "lot": verdict.lot,
            "verdict": verdict.verdict,
            "score": verdict.score,
            "detail": msgspec.json.encode(verdict),
            "judged": "",
            "judged_by": "",
            "note": "",
            "trace_id": trace_id(TRACEPARENT.get()),
            "blob": verdict.blob,
        }
        try:
            with self._engine.begin() as connection:
                connection.execute(verdicts.insert().values(row))
        except sa.exc.IntegrityError:
            return False
        return True

    def find(self, frame_id: str) -> Part | None:
        """A part by its frame, or None."""
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(verdicts).where(verdicts.c.frame_id == frame_id)).one_or_none()
        return None if row is None else _part(row)

    def latest(self, limit: int = 20, *, recipe: str | None = None) -> list[Part]:
        """The newest parts first."""
        query = sa.select(verdicts).order_by(verdicts.c.sequence.desc()).limit(limit)
        return self._parts(query if recipe is None else query.where(verdicts.c.recipe == recipe))

    def to_review(self, limit: int = 50) -> list[Part]:
        """Parts that wait for the operator, oldest first: reviews, and fails that no one confirmed."""
        return self._parts(sa.select(verdicts).where(UNDECIDED).order_by(verdicts.c.verdict.desc(), verdicts.c.sequence).limit(limit))

    def undecided(self) -> int:
        """How many parts wait for the operator."""
        with self._engine.connect() as connection:
            return int(connection.execute(sa.select(sa.func.count()).where(UNDECIDED)).scalar_one())

    def judged(self, recipe: str) -> list[Part]:
        """The parts of a recipe that the operator decided on."""
        query = sa.select(verdicts).where((verdicts.c.recipe == recipe) & DECIDED)
        return self._parts(query.order_by(verdicts.c.sequence))

    def _parts(self, query: sa.Select[Any]) -> list[Part]:
        with self._engine.connect() as connection:
            return [_part(row) for row in connection.execute(query)]

    def passed_pictures(self, before: str, limit: int = 500) -> Iterator[list[str]]:
        """References of the pictures of parts that passed `before` a time (RFC 3339, UTC), on which no one decided and which no other part
        shares, oldest first, up to `limit` at once."""
        spare = (verdicts.c.verdict == "pass") & (verdicts.c.judged == "") & (verdicts.c.event_time < before)
        place = sa.tuple_(verdicts.c.event_time, verdicts.c.sequence)
        columns = (verdicts.c.event_time, verdicts.c.sequence, verdicts.c.blob, verdicts.c.verdict, verdicts.c.judged)
        query = sa.select(*columns).where((verdicts.c.event_time < before) & THERE).order_by(*columns[:2]).limit(limit)
        last = ("", 0)
        while True:
            with self._engine.connect() as connection:
                rows = connection.execute(query.where(place > last)).all()
                if not rows:
                    return
                last = (rows[-1].event_time, rows[-1].sequence)
                found = {row.blob for row in rows if row.verdict == "pass" and not row.judged}
                shared = connection.execute(sa.select(verdicts.c.blob).where(verdicts.c.blob.in_(found) & ~spare)).scalars()
                found -= set(shared)
            yield sorted(found)

    def forget_pictures(self, references: Sequence[str]) -> int:
        """Say of parts with these pictures that they have none any more; how many there were."""
        with self._engine.begin() as connection:
            return int(connection.execute(verdicts.update().where(verdicts.c.blob.in_(references)).values(blob="")).rowcount)

    def judge(self, frame_id: str, judged: str, actor: str, note: str = "") -> None:
        """The operator's decision on a part, with the audit log. Raises InputError for an unknown frame or word."""
        if judged not in (GOOD, DEFECT):
            raise InputError(f"a part is judged {GOOD!r} or {DEFECT!r}, not {judged!r}")
        with self._engine.begin() as connection:
            before = connection.execute(sa.select(verdicts.c.verdict).where(verdicts.c.frame_id == frame_id)).scalar_one_or_none()
            if before is None:
                raise InputError(f"no part with frame {frame_id!r} in the store")
            change = verdicts.update().where(verdicts.c.frame_id == frame_id)
            connection.execute(change.values(judged=judged, judged_by=actor[:200], note=note[:2000]))
            overruled = (judged == GOOD) == (before == "fail")
            write_audit(
                connection, actor[:200], "industrial.judge", frame_id, verdict=before, judged=judged, overruled=overruled, note=note[:2000]
            )

    def note(self, actor: str, action: str, subject: str, **detail: Any) -> None:
        """A line in the audit log."""
        with self._engine.begin() as connection:
            write_audit(connection, actor[:200], action, subject, **detail)

    def counts(self, recipe: str | None = None, lot: str | None = None) -> Counts:
        """How many parts passed, wait for a look, failed; the operator's word counts before the inspector's."""
        said = {GOOD: "pass", DEFECT: "fail"}
        outcome = sa.case(said, value=verdicts.c.judged, else_=verdicts.c.verdict).label("outcome")
        every, told = sa.select(sa.func.count()).select_from(verdicts), sa.select(outcome, sa.func.count()).group_by("outcome")
        for column, value in ((verdicts.c.recipe, recipe), (verdicts.c.lot, lot)):
            if value is not None:
                every, told = every.where(column == value), told.where(column == value)
        with self._engine.connect() as connection:
            found = {str(name): int(number) for name, number in connection.execute(told.where(FOUND | DECIDED))}
            number = int(connection.execute(every).scalar_one())
        review, failed = found.get("review", 0), found.get("fail", 0)
        return Counts(max(0, number - review - failed), review, failed)  # most passed and were not looked at: they are counted alone

    def series(self, recipe: str, limit: int = 1000) -> Sequence[tuple[str, str, float]]:
        """Event time, verdict and score of the last parts of a recipe, oldest first."""
        query = (
            sa.select(verdicts.c.event_time, verdicts.c.verdict, verdicts.c.score)
            .where(verdicts.c.recipe == recipe)
            .order_by(verdicts.c.sequence.desc())
            .limit(limit)
        )
        with self._engine.connect() as connection:
            return [(str(t), str(v), float(s)) for t, v, s in connection.execute(query)][::-1]


__all__ = ["DEFECT", "GOOD", "Counts", "IndustrialStore", "Part", "now_rfc3339", "verdicts"]
