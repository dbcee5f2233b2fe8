"""Which sessions a search is for."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from tinkercloud.ledger.records import SessionRecord
from tinkercloud.ledger.search import Place

Status = Literal["active", "silent", "client_finished", "cancelled"]
"""silent: its client was not heard of for a while, and may come back; cancelled: the server or who runs it ended it."""

CLIENT_REASONS = ("success", "errored", "interrupted")
"""Why a session can have finished that its client ended."""


class SessionQuery(Struct, frozen=True):
    """What a session must be to be found (SDK `SessionSearchRequest`); None asks for nothing."""

    session_id: str | None = None
    display_name: str | None = None
    """Words that must all be in the name, whatever their case. With `session_id`, either one will do."""
    project_ids: tuple[str, ...] | None = None
    user_metadata: dict[str, str] = {}
    statuses: tuple[tuple[Status, tuple[str, ...] | None], ...] | None = None
    """(status, the finish reasons that it must have)"""
    limit: int = 50
    behind: Place | None = None

    def matches(self, session: SessionRecord) -> bool:
        """Whether a session is one of those."""
        return (
            self._is_named(session)
            and (self.project_ids is None or session.project_id in self.project_ids)
            and all(session.user_metadata.get(key) == value for key, value in self.user_metadata.items())
            and (self.statuses is None or any(_has_status(session, *wanted) for wanted in self.statuses))
        )

    def _is_named(self, session: SessionRecord) -> bool:
        if self.session_id is None and self.display_name is None:
            return True
        if self.session_id == session.session_id:
            return True
        name = (session.display_name or "").casefold()
        return self.display_name is not None and all(word in name for word in self.display_name.casefold().split())


def status_of(session: SessionRecord) -> Status:
    """How a session stands."""
    if session.state == "finished":
        return "client_finished" if session.finish_reason in CLIENT_REASONS else "cancelled"
    return "active" if session.state == "active" else "silent"


def _has_status(session: SessionRecord, status: Status, reasons: tuple[str, ...] | None) -> bool:
    return status_of(session) == status and (reasons is None or session.finish_reason in reasons)
