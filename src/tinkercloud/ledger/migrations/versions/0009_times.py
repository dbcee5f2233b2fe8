"""When operations ran; of those that have ended before, nobody knows."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("entries", sa.Column("started_at", sa.Float()))
    op.add_column("entries", sa.Column("ended_at", sa.Float()))
    op.add_column("entries", sa.Column("steps", sa.JSON(none_as_null=True)))


def downgrade() -> None:
    for name in ("steps", "ended_at", "started_at"):
        op.drop_column("entries", name)
