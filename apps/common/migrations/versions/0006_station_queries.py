"""Indexes for what the station's page asks every second: counts, what waits, the newest parts of a recipe."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None
TABLE = "industrial_verdicts"
INDEXES: dict[str, tuple[list[Any], str | None]] = {
    "of_recipe": (["recipe", "sequence"], None),
    "of_lot": (["recipe", "lot"], None),
    "outcome": (["recipe", "lot", "verdict", "judged"], "verdict != 'pass' OR judged != ''"),
    "undecided": ([sa.text("verdict DESC"), "sequence"], "verdict != 'pass' AND judged = ''"),
    "decided": (["recipe", "sequence"], "judged != ''"),
}
REPLACED = ("recipe", "verdict")


def upgrade() -> None:
    for name, (columns, condition) in INDEXES.items():
        where = None if condition is None else sa.text(condition)
        op.create_index(f"ix_{TABLE}_{name}", TABLE, columns, sqlite_where=where, postgresql_where=where)
    for column in REPLACED:
        op.drop_index(f"ix_{TABLE}_{column}", TABLE)


def downgrade() -> None:
    for column in REPLACED:
        op.create_index(f"ix_{TABLE}_{column}", TABLE, [column])
    for name in INDEXES:
        op.drop_index(f"ix_{TABLE}_{name}", TABLE)
