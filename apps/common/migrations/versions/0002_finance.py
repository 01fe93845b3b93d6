"""Transactions with their decisions, labels, verdicts and the alert budget of the finance app."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "finance_transactions",
        sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("transaction_id", sa.String(200), nullable=False, unique=True),
        sa.Column("event_us", sa.BigInteger, nullable=False, index=True),
        sa.Column("customer_id", sa.String(200), nullable=False),
        sa.Column("terminal_id", sa.String(200), nullable=False),
        sa.Column("amount_minor", sa.BigInteger, nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("features", sa.LargeBinary, nullable=False),
        sa.Column("score", sa.Float, nullable=False),
        sa.Column("decision", sa.String(8), nullable=False),
        sa.Column("threshold", sa.Float, nullable=False),
        sa.Column("detail", sa.LargeBinary, nullable=False),
        sa.Column("traceparent", sa.String(64), nullable=False),
        sa.Column("published", sa.Boolean, nullable=False),
        sa.Column("part", sa.Integer, nullable=False),
        sa.Column("pos", sa.BigInteger, nullable=False),
    )
    op.create_index("finance_by_customer", "finance_transactions", ["customer_id", "event_us"])
    op.create_index("finance_by_terminal", "finance_transactions", ["terminal_id", "event_us"])
    op.create_index("finance_by_decision", "finance_transactions", ["decision", "event_us"])
    waiting = sa.text("NOT published")
    op.create_index("finance_unpublished", "finance_transactions", ["sequence"], sqlite_where=waiting, postgresql_where=waiting)
    op.create_table(
        "finance_labels",
        sa.Column("transaction_id", sa.String(200), primary_key=True),
        sa.Column("fraud", sa.Boolean, nullable=False),
        sa.Column("event_us", sa.BigInteger, nullable=False),
        sa.Column("source", sa.String(200), nullable=False),
    )
    op.create_table(
        "finance_verdicts",
        sa.Column("transaction_id", sa.String(200), primary_key=True),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(100), nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("time", sa.String(32), nullable=False),
    )
    op.create_table(
        "finance_settings",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.JSON, nullable=False),
    )


def downgrade() -> None:
    for table in ("finance_settings", "finance_verdicts", "finance_labels", "finance_transactions"):
        op.drop_table(table)
