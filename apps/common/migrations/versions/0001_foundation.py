"""The audit log, and the medical worklist."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("time", sa.String(32), nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("action", sa.String(100), nullable=False),
        sa.Column("subject", sa.String(200), nullable=False, index=True),
        sa.Column("detail", sa.JSON, nullable=False),
        sa.Column("trace_id", sa.String(32), nullable=False),
    )
    op.create_table(
        "medical_studies",
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


def downgrade() -> None:
    op.drop_table("medical_studies")
    op.drop_table("audit")
