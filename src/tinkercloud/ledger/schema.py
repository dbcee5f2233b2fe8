"""The ledger's tables.

SQL holds what is searched and ordered, and small blobs; large payloads and outcomes lie in segment files
(`segments.py`) and are named here by (segment, offset, length). A change here needs a migration beside
`migrations/versions/0001_initial.py`; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    text,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)

_JSON = JSON(none_as_null=True)

sessions = Table(
    "sessions",
    metadata,
    Column("session_id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("last_heartbeat", Float, nullable=False),
    Column("state", String, nullable=False),
    Column("sdk_version", String, nullable=False),
    Column("tags", _JSON, nullable=False),
    Column("user_metadata", _JSON, nullable=False),
    Column("display_name", String),
    Column("project_id", String),
    Column("finish_reason", String),
    Column("finish_detail", String),
    Index(None, "owner", "created_at"),
    Index(None, "state", "created_at"),
)

models = Table(
    "models",
    metadata,
    Column("model_id", String, primary_key=True),
    Column("session_id", String, nullable=False),
    Column("model_seq_id", BigInteger, nullable=False),
    Column("owner", String, nullable=False),
    Column("base_model", String, nullable=False),
    Column("lora", _JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("last_request_at", Float, nullable=False),
    Column("state", String, nullable=False),
    Column("applied_seq", BigInteger, nullable=False),
    Column("user_metadata", _JSON, nullable=False),
    Column("optimizer", String, nullable=False, server_default="adamw"),
    Column("base_fingerprint", String, nullable=False, server_default=""),
    Index(None, "session_id", "model_seq_id", unique=True),
    Index(None, "owner", "created_at"),
)

samplers = Table(
    "samplers",
    metadata,
    Column("sampler_id", String, primary_key=True),
    Column("session_id", String, nullable=False),
    Column("owner", String, nullable=False),
    Column("base_model", String, nullable=False),
    Column("model_path", String),
    Column("folder", String, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("clients", Integer, nullable=False),
    Column("follows", String),
    Column("version", BigInteger, nullable=False, server_default="0"),
    Column("base_fingerprint", String, nullable=False, server_default=""),
    Index(None, "session_id"),
    Index(None, "folder"),
    Index(None, "follows"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("path", String, primary_key=True),
    Column("model_id", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("name", String, nullable=False),
    Column("owner", String, nullable=False),
    Column("base_model", String, nullable=False),
    Column("lora", _JSON, nullable=False),
    Column("folder", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("public", Boolean, nullable=False),
    Column("user_metadata", _JSON),
    Column("optimizer", String, nullable=False, server_default="adamw"),
    Column("base_fingerprint", String, nullable=False, server_default=""),
    Index(None, "model_id"),
    Index(None, "folder"),
    Index(None, "owner", "created_at"),
    Index(None, "expires_at"),
)

past_checkpoints = Table(
    "past_checkpoints",
    metadata,
    Column("path", String, nullable=False),
    Column("model_id", String, nullable=False),
    Column("owner", String, nullable=False),
    Column("base_model", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("removed_at", Float, nullable=False),
    Index(None, "owner", "removed_at"),
)
"""One row for each checkpoint that was removed or replaced: for how long it was stored."""

snapshots = Table(
    "snapshots",
    metadata,
    Column("model_id", String, primary_key=True),
    Column("seq_id", BigInteger, primary_key=True, autoincrement=False),
    Column("folder", String, nullable=False),
    Column("created_at", Float, nullable=False),
)

entries = Table(
    "entries",
    metadata,
    Column("request_id", String, primary_key=True),
    Column("stream", String, nullable=False),
    Column("seq_id", BigInteger, nullable=False),
    Column("kind", String, nullable=False),
    Column("state", String, nullable=False),
    Column("num_tokens", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("kept_until", Float),
    Column("completion", BigInteger, nullable=False),
    Column("result_bytes", BigInteger, nullable=False),
    Column("cleared_gradients", Boolean, nullable=False),
    Column("expired_at", Float),
    Column("build", String),
    Column("started_at", Float),
    Column("ended_at", Float),
    Column("steps", _JSON),
    Column("details", _JSON, nullable=False),
    Column("payload_segment", Integer),
    Column("payload_offset", BigInteger),
    Column("payload_length", BigInteger),
    Column("outcome_segment", Integer),
    Column("outcome_offset", BigInteger),
    Column("outcome_length", BigInteger),
    Index(None, "stream", "seq_id", unique=True),
    Index(None, "stream", "completion"),
    Index(None, "completion"),
)
"""One row for each operation; (stream, seq_id) is its place, `completion` the order in which operations ended. Payload
and outcome go at `expires_at`, which is never before `kept_until`."""

IS_ACCEPTED = text("state = 'accepted'")
"""The condition of a partial index; a query must say it in the same words to use it."""

IS_KEPT = text("expired_at IS NULL")
"""Likewise: the entry's payload and outcome are still there."""

Index("ix_entries_accepted", entries.c.stream, sqlite_where=IS_ACCEPTED, postgresql_where=IS_ACCEPTED)
Index("ix_entries_kept", entries.c.expires_at, sqlite_where=IS_KEPT, postgresql_where=IS_KEPT)

usage = Table(
    "usage",
    metadata,
    Column("owner", String, primary_key=True),
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    Column("session_id", String, primary_key=True),
    Column("model_id", String, primary_key=True),
    Column("kind", String, primary_key=True),
    Column("base_model", String, nullable=False),
    Column("tokens", BigInteger, nullable=False),
)
"""Tokens by owner and hour (`records.Usage`)."""

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", Integer, primary_key=True),
    Column("digest", String, nullable=False),
    Column("hint", String, nullable=False),
    Column("owner", String, nullable=False),
    Column("name", String, nullable=False),
    Column("is_operator", Boolean, nullable=False),
    Column("project_id", String),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    Column("max_models", Integer),
    Column("max_storage_bytes", BigInteger),
    Column("max_daily_tokens", BigInteger),
    Index(None, "digest", unique=True),
)
"""Rows stay for ever: what was made with a key outlives it, and a server that had keys does without none again."""

audit_log = Table(
    "audit_log",
    metadata,
    Column("audit_id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("actor", String, nullable=False),
    Column("key_id", Integer),
    Column("event", String, nullable=False),
    Column("resource", String, nullable=False),
    Column("details", _JSON, nullable=False),
    Index(None, "at"),
)
"""Rows are only ever added."""

small_blobs = Table(
    "small_blobs",
    metadata,
    Column("request_id", String, primary_key=True),
    Column("part", String, primary_key=True),
    Column("data", LargeBinary, nullable=False),
    Column("crc", BigInteger, nullable=False),
)
"""Payloads and outcomes ("part") too small for a segment file: here they cost no second wait for the disk."""

segments = Table(
    "segments",
    metadata,
    Column("segment", Integer, primary_key=True, autoincrement=False),
    Column("blobs", BigInteger, nullable=False),
)
"""How many blobs in each segment file are still referenced; at 0 the file can go."""
