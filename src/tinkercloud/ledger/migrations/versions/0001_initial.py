"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("lora", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("folder", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=True),
        sa.Column("public", sa.Boolean(), nullable=False),
        sa.Column("user_metadata", sa.JSON(none_as_null=True), nullable=True),
        sa.PrimaryKeyConstraint("path", name="pk_checkpoints"),
    )
    op.create_index("ix_checkpoints_model_id", "checkpoints", ["model_id"])
    op.create_index("ix_checkpoints_owner_created_at", "checkpoints", ["owner", "created_at"])
    op.create_table(
        "entries",
        sa.Column("request_id", sa.String(), nullable=False),
        sa.Column("stream", sa.String(), nullable=False),
        sa.Column("seq_id", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("num_tokens", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=True),
        sa.Column("completion", sa.BigInteger(), nullable=False),
        sa.Column("result_bytes", sa.BigInteger(), nullable=False),
        sa.Column("cleared_gradients", sa.Boolean(), nullable=False),
        sa.Column("expired_at", sa.Float(), nullable=True),
        sa.Column("details", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("payload_segment", sa.Integer(), nullable=True),
        sa.Column("payload_offset", sa.BigInteger(), nullable=True),
        sa.Column("payload_length", sa.BigInteger(), nullable=True),
        sa.Column("outcome_segment", sa.Integer(), nullable=True),
        sa.Column("outcome_offset", sa.BigInteger(), nullable=True),
        sa.Column("outcome_length", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("request_id", name="pk_entries"),
    )
    op.create_index(
        "ix_entries_accepted",
        "entries",
        ["stream"],
        sqlite_where=sa.text("state = 'accepted'"),
        postgresql_where=sa.text("state = 'accepted'"),
    )
    op.create_index("ix_entries_completion", "entries", ["completion"])
    op.create_index(
        "ix_entries_kept",
        "entries",
        ["expires_at"],
        sqlite_where=sa.text("expired_at IS NULL"),
        postgresql_where=sa.text("expired_at IS NULL"),
    )
    op.create_index("ix_entries_stream_completion", "entries", ["stream", "completion"])
    op.create_index("ix_entries_stream_seq_id", "entries", ["stream", "seq_id"], unique=True)
    op.create_table(
        "models",
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("session_id", sa.String(), nullable=False),
        sa.Column("model_seq_id", sa.BigInteger(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("lora", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("last_request_at", sa.Float(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("applied_seq", sa.BigInteger(), nullable=False),
        sa.Column("user_metadata", sa.JSON(none_as_null=True), nullable=False),
        sa.PrimaryKeyConstraint("model_id", name="pk_models"),
    )
    op.create_index("ix_models_owner_created_at", "models", ["owner", "created_at"])
    op.create_index("ix_models_session_id_model_seq_id", "models", ["session_id", "model_seq_id"], unique=True)
    op.create_table(
        "samplers",
        sa.Column("sampler_id", sa.String(), nullable=False),
        sa.Column("session_id", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("model_path", sa.String(), nullable=True),
        sa.Column("folder", sa.String(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("clients", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("sampler_id", name="pk_samplers"),
    )
    op.create_index("ix_samplers_session_id", "samplers", ["session_id"])
    op.create_table(
        "segments",
        sa.Column("segment", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("blobs", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("segment", name="pk_segments"),
    )
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("last_heartbeat", sa.Float(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("sdk_version", sa.String(), nullable=False),
        sa.Column("tags", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("user_metadata", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("display_name", sa.String(), nullable=True),
        sa.Column("project_id", sa.String(), nullable=True),
        sa.Column("finish_reason", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("session_id", name="pk_sessions"),
    )
    op.create_index("ix_sessions_owner_created_at", "sessions", ["owner", "created_at"])
    op.create_table(
        "small_blobs",
        sa.Column("request_id", sa.String(), nullable=False),
        sa.Column("part", sa.String(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.Column("crc", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("request_id", "part", name="pk_small_blobs"),
    )
    op.create_table(
        "snapshots",
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("seq_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("folder", sa.String(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("model_id", "seq_id", name="pk_snapshots"),
    )


def downgrade() -> None:
    for table in ("checkpoints", "entries", "models", "samplers", "segments", "sessions", "small_blobs", "snapshots"):
        op.drop_table(table)
