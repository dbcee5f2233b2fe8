"""The sequences that wait for a place, and whose turn it is: tenants share a sampler's places evenly.

A tenant that asks for two thousand sequences and one that asks for one each come to their turn: places are max-min
fair, and where two tenants have as many, whoever was served the fewest tokens goes first. Within a tenant it is the
order of arrival.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from tinkercloud.engine.torch.sequences import Request, Sequence


class _Queue:
    """One tenant's sequences in order. Any of them leaves at once, however many there are: many are cancelled."""

    def __init__(self) -> None:
        self._back: dict[Sequence, None] = {}
        """Those that were put back, the last one first in order."""
        self._new: dict[Sequence, None] = {}

    def __len__(self) -> int:
        return len(self._back) + len(self._new)

    def append(self, sequences: Iterable[Sequence]) -> None:
        """Let them wait behind all others."""
        self._new.update(dict.fromkeys(sequences))

    def put_back(self, sequence: Sequence) -> None:
        """Let it wait before all others."""
        self._back[sequence] = None

    def remove(self, sequence: Sequence) -> None:
        """If it is there."""
        if sequence in self._back:
            del self._back[sequence]
        else:
            self._new.pop(sequence, None)

    def in_order(self) -> list[Sequence]:
        return [*reversed(self._back), *self._new]


class WaitingSequences:
    """A queue for each tenant, and the tokens that each was served while it had something to run."""

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}
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
        self._queues.setdefault(request.tenant, _Queue()).append(request.sequences)

    def put_back(self, sequence: Sequence) -> None:
        """Let a sequence that ran wait before its tenant's others."""
        self._queues.setdefault(sequence.tenant, _Queue()).put_back(sequence)

    def take(self, sequence: Sequence) -> None:
        """It has got a place."""
        queue = self._queues[sequence.tenant]
        queue.remove(sequence)
        if not queue:
            del self._queues[sequence.tenant]

    def discard(self, request: Request) -> None:
        """Forget a request's sequences."""
        queue = self._queues.pop(request.tenant, None)
        if queue is None:
            return
        for sequence in request.sequences:
            queue.remove(sequence)
        if queue:
            self._queues[request.tenant] = queue

    def in_turn(self, places: Counter[str]) -> Iterator[Sequence]:
        """What waits, in the order in which it is to start. `places`: how many sequences of each tenant run, to be kept
        up to date by whoever starts one."""
        left = {tenant: iter(queue.in_order()) for tenant, queue in self._queues.items()}
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
