"""Futures: the outcomes of accepted operations, waited for and read from the ledger."""

from __future__ import annotations

import time
from collections.abc import Collection

from tinkercloud.codec import decode
from tinkercloud.control.arrivals import Arrivals, within
from tinkercloud.control.base_models import BaseModels, how_to_serve
from tinkercloud.control.sampler_desk import client_key
from tinkercloud.errors import Ended, NotFound
from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.records import Entry, ModelRecord, Outcome, SamplerRecord

LINGER_SECONDS = 2
"""How long a poll that waits for nothing (`timeout` 0) is kept while its client still fetches what it was told of.

The SDK, whose own limit for these polls is 5 s, sends one as soon as it has heard of the last sample that it waits
for, and one more when it has fetched it. Kept, the first also hears of the next sample: where samples are asked for one
after the other, that is one poll for each in the place of three.
"""


class Futures:
    """What clients wait for: how accepted operations end, and why those that do not are paused."""

    def __init__(self, ledger: Ledger, arrivals: Arrivals, models: BaseModels):
        self._ledger = ledger
        self._arrivals = arrivals
        self._models = models

    async def outcome(self, request_id: str, owner: str, timeout: float) -> tuple[Entry, Outcome | None]:
        """Wait up to `timeout` seconds for a request to end; (entry, None) if it has not. NotFound, Ended."""
        with self._arrivals.listen(request_id) as arrived:
            entry = await self._owned_entry(request_id, owner)
            if entry.state == "accepted":
                await within(arrived, timeout)
                entry = await self._ledger.entry(request_id) or entry
        if entry.state == "accepted":
            return entry, None
        stored = None if entry.expired else await self._ledger.outcome(request_id)
        if stored is None:
            raise Ended(f"the result of {request_id} was retrieved and is past its retention; send the request again")
        await self._ledger.retrieved(request_id)
        return entry, decode(stored, Outcome)

    async def paused(self, entry: Entry) -> str | None:
        """Why an operation that has not ended does not go on for now, and what would let it; None if it does."""
        stream = await self._stream(entry)
        if stream is None:
            return None
        if (why := self._models.other_weights(stream)) is not None:
            return f"{why}. This request goes on then"
        if stream.base_model in self._models:
            if (failure := self._models.get(stream.base_model).engine.failure) is not None:
                return (
                    f"base model {stream.base_model} cannot be served: {failure}. This request is kept and goes on when"
                    " whoever runs the server has mended that and started it again"
                )
            return await self._waits_for_a_place(entry, stream.base_model) if entry.kind == "sample" else None
        return (
            f"base model {stream.base_model} is not served now; this request is kept and goes on when it is: "
            f"whoever runs the server can {how_to_serve(stream.base_model)}"
        )

    async def _waits_for_a_place(self, sample: Entry, base_model: str) -> str | None:
        place = None if self._arrivals.closed else await self._models.get(base_model).desk.place(sample.request_id)
        if place is None or place.has_begun:
            return None
        return (
            f"{place.load.waiting} sequences wait for {base_model}, which draws {place.load.places} at a time; this "
            "sample begins when its turn comes, after others of its session and beside those of other sessions"
        )

    async def completions(
        self, sampler: SamplerRecord, client: int, told: int, retrieved: Collection[str], timeout: float
    ) -> list[Entry]:
        """Ended samples of one client of a sampler, in order of completion, behind `told`, the last one that it knows
        of; waits for the first one.

        Results of the `retrieved` requests have reached the client, so they need not be kept. Ids of anything else are
        ignored.
        """
        for request_id in retrieved:
            if request_id.rpartition(":")[0] == sampler.sampler_id:
                await self._ledger.retrieved(request_id, acknowledged=True)
        if timeout == 0 and await self._is_being_fetched(sampler, client, told, retrieved):
            timeout = LINGER_SECONDS
        deadline = time.monotonic() + timeout
        while True:
            with self._arrivals.listen(client_key(sampler.sampler_id, client)) as arrived:
                ended = await self._ledger.completions(sampler.sampler_id, client, told)
                if ended or time.monotonic() >= deadline or self._arrivals.closed:
                    return ended
                await within(arrived, deadline - time.monotonic())

    async def _is_being_fetched(
        self, sampler: SamplerRecord, client: int, completion: int, retrieved: Collection[str]
    ) -> bool:
        """Whether the sample of this client that a cursor stands at is none of those that were retrieved. None is at
        the beginning, 0, or if it is another client's."""
        ended = await self._ledger.completions(sampler.sampler_id, client, completion - 1) if completion else []
        return bool(ended) and ended[0].completion == completion and ended[0].request_id not in retrieved

    async def _owned_entry(self, request_id: str, owner: str) -> Entry:
        entry = await self._ledger.entry(request_id)
        stream = entry and await self._stream(entry)
        if entry is None or stream is None or stream.owner != owner:
            raise NotFound(f"there is no request {request_id!r}")
        return entry

    async def _stream(self, entry: Entry) -> ModelRecord | SamplerRecord | None:
        """The training run or sampler that the operation is of."""
        return await self._ledger.get(SamplerRecord if entry.kind == "sample" else ModelRecord, entry.stream)
