"""The state of a sample: one request, and one sequence for each continuation that it asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from tinkercloud.engine.operations import Sample
from tinkercloud.engine.results import SampledSequence, SampleOutput, TopLogprobs
from tinkercloud.engine.torch.lora import AdapterWeights
from tinkercloud.engine.torch.prefix_cache import Namespace, Node, page_keys
from tinkercloud.engine.torch.prompt_scoring import PromptScores
from tinkercloud.engine.torch.sampling import random_stream
from tinkercloud.engine.torch.stopping import StopCondition


@dataclass(eq=False)
class OpenedSampler:
    """Weights to sample from. Those that samplers share change between two steps, others never."""

    order: int
    """Rows of a step are sorted by it, so that each adapter's rows are contiguous: the same for all owners' samplers of
    one adapter."""
    folder: str
    adapter: AdapterWeights | None
    """None is the base model."""
    owner: str = ""
    prefixes: Namespace = field(default_factory=Namespace)
    """What is kept of prompts that these weights have read. If the weights ever change, it must be another one."""


class Request:
    """One `Sample` on its way."""

    def __init__(self, operation: Sample, sampler: OpenedSampler, stop: StopCondition) -> None:
        self.operation = operation
        self.sampler = sampler
        self.stop = stop
        self.prompt_tokens = len(operation.prompt)
        self.sequences = [Sequence(self, index) for index in range(operation.num_samples)]
        self.scores = PromptScores(operation)
        self.state_keys: list[bytes] | None = None
        """`page_keys` up to the last state, where the model has linear attention; `batching` makes them."""
        self.cache_hit_tokens: int | None = None
        """Tokens of the prompt that its first sequence found in the cache; None before that has run."""

    @cached_property
    def page_keys(self) -> list[bytes]:
        """Of the prompt, for the prefix cache."""
        return page_keys(self.operation.prompt)

    def common_tokens(self, other: Request) -> int:
        """How many tokens its prompt and another's begin alike."""
        if other is self:
            return self.prompt_tokens
        length = min(self.prompt_tokens, other.prompt_tokens)
        differs = np.flatnonzero(self.operation.prompt[:length] != other.operation.prompt[:length])
        return int(differs[0]) if len(differs) else length

    @property
    def untempered(self) -> bool:
        """Whether log-probabilities at temperature 1 are wanted, and are not those of the draw itself."""
        asked = self.operation.record_stability_info or self.operation.raw_logprobs
        return asked and self.operation.params.temperature not in (0, 1)

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.operation.tenant

    @property
    def finished(self) -> bool:
        return all(sequence.stop_reason is not None for sequence in self.sequences)

    def let_go(self) -> None:
        """It is answered: forget the sequences, which name it, so that what it holds goes now and not with a garbage
        collection some time later, its sampler's weights among it."""
        self.sequences = []

    def output(self) -> SampleOutput:
        """The result, once finished."""
        return SampleOutput(
            sequences=tuple(sequence.output() for sequence in self.sequences),
            prompt_logprobs=self.scores.logprobs,
            prompt_top_logprobs=self.scores.top,
            target_prompt_logprobs=self.scores.targets.output() if self.scores.targets is not None else None,
            prompt_alt_tokens=self.scores.alternatives,
            prompt_cache_hit_tokens=self.cache_hit_tokens or 0,
        )


@dataclass(eq=False)
class Sequence:
    """One continuation of a request's prompt. `cached` tokens of prompt + generated have their keys and values in
    `pages`; the rest are still to be run through the model."""

    request: Request
    index: int
    generated: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of the draws: at the request's temperature."""
    raw_logprobs: list[float] = field(default_factory=list)
    """At temperature 1, where the request is `untempered`."""
    top: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    slot: int = 0
    """Of the state cache, while it runs and the model has linear attention."""
    namespace: Namespace | None = None
    """In which its prompt's pages are kept; None before it runs, and where none are."""
    node: Node | Namespace | None = None
    """Of its last page that is kept."""
    kept: int = 0
    """Pages of its prompt that are kept, or cannot be."""
    leader: Sequence | None = None
    """Computes a prompt that begins alike, for which this one waits, until it has cached `awaited` tokens."""
    awaited: int = 0
    leaders: int = 0
    """For how many it has waited, one after another."""
    stop_reason: Literal["stop", "length"] | None = None

    def __post_init__(self) -> None:
        self.random = random_stream(self.request.operation.params.seed, self.index)

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.request.tenant

    @property
    def num_tokens(self) -> int:
        return self.request.prompt_tokens + len(self.generated)

    @property
    def holds_prompt(self) -> bool:
        """Whether only drawn tokens are still to be run."""
        return self.cached >= self.request.prompt_tokens

    @property
    def shareable(self) -> int:
        """Tokens that others of the same prompt have too; not the last one of all, which must run for the next one's
        distribution."""
        return min(self.request.prompt_tokens, self.num_tokens - 1)

    @property
    def reusable(self) -> int:
        """Tokens of the prompt that need not run if they are in the cache: nobody asked what they say."""
        return min(self.shareable, self.request.scores.needed_from)

    def next_tokens(self, count: int) -> list[int]:
        """The first `count` tokens that are not cached."""
        start = self.cached - self.request.prompt_tokens
        if start >= 0:
            return self.generated[start : start + count]
        prompt: list[int] = self.request.operation.prompt[self.cached : self.cached + count].tolist()
        return prompt + self.generated[: max(0, start + count)]

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Ids [start, end) of prompt + generated, int32."""
        drawn = np.array(self.generated, dtype=np.int32)
        return np.concatenate((self.request.operation.prompt, drawn), dtype=np.int32)[start:end]

    def append(
        self, token: int, logprob: float, raw_logprob: float | None, top: tuple[np.ndarray, np.ndarray] | None
    ) -> None:
        """Take a drawn token, and find out whether it was the last one."""
        self.generated.append(token)
        self.logprobs.append(logprob)
        if raw_logprob is not None:
            self.raw_logprobs.append(raw_logprob)
        if top is not None:
            self.top.append(top)
        if self.request.stop.reached(self.generated):
            self.stop_reason = "stop"
        elif len(self.generated) == self.request.operation.params.max_tokens:
            self.stop_reason = "length"

    def rewind(self) -> None:
        """Forget numbers that were taken for a token and drew none."""
        self.random = random_stream(self.request.operation.params.seed, self.index)
        self.random.random(len(self.generated))

    def output(self) -> SampledSequence:
        """The result, once `stop_reason` is known."""
        assert self.stop_reason is not None
        top = None
        if self.top:
            ids, logprobs = zip(*self.top, strict=True)
            top = TopLogprobs(token_ids=np.stack(ids), logprobs=np.stack(logprobs))
        operation = self.request.operation
        drawing = np.array(self.logprobs, dtype=np.float32)
        raw = np.array(self.raw_logprobs, dtype=np.float32) if self.request.untempered else drawing
        return SampledSequence(
            tokens=np.array(self.generated, dtype=np.int32),
            logprobs=raw if operation.raw_logprobs else drawing,
            stop_reason=self.stop_reason,
            top_logprobs=top,
            policy_logprobs=raw if operation.record_stability_info else None,
            drawing_logprobs=drawing if operation.record_stability_info and operation.raw_logprobs else None,
        )
