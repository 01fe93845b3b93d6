"""Indexes for what the station's page asks every second (counts, what waits, the newest parts of a recipe), and for what a finance worker
asks when it starts (decisions that may be unpublished, cards with a fraud)."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None
STATION, DECISIONS, LABELS = "industrial_verdicts", "finance_transactions", "finance_labels"
INDEXES: dict[str, tuple[list[Any], str | None]] = {
    "of_recipe": (["recipe", "sequence"], None),
    "of_lot": (["recipe", "lot"], None),
    "outcome": (["recipe", "lot", "verdict", "judged"], "verdict != 'pass' OR judged != ''"),
    "undecided": ([sa.text("verdict DESC"), "sequence"], "verdict != 'pass' AND judged = ''"),
    "decided": (["recipe", "sequence"], "judged != ''"),
}
REPLACED = ("recipe", "verdict")
UNPUBLISHED, FRAUDS = "finance_unpublished", "finance_frauds"


def upgrade() -> None:
    for name, (columns, condition) in INDEXES.items():
        where = None if condition is None else sa.text(condition)
        op.create_index(f"ix_{STATION}_{name}", STATION, columns, sqlite_where=where, postgresql_where=where)
    for column in REPLACED:
        op.drop_index(f"ix_{STATION}_{column}", STATION)
    op.drop_index(UNPUBLISHED, DECISIONS)
    _unpublished(sqlite_where=sa.text("published = 0"))  # as SQLAlchemy asks; SQLite takes no index that says it in other words
    op.create_index(FRAUDS, LABELS, ["event_us"], sqlite_where=sa.text("fraud = 1"), postgresql_where=sa.text("fraud"))


def downgrade() -> None:
    op.drop_index(FRAUDS, LABELS)
    op.drop_index(UNPUBLISHED, DECISIONS)
    _unpublished(sqlite_where=sa.text("NOT published"))
    for column in REPLACED:
        op.create_index(f"ix_{STATION}_{column}", STATION, [column])
    for name in INDEXES:
        op.drop_index(f"ix_{STATION}_{name}", STATION)


def _unpublished(sqlite_where: sa.TextClause) -> None:
    op.create_index(UNPUBLISHED, DECISIONS, ["sequence"], sqlite_where=sqlite_where, postgresql_where=sa.text("NOT published"))
