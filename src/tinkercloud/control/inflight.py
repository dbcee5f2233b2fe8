"""Inflight samplers: those of one training run all sample from the newest weights that were saved for one of them.

Each save makes a sampler of its own, whose record names the run that it follows; the record with the highest version is
the run's newest, and its folder has the weights of all of them. So there is nothing to keep but the records.
"""

from __future__ import annotations

from collections.abc import Iterable

from tinkercloud.ledger.ledger import Ledger
from tinkercloud.ledger.recent import LRU
from tinkercloud.ledger.records import SamplerRecord

RUNS = 1000
"""How many runs' newest samplers are remembered; those of others are looked up in the ledger."""


class InflightWeights:
    """Which weights a sampler samples from now."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._newest: LRU[SamplerRecord] = LRU(RUNS)

    async def of(self, sampler: SamplerRecord) -> SamplerRecord:
        """The sampler whose folder has this one's weights: itself, or of an inflight one its run's newest."""
        if sampler.follows is None:
            return sampler
        return await self.newest(sampler.follows) or sampler

    async def newest(self, model_id: str) -> SamplerRecord | None:
        """A run's newest inflight sampler; None if it never had one."""
        if self._newest.get(model_id) is None:
            for known in newest_of(await self._ledger.find(SamplerRecord, follows=model_id)):
                self.publish(known)
        return self._newest.get(model_id)

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
