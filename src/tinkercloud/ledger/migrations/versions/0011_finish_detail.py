"""What a client says when it finishes a session; which checkpoints have a folder is looked up by an index."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.add_column("sessions", sa.Column("finish_detail", sa.String(), nullable=True))
    op.create_index("ix_checkpoints_folder", "checkpoints", ["folder"])


def downgrade() -> None:
    op.drop_index("ix_checkpoints_folder", "checkpoints")
    op.drop_column("sessions", "finish_detail")
