"""The sequences that wait for a place, and whose turn it is: tenants share a sampler's places evenly.

A tenant that asks for two thousand sequences and one that asks for one each come to their turn: places are max-min
fair, and where two tenants have as many, whoever was served the fewest tokens goes first. Within a tenant it is the
order of arrival.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from tinkercloud.engine.torch.sequences import Request, Sequence


class WaitingSequences:
    """A queue for each tenant, and the tokens that each was served while it had something to run."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Sequence]] = {}
        self._served: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    @property
    def lengths(self) -> dict[str, int]:
        """How many sequences of each tenant wait, of those that have any."""
        return {tenant: len(queue) for tenant, queue in self._queues.items()}

    def add(self, request: Request, running: Iterable[Sequence]) -> None:
        """Let a request's sequences wait behind their tenant's others. A tenant that has nothing else, waiting or
        `running`, begins as if it had been served as much as whoever was served least: silence earns nothing."""
        active = self._queues.keys() | {sequence.tenant for sequence in running}
        self._served = {tenant: tokens for tenant, tokens in self._served.items() if tenant in active}
        self._served.setdefault(request.tenant, min(self._served.values(), default=0))
        self._queues.setdefault(request.tenant, deque()).extend(request.sequences)

    def put_back(self, sequence: Sequence) -> None:
        """Let a sequence that ran wait before its tenant's others."""
        self._queues.setdefault(sequence.tenant, deque()).appendleft(sequence)

    def take(self, sequence: Sequence) -> None:
        """It has got a place."""
        queue = self._queues[sequence.tenant]
        queue.remove(sequence)
        if not queue:
            del self._queues[sequence.tenant]

    def discard(self, request: Request) -> None:
        """Forget a request's sequences."""
        left = deque(sequence for sequence in self._queues.pop(request.tenant, ()) if sequence.request is not request)
        if left:
            self._queues[request.tenant] = left

    def in_turn(self, places: Counter[str]) -> Iterator[Sequence]:
        """What waits, in the order in which it is to start. `places`: how many sequences of each tenant run, to be kept
        up to date by whoever starts one."""
        left = {tenant: iter(tuple(queue)) for tenant, queue in self._queues.items()}
        while left:
            tenant = min(left, key=lambda tenant: (places[tenant], self._served[tenant]))
            sequence = next(left[tenant], None)
            if sequence is None:
                del left[tenant]
            else:
                yield sequence

    def serve(self, sequence: Sequence, tokens: int) -> None:
        """So many of its tokens run now."""
        self._served[sequence.tenant] += tokens

    def served(self, sequence: Sequence) -> int:
        """The tokens that its tenant was served."""
        return self._served[sequence.tenant]
