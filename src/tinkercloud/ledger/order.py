"""The order in which one model's operations run: strictly by seq_id, whatever the order of their arrival."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from msgspec import Struct

from tinkercloud.engine.results import Failure
from tinkercloud.ledger.records import Entry

GAP_TIMEOUT = 360.0
"""Seconds after which a missing operation will not come any more: clients repeat a submission for 5 minutes."""


class Turn(Struct, frozen=True):
    """An operation whose turn it is: to be run, or to be completed with `failure` instead."""

    entry: Entry
    failure: Failure | None = None
    clear_gradients: bool = False
    """Clear the model's accumulated gradients first, and complete the entry with `cleared_gradients`."""
    lacks: Entry | None = None
    """The first forward_backward that the gradients lack: how that ended is why this fails."""


class ModelLog:
    """Takes entries as they arrive and gives turns in order of seq_id, never skipping one that has not arrived.

    - A refused entry is stepped over.
    - After a forward_backward that was refused, or that failed, the accumulated gradients lack its part. The next
      optim_step therefore fails and clears them.
    - If an operation stays missing for `gap_timeout` seconds while others wait behind it, those fail, naming it, and
      the log goes on behind them. Should it arrive after that, it fails too.

    Pure: no clock and no IO. `now` is in seconds and never goes back.
    """

    def __init__(self, applied_seq: int = -1, gap_timeout: float = GAP_TIMEOUT) -> None:
        self.next_seq = applied_seq + 1
        """The seq_id whose turn is next."""
        self.poisoned_by: Entry | None = None
        """The first forward_backward that the accumulated gradients lack."""
        self._lacking = 0
        """How many of them were refused or have failed."""
        self._gap_timeout = gap_timeout
        self._waiting: dict[int, tuple[Entry, float]] = {}
        self._overdue: deque[Turn] = deque()
        self._open: set[int] = set()
        """What has arrived and not ended, whether it waits or runs."""
        self._last_step = -1
        self._first_missing = self.next_seq
        """No later than the first one that has not arrived; never goes back, so that looking for it stays cheap."""
        self._lost = range(0)
        self._lost_until = -1

    @classmethod
    def recovered(
        cls,
        applied_seq: int,
        last_step: int,
        entries: Iterable[Entry],
        now: float,
        gap_timeout: float = GAP_TIMEOUT,
    ) -> ModelLog:
        """The log as it was, from its entries behind `last_step` (the newest optim_step that ended with no accumulated
        gradients; -1 for none) and all that have not ended, in order of seq_id."""
        recovered = cls(applied_seq, gap_timeout)
        recovered._last_step = last_step
        previous = last_step
        for entry in entries:
            if entry.seq_id > applied_seq or entry.state == "accepted":
                recovered.add(entry, now)
                continue
            if entry.seq_id > previous + 1 and recovered.poisoned_by is None:
                recovered.poisoned_by = entry
            previous = entry.seq_id
            recovered.ended(entry)
        return recovered

    # ------------------------------------------------------------ arrivals and ends

    def add(self, entry: Entry, now: float) -> None:
        """An accepted or refused entry has arrived, as the ledger has it now; one that is here already, or has ended,
        changes nothing."""
        if entry.seq_id in self._open or entry.state not in ("accepted", "refused"):
            return
        if entry.seq_id >= self.next_seq:
            self._open.add(entry.seq_id)
            self._waiting[entry.seq_id] = (entry, now)
        elif entry.state == "accepted":
            self._open.add(entry.seq_id)
            error = (
                f"{entry.kind} {entry.seq_id} was not run: it arrived after the model had gone on without it to "
                f"operation {self.next_seq} (after {self._gap_timeout:.0f} s); send it again as a new operation"
            )
            self._overdue.append(Turn(entry, Failure(error, "user")))

    def ended(self, entry: Entry) -> None:
        """How a turn ended, as the ledger recorded it. Tell it of every turn before an optim_step's is taken."""
        self._open.discard(entry.seq_id)
        if entry.kind == "forward_backward" and entry.state in ("refused", "failed"):
            if entry.seq_id > self._last_step:
                self.poisoned_by = self.poisoned_by or entry
                self._lacking += 1
        elif entry.kind == "load_weights" and entry.state == "done":
            self.poisoned_by, self._lacking = None, 0

    # ------------------------------------------------------------ turns

    def peek(self, now: float) -> Turn | None:
        """The turn that `take` would give."""
        if self._overdue:
            return self._overdue[0]
        self._pass_refused_and_lost(now)
        if self.next_seq not in self._waiting:
            return None
        entry = self._waiting[self.next_seq][0]
        is_step = entry.kind == "optim_step"
        if entry.seq_id <= self._lost_until:
            return Turn(entry, self._not_run(entry), clear_gradients=is_step)
        if is_step and self.poisoned_by is not None:
            failure = _not_applied(self.poisoned_by, self._lacking)
            return Turn(entry, failure, clear_gradients=True, lacks=self.poisoned_by)
        return Turn(entry)

    def take(self, now: float) -> Turn | None:
        """The next turn, which is then the caller's; None while there is none."""
        turn = self.peek(now)
        if turn is None:
            return None
        if self._overdue:
            self._overdue.popleft()
            return turn
        del self._waiting[self.next_seq]
        self.next_seq += 1
        if turn.entry.kind == "optim_step":
            self._last_step = turn.entry.seq_id
            self.poisoned_by, self._lacking = None, 0
        return turn

    def gap_deadline(self) -> float | None:
        """When to ask for a turn again even if nothing arrives; None if nothing waits behind a missing operation."""
        if not self._waiting or self.next_seq in self._waiting:
            return None
        # Since the first entry behind the gap arrived: `_waiting` is in order of arrival.
        return next(iter(self._waiting.values()))[1] + self._gap_timeout

    def lacks_before(self, seq_id: int) -> bool:
        """Whether an operation before this one has not arrived yet."""
        self._first_missing = max(self._first_missing, self.next_seq)
        while self._first_missing in self._waiting:
            self._first_missing += 1
        return self._first_missing < seq_id

    def __len__(self) -> int:
        """How many entries wait for their turn."""
        return len(self._waiting) + len(self._overdue)

    # ------------------------------------------------------------ inside

    def _pass_refused_and_lost(self, now: float) -> None:
        """Move `next_seq` to an accepted entry, or to one that is missing and may still come."""
        while self._waiting:
            if self.next_seq in self._waiting:
                entry = self._waiting[self.next_seq][0]
                if entry.state != "refused":
                    return
                del self._waiting[self.next_seq]
                self.next_seq += 1
                self.ended(entry)
                continue
            deadline = self.gap_deadline()
            is_lost = self.next_seq < self._lost_until
            if not is_lost and deadline is not None and now < deadline:
                return
            behind = min(self._waiting)
            if not is_lost:
                self._lost = range(self.next_seq, behind)
                self._lost_until = max(self._waiting)
            # What is missing may have been a forward_backward.
            self.poisoned_by = self.poisoned_by or self._waiting[behind][0]
            self.next_seq = behind

    def _not_run(self, entry: Entry) -> Failure:
        first, last = self._lost[0], self._lost[-1]
        missing = f"operation {first}" if first == last else f"operations {first} to {last}"
        error = (
            f"{entry.kind} {entry.seq_id} was not run: {missing} before it did not arrive within "
            f"{self._gap_timeout:.0f} s; send what was lost, and this after it, as new operations"
        )
        return Failure(error, "user")


def what_became_of(entry: Entry) -> str:
    """Of an operation that gave nothing, for the middle of a sentence."""
    return {"refused": "was refused", "failed": "failed"}.get(entry.state, "was not run")


def _not_applied(first: Entry, lacking: int) -> Failure:
    # By its request_id: a user of the SDK has not seen seq_ids, and its errors have the other.
    which = f"the first of {lacking}, with the request_id" if lacking > 1 else "with the request_id"
    error = (
        f"this optim_step was not applied: a {first.kind} before it {what_became_of(first)} ({which} "
        f"{first.request_id}), so the gradients lack its part. They have been cleared, all of them; send the whole "
        "batch again: the next forward_backward and optim_step are applied as ever"
    )
    return Failure(error, "user")
