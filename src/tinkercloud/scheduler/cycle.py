"""Which operations run next: pure functions over what is waiting.

A *cycle* is one call into an engine: at most one operation of each model, so that each model's own order holds, and as
many different models as the token budget allows, so that their forward_backward operations share packed batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct


class Waiting(Struct, frozen=True):
    """The next runnable operation of one model."""

    model_id: str
    owner: str
    request_id: str
    num_tokens: int
    """Training tokens that it will run; 0 for a step, a save or a load."""
    arrived_at: float


def next_cycle(waiting: Sequence[Waiting], token_budget: int, served: Mapping[str, float]) -> list[Waiting]:
    """Choose the operations of the next cycle.

    Fair by tokens, not by requests: whoever has been served the fewest tokens goes first (`served`: owner -> tokens so
    far), then whoever has waited longest. An owner's later models in the same cycle count as if its earlier ones had
    already been served. The first operation is always taken, whatever its size; operations without tokens always fit.
    """
    tokens = 0
    chosen: list[Waiting] = []
    spent = dict(served)
    remaining = sorted(waiting, key=lambda w: (w.arrived_at, w.request_id))
    while remaining:
        candidate = min(remaining, key=lambda w: spent.get(w.owner, 0.0))  # the earliest of those served least
        remaining.remove(candidate)
        if tokens and candidate.num_tokens and tokens + candidate.num_tokens > token_budget:
            continue
        chosen.append(candidate)
        tokens += candidate.num_tokens
        spent[candidate.owner] = spent.get(candidate.owner, 0.0) + candidate.num_tokens
    return chosen


def charge(served: dict[str, float], cycle: Iterable[Waiting], active: Iterable[str]) -> dict[str, float]:
    """What each owner has been served after a cycle.

    Owners that have nothing waiting are forgotten, and a newcomer starts level with the least served of the active
    ones: being idle earns no credit, being new costs none.
    """
    cycle = list(cycle)
    owners = set(active) | {w.owner for w in cycle}
    known = [tokens for owner, tokens in served.items() if owner in owners]
    floor = min(known, default=0.0)
    after = {owner: served.get(owner, floor) - floor for owner in owners}
    for operation in cycle:
        after[operation.owner] += operation.num_tokens
    return after
