"""Training runs and checkpoints know their optimizer; those that are there have AdamW."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

TABLES = ("models", "checkpoints")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("optimizer", sa.String(), nullable=False, server_default="adamw"))


def downgrade() -> None:
    for table in TABLES:
        with op.batch_alter_table(table) as batch:
            batch.drop_column("optimizer")
