"""Which weights the base model of a run, sampler or checkpoint had; of those that are there it is not known."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"

TABLES = ("models", "samplers", "checkpoints")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("base_fingerprint", sa.String(), nullable=False, server_default=""))


def downgrade() -> None:
    for table in TABLES:
        with op.batch_alter_table(table) as batch:
            batch.drop_column("base_fingerprint")
