"""The two ways into an engine. Every engine folder beside this file implements one or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tinkercloud.engine.base_model import AdapterMemory, BaseModelInfo
from tinkercloud.engine.operations import CancelSample, CloseSampler, FindSample, OpenSampler, Sample, TrainOperation
from tinkercloud.engine.results import Place, Result, SamplerLoad


class Turns(Protocol):
    """Those who share the device with a trainer."""

    @property
    def wanted(self) -> bool:
        """Whether they have work for it, or are about to: then micro-batches should be short."""
        ...

    def next(self) -> None:
        """A micro-batch, or an operation that has none, has ended: let them have their turn."""
        ...


class Alone:
    """Nobody: the `Turns` of a trainer that has the device for itself."""

    wanted = False

    def next(self) -> None:
        """Go on at once."""


class Trainer(Protocol):
    """Trains many adapters over one frozen base model. Called from one thread."""

    info: BaseModelInfo

    def run(self, cycle: Sequence[TrainOperation], turns: Turns) -> list[Result]:
        """Run one cycle: operations of *different* models, in any mixture, to completion.

        All forward_backward operations of the cycle share packed batches. One operation's failure is its own: it comes
        back as a `Failure` in its place and leaves the other operations, and its own model, untouched.
        `turns.next` is called after each micro-batch, and after each operation that has none. No number depends on how
        long micro-batches are.
        """
        ...

    @property
    def adapter_memory(self) -> AdapterMemory:
        """What its adapters take now."""
        ...


class Sampler(Protocol):
    """Draws continuations with continuous batching. Called from one thread."""

    info: BaseModelInfo

    def open(self, operation: OpenSampler) -> Result:
        """Load weights, and take requests for them from now on. `Done`, or a `Failure` that leaves nothing open."""
        ...

    def close(self, operation: CloseSampler) -> Result:
        """Take no more requests for these weights; those that it has go on. `Done`, also if it was not open."""
        ...

    def submit(self, operation: Sample) -> None:
        """Accept a request; its result comes from a later `step`."""
        ...

    def cancel(self, operation: CancelSample) -> Result:
        """Give up a request, whose `Failure` comes from the next `step`. `Done`, also if it has ended or is unknown."""
        ...

    def find(self, operation: FindSample) -> Place:
        """Where a request stands."""
        ...

    @property
    def load(self) -> SamplerLoad:
        """What all requests take."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or running."""
        ...

    def step(self) -> list[tuple[str, Result]]:
        """Admit what fits, advance every running sequence by one token, return (request_id, result) of what ended."""
        ...
