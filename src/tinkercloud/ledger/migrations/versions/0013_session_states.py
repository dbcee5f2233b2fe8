"""Which sessions are active or parked is looked up every few seconds, by an index."""

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.create_index("ix_sessions_state_created_at", "sessions", ["state", "created_at"])


def downgrade() -> None:
    op.drop_index("ix_sessions_state_created_at", "sessions")
