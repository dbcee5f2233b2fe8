"""Inflight samplers: those of one training run all sample from the newest weights that were saved for one of them.

Each save makes a sampler of its own, whose record names the run that it follows; the record with the highest version is
the run's newest, and its folder has the weights of all of them. So there is nothing to keep but the records.

Weights that cannot be opened are nobody's but their own sampler's, until they can: the run's others go on with those
before, which are as new as the saves that made them promised. So the folder of older weights goes when newer ones have
been opened, and not before; until then it stays over restarts too.
"""

from __future__ import annotations

from collections.abc import Iterable

from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.recent import LRU
from tinkercloud.ledger.records import SamplerRecord

SUPERSEDED = 100
"""Samplers whose folders are removed together when newer weights have been opened: more are there only after as many
saves that could not be opened."""

RUNS = 1000
"""How many runs' newest samplers are remembered; those of others are looked up in the ledger."""


class InflightWeights:
    """Which weights a sampler samples from now."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._newest: LRU[SamplerRecord] = LRU(RUNS)
        self._unreadable: LRU[str] = LRU(RUNS)
        """Folders of weights that could not be opened."""
        self._superseded: LRU[int] = LRU(RUNS)
        """Of each run the version before which all folders were told of."""

    async def of(self, sampler: SamplerRecord) -> SamplerRecord:
        """The sampler whose folder has this one's weights: itself, or of an inflight one its run's newest."""
        if sampler.follows is None:
            return sampler
        newest = await self.newest(sampler.follows)
        return sampler if newest is None or newest.version < sampler.version else newest

    async def newest(self, model_id: str) -> SamplerRecord | None:
        """A run's newest inflight sampler whose weights can be opened; None if there is none."""
        if self._newest.get(model_id) is None:
            samplers = await self._ledger.find(SamplerRecord, follows=model_id)
            for known in newest_of(one for one in samplers if self._unreadable.get(one.folder) is None):
                self.publish(known)
        return self._newest.get(model_id)

    def cannot_open(self, weights: SamplerRecord) -> None:
        """Its weights cannot be opened, so they are not its run's."""
        assert weights.follows is not None
        self._unreadable.put(weights.folder, weights.folder)
        self._newest.drop(weights.follows)

    def opened(self, weights: SamplerRecord) -> None:
        """Its weights are open: they are its run's again if they could not be opened before."""
        if weights.follows is not None:
            self._unreadable.drop(weights.folder)
            self.publish(weights)

    async def superseded(self, weights: SamplerRecord) -> list[str]:
        """The folders that nobody needs any more when these weights are open, but for those that an earlier call has
        told of; after a start most are gone already."""
        if weights.follows is None:
            return []
        told = self._superseded.get(weights.follows) or 0
        if told >= weights.version:
            return []
        samplers = await self._ledger.find(SamplerRecord, follows=weights.follows, limit=SUPERSEDED)
        older = {one.folder for one in samplers if told <= one.version < weights.version}
        self._superseded.put(weights.follows, max(told, weights.version))
        return sorted(older - {weights.folder})

    async def leave(self, sampler: SamplerRecord) -> bool:
        """An inflight sampler is about to be removed from the ledger: if it has its run's weights, another one that
        follows the run has them from now on. False if there is none, and the weights may go."""
        if sampler.follows is None:
            return False
        followers = await self._ledger.find(SamplerRecord, follows=sampler.follows)  # newest first
        others = [other for other in followers if other.sampler_id != sampler.sampler_id]
        is_newest = (await self.of(sampler)).sampler_id == sampler.sampler_id
        if others and is_newest:
            folder, version = sampler.folder, sampler.version
            heir = await self._ledger.change(SamplerRecord, others[0].sampler_id, folder=folder, version=version)
            if heir is not None:
                self._newest.put(sampler.follows, heir)
        return bool(others) and is_newest

    def publish(self, sampler: SamplerRecord) -> None:
        """An inflight sampler is in the ledger: its weights are its run's, unless newer ones are known."""
        assert sampler.follows is not None
        known = self._newest.get(sampler.follows)
        if known is None or known.version < sampler.version:
            self._newest.put(sampler.follows, sampler)


def newest_of(samplers: Iterable[SamplerRecord]) -> list[SamplerRecord]:
    """Those among them that have weights of their own: all but the inflight ones that a newer one has superseded."""
    newest: dict[str, SamplerRecord] = {}
    for sampler in samplers:
        key = sampler.follows or f" {sampler.sampler_id}"
        if key not in newest or newest[key].version < sampler.version:
            newest[key] = sampler
    return list(newest.values())
