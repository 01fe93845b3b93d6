"""Which picture a verdict has: those of parts that passed may be let go of."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None
TABLE, AT_ONCE = "industrial_verdicts", 1000


def upgrade() -> None:
    op.add_column(TABLE, sa.Column("blob", sa.String(80), nullable=False, server_default=""))
    table = sa.table(TABLE, sa.column("sequence", sa.BigInteger), sa.column("detail", sa.LargeBinary), sa.column("blob", sa.String))
    connection, last = op.get_bind(), -1
    while rows := connection.execute(
        sa.select(table.c.sequence, table.c.detail).where(table.c.sequence > last).order_by(table.c.sequence).limit(AT_ONCE)
    ).all():
        last = rows[-1].sequence
        change = table.update().where(table.c.sequence == sa.bindparam("row")).values(blob=sa.bindparam("reference"))
        connection.execute(change, [{"row": row.sequence, "reference": json.loads(row.detail).get("blob", "")} for row in rows])
    op.create_index("ix_industrial_verdicts_blob", TABLE, ["blob"])
    there = sa.text("blob != ''")
    op.create_index("ix_industrial_verdicts_pictures", TABLE, ["event_time", "sequence"], sqlite_where=there, postgresql_where=there)


def downgrade() -> None:
    op.drop_index("ix_industrial_verdicts_pictures", TABLE)
    op.drop_index("ix_industrial_verdicts_blob", TABLE)
    op.drop_column(TABLE, "blob")
