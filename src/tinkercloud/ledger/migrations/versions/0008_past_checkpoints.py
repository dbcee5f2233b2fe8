"""The checkpoints that have gone, for what their storage has cost; those that went before are not known."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "past_checkpoints",
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("removed_at", sa.Float(), nullable=False),
    )
    op.create_index("ix_past_checkpoints_owner_removed_at", "past_checkpoints", ["owner", "removed_at"])


def downgrade() -> None:
    op.drop_table("past_checkpoints")
