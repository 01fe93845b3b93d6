"""Verdicts of the industrial app and the operator's decisions on them."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "industrial_verdicts",
        sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("frame_id", sa.String(200), nullable=False, unique=True),
        sa.Column("event_time", sa.String(40), nullable=False, index=True),
        sa.Column("station", sa.String(200), nullable=False),
        sa.Column("recipe", sa.String(64), nullable=False, index=True),
        sa.Column("lot", sa.String(200), nullable=False),
        sa.Column("verdict", sa.String(8), nullable=False, index=True),
        sa.Column("score", sa.Float, nullable=False),
        sa.Column("detail", sa.LargeBinary, nullable=False),
        sa.Column("judged", sa.String(8), nullable=False),
        sa.Column("judged_by", sa.String(200), nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("trace_id", sa.String(32), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("industrial_verdicts")
