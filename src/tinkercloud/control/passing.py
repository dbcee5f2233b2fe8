"""Failures of the machine, not of what was to be done: a full disk, a database that restarts."""

from __future__ import annotations

from sqlalchemy.exc import SQLAlchemyError

from tinkercloud.errors import Unavailable

PASSING = (Unavailable, OSError, SQLAlchemyError)
"""What may pass, so that the same is tried again; anything else is wrong with what was stored."""

RETRY_SECONDS = 1.0
"""Pause before something runs again that failed for such a reason."""
