"""Samplers may follow a training run; those that are there have weights that never change."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("samplers", sa.Column("follows", sa.String(), nullable=True))
    op.add_column("samplers", sa.Column("version", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_index("ix_samplers_follows", "samplers", ["follows"])


def downgrade() -> None:
    op.drop_index("ix_samplers_follows", "samplers")
    with op.batch_alter_table("samplers") as batch:
        batch.drop_column("version")
        batch.drop_column("follows")
