"""What an engine answers: the results of operations as plain data, stored by the ledger in the same bytes."""

from __future__ import annotations

from typing import Literal

import numpy as np
from msgspec import Struct

from tinkercloud.engine.operations import LoraConfig, Matrix


class Done(Struct, frozen=True, tag="done"):
    """It is done and there is nothing to say."""


class LossOutput(Struct, frozen=True, tag="loss"):
    """What a forward or forward_backward returns."""

    output_type: str
    """The wire's name for the record, such as "CrossEntropyLossReturn"."""
    outputs: tuple[dict[str, np.ndarray], ...]
    """For each datum: "logprobs" and, but for custom losses, "elementwise_loss", float32, each of the shape of its
    target_tokens."""
    metrics: dict[str, float]
    """"name:reduction", among them "loss:sum"."""


class StepOutput(Struct, frozen=True, tag="step"):
    metrics: dict[str, float]


class SaveOutput(Struct, frozen=True, tag="save"):
    folder: str
    size_bytes: int


class LoadOutput(Struct, frozen=True, tag="load"):
    lora: LoraConfig


class TopLogprobs(Struct, frozen=True):
    """The k most likely tokens at each position, most likely first; -99999 where a position has no distribution."""

    token_ids: np.ndarray
    """int32 [N, k]"""
    logprobs: np.ndarray
    """float32 [N, k]"""


class SampledSequence(Struct, frozen=True):
    tokens: np.ndarray
    """int32 [n], the token that stopped it included."""
    logprobs: np.ndarray
    """float32 [n]"""
    stop_reason: Literal["stop", "length"]
    top_logprobs: TopLogprobs | None = None
    policy_logprobs: np.ndarray | None = None
    """float32 [n]: at temperature 1, whatever the request's. Only where it asked to record them; never sent to a
    client."""
    drawing_logprobs: np.ndarray | None = None
    """float32 [n]: at the request's temperature. Only where it asked to record them and for raw `logprobs`; never sent
    to a client."""


class AltTokens(Struct, frozen=True):
    """Tokens drawn in the places of a prompt's own, with replacement (SDK `types.PromptAltTokens`): row i at prompt
    position i + 1."""

    token_ids: np.ndarray
    """int32 [N - 1, k]"""
    logprobs: np.ndarray
    """float32 [N - 1, k], the raw model's."""


class SampleOutput(Struct, frozen=True, tag="sampled"):
    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: np.ndarray | None = None
    """float32 [N]; the first is NaN."""
    prompt_top_logprobs: TopLogprobs | None = None
    prompt_cache_hit_tokens: int = 0
    target_prompt_logprobs: Matrix | None = None
    """float32, laid out as the request's; 0 where it has -1."""
    prompt_alt_tokens: AltTokens | None = None


class SamplerLoad(Struct, frozen=True, tag="sampler_load"):
    """What all samples take."""

    waiting: int
    """Sequences that wait."""
    places: int
    """Sequences that run together at most."""
    running: int
    """Sequences that run now."""
    pages_used: int
    """Pages of the KV cache that they hold."""
    pages: int
    """Pages that there are."""


class Place(Struct, frozen=True, tag="place"):
    """Where a sample stands."""

    has_begun: bool
    """Also of one that has ended, or is not known."""
    load: SamplerLoad
    """Of all, its own sequences among them."""


class Failure(Struct, frozen=True, tag="failure"):
    """The operation did not happen. `category` as the SDK's RequestErrorCategory: "user" if the caller can mend it."""

    error: str
    category: Literal["user", "server", "unknown"]


Result = Done | LossOutput | StepOutput | SaveOutput | LoadOutput | SampleOutput | Place | SamplerLoad | Failure
