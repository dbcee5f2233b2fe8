"""The JSON and the times that clients read."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from fastapi.responses import JSONResponse


class Json(JSONResponse):
    """A JSON answer that can always be written: ASCII, NaN as Python writes and reads it, the unknown as its text."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":"), default=str).encode()


def iso(seconds: float) -> str:
    """Seconds since the epoch as the SDK's datetimes, ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def text_metadata(metadata: dict[str, Any] | None) -> dict[str, str]:
    """User metadata as the SDK reads it back, every value a string (it may have been written as anything)."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
