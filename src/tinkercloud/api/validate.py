"""What a request may say, judged against the base model: adapters, names, how to sample."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from tinkercloud.api.wire import json as wire
from tinkercloud.api.wire.json_arrays import integer_matrix, integers, tokens_from
from tinkercloud.engine.base_model import BaseModelInfo
from tinkercloud.engine.external_weights import read_recipients
from tinkercloud.engine.operations import (
    AdamParams,
    DimuonParams,
    LoraConfig,
    Matrix,
    OperationError,
    OptimizerFamily,
    OptimizerParams,
    SamplingParams,
)
from tinkercloud.engine.operations import Sample as SampleOperation
from tinkercloud.errors import InvalidRequest

MAX_NAME = 128
"""Characters in a checkpoint's name."""
MIN_TTL_SECONDS, MAX_TTL_SECONDS = 3600, 10 * 366 * 86400
"""One hour to ten years."""
MAX_SAMPLES = 1024
"""Most continuations in one request."""
MAX_TOP_LOGPROBS = 256
"""Most alternatives reported for a position."""
MAX_TARGETS = 2**22
"""Most cells of a request's `target_prompt_logprobs`."""
MAX_COLUMNS = 2**31
"""Columns of a sparse matrix are fewer."""
MAX_ANSWER_BYTES = 2**28
"""Most that the arrays of one answer may take: whoever passes it on holds it whole, more than once."""
MAX_STOPS = 64
"""Most stop sequences in one request."""
MAX_STOP_BYTES = 1024
"""Most of one stop text, in UTF-8: what has been drawn is searched for it at each token."""
SEEDS = 2**63 - 1
"""Seeds are folded to [0, 2^63 - 1)."""

VERSIONS: dict[OptimizerFamily, int | None] = {"adamw": None, "dimuon": 1}
"""The served version of each optimizer; None where it has none."""

_GROWS_WITH = {
    "num_samples": 1,
    "max_tokens": 1,
    "topk_sample_logprobs": 0,
    "topk_prompt_logprobs": 0,
    "prompt_alt_tokens_k": 0,
}
"""What the size of an answer is proportional to, in part, and the least that each can be."""

_NAME = re.compile(r"\w[\w.+=@,-]*", re.ASCII)


def lora_from(given: wire.Lora | None, info: BaseModelInfo) -> LoraConfig:
    """The adapter to make. What the client does not choose is chosen here, so that it is recorded: alpha, and a seed if
    none was given."""
    if given is None:
        raise InvalidRequest("lora_config is required: this server trains LoRA adapters, not whole models")
    if given.rank < 1:
        raise InvalidRequest(f"lora_config.rank must be positive, not {given.rank}")
    if given.rank > info.max_rank:
        raise InvalidRequest(
            f"lora_config.rank {given.rank} exceeds max LoRA rank {info.max_rank} for model {info.name}"
        )
    if not (given.train_attn or given.train_mlp or given.train_unembed):
        raise InvalidRequest("nothing to train: set at least one of train_attn, train_mlp and train_unembed")
    return LoraConfig(
        rank=given.rank,
        alpha=info.lora_alpha,
        seed=secrets.randbelow(SEEDS) if given.seed is None else given.seed % SEEDS,
        train_attn=given.train_attn,
        train_mlp=given.train_mlp,
        train_unembed=given.train_unembed,
    )


def optimizer_from(given: wire.OptimizerConfig) -> OptimizerFamily:
    """The optimizer that a training run is created with."""
    version = VERSIONS.get(given.type, given.version)
    if given.type not in VERSIONS:
        known = ", ".join(VERSIONS)
        raise InvalidRequest(f"optimizer_config.type {given.type!r:.80} is not served; use one of {known}")
    if given.version not in (None, version):
        right = f"use {version}" if version is not None else "leave it out"
        raise InvalidRequest(f"optimizer_config.version {given.version} of {given.type} is not served; {right}")
    return given.type


def params_from(given: wire.OptimStep, optimizer: OptimizerFamily) -> OptimizerParams:
    """The step's parameters, of the training run's own optimizer."""
    params = given.optimizer_params or given.adam_params or given.optim_params
    field = "adam_params" if optimizer == "adamw" else "optimizer_params"
    if params is None:
        hint = "; {} takes the defaults" if optimizer == "adamw" else " with type, learning_rate"
        raise InvalidRequest(f"{field} is required{hint}")
    if params.type != optimizer:
        raise InvalidRequest(
            f"these are {params.type}'s parameters, and this training run's optimizer is {optimizer}, chosen when it "
            f"was created; send {field}"
        )
    kind = AdamParams if optimizer == "adamw" else DimuonParams
    return kind(**{name: getattr(params, name) for name in kind.__struct_fields__})


def optimizer_json(optimizer: OptimizerFamily) -> dict[str, str | int]:
    """The SDK's `OptimizerConfig`."""
    version = VERSIONS[optimizer]
    return {"type": optimizer} if version is None else {"type": optimizer, "version": version}


def check_name(name: str | None, ttl_seconds: int | None) -> None:
    """A checkpoint's name and its time to live; either may be left out."""
    if name is not None and (not _NAME.fullmatch(name) or ".." in name or len(name) > MAX_NAME):
        raise InvalidRequest(
            f"path {name!r:.200} cannot be a checkpoint's name; use 1 to {MAX_NAME} letters, digits and any of "
            "_.-+=@, beginning with a letter, a digit or _, without '..'"
        )
    if ttl_seconds is not None and not MIN_TTL_SECONDS <= ttl_seconds <= MAX_TTL_SECONDS:
        raise InvalidRequest(
            f"ttl_seconds {ttl_seconds} is out of range; use {MIN_TTL_SECONDS} (an hour) to {MAX_TTL_SECONDS} "
            "(ten years), or leave it out to keep the checkpoint"
        )


def check_recipients(recipients: Sequence[str]) -> None:
    """Public keys that external weights can be encrypted to."""
    try:
        read_recipients(recipients)
    except OperationError as error:
        raise InvalidRequest(str(error)) from None


def sample_from(
    given: wire.Sample, sampler_id: str, info: BaseModelInfo, raw_logprobs: bool = False
) -> SampleOperation:
    """The sampling operation. Its request id is the ledger's to give; `raw_logprobs` is as in
    `engine.operations.Sample`."""
    prompt = tokens_from(given.prompt, "prompt")
    if not len(prompt):
        raise InvalidRequest("prompt is empty; send at least one token")
    _check_vocabulary(prompt, info, "prompt")
    _between("num_samples", given.num_samples, 1, MAX_SAMPLES)
    _between("topk_prompt_logprobs", given.topk_prompt_logprobs, 0, min(MAX_TOP_LOGPROBS, info.vocab_size))
    _between("topk_sample_logprobs", given.topk_sample_logprobs, 0, min(MAX_TOP_LOGPROBS, info.vocab_size))
    _between("prompt_alt_tokens_k", given.prompt_alt_tokens_k, 0, MAX_TOP_LOGPROBS)
    _check_last(given, len(prompt))
    operation = SampleOperation(
        request_id="",
        sampler_id=sampler_id,
        prompt=prompt,
        params=_sampling_params(given.sampling_params, len(prompt), info),
        num_samples=given.num_samples,
        prompt_logprobs=bool(given.prompt_logprobs),
        topk_prompt_logprobs=given.topk_prompt_logprobs,
        topk_sample_logprobs=given.topk_sample_logprobs,
        record_stability_info=bool(given.record_stability_info),
        target_prompt_logprobs=_targets(given.target_prompt_logprobs, len(prompt), info),
        prompt_alt_tokens_k=given.prompt_alt_tokens_k,
        prompt_logprobs_last_n=given.prompt_logprobs_last_n,
        raw_logprobs=raw_logprobs,
    )
    _check_answer(operation)
    return operation


def _check_answer(operation: SampleOperation) -> None:
    """Its answer must not be too large. The text names each number that alone makes it small enough, if any does."""
    size = operation.most_answer_bytes
    if size <= MAX_ANSWER_BYTES:
        return
    ways = []
    for name, least in _GROWS_WITH.items():
        none, one = (_with(operation, name, count).most_answer_bytes for count in (0, 1))
        most = (MAX_ANSWER_BYTES - none) // (one - none)
        if most >= least:
            ways.append(f"{name} to {most}")
    lower = f"lower {', or '.join(ways)}, or send" if ways else "send"
    raise InvalidRequest(
        f"the answer may take {size:,} bytes (num_samples {operation.num_samples}, max_tokens "
        f"{operation.params.max_tokens}), and at most {MAX_ANSWER_BYTES:,} are served; {lower} several requests that "
        "ask for less each"
    )


def _with(operation: SampleOperation, name: str, count: int) -> SampleOperation:
    if name in SamplingParams.__struct_fields__:
        return replace(operation, params=replace(operation.params, **{name: count}))
    return replace(operation, **{name: count})


def _check_last(given: wire.Sample, prompt_tokens: int) -> None:
    last = given.prompt_logprobs_last_n
    if last is None:
        return
    if not given.prompt_logprobs:
        raise InvalidRequest("prompt_logprobs_last_n says how many prompt_logprobs to compute; set prompt_logprobs too")
    if not 1 <= last <= prompt_tokens - 1:
        raise InvalidRequest(
            f"prompt_logprobs_last_n is {last}; of a prompt of {prompt_tokens} tokens the last 1 to "
            f"{prompt_tokens - 1} can be scored, for the first has nothing before it"
        )


def _targets(given: wire.TensorData | None, prompt_tokens: int, info: BaseModelInfo) -> Matrix | None:
    if given is None:
        return None
    where = "target_prompt_logprobs"
    if len(given.data) > MAX_TARGETS:
        raise InvalidRequest(f"{where} has {len(given.data)} cells; at most {MAX_TARGETS} are served")
    matrix = integer_matrix(given, where)
    rows, columns = matrix.shape
    if rows != prompt_tokens - 1 or not 1 <= columns < MAX_COLUMNS:
        raise InvalidRequest(
            f"{where} must have the shape [{prompt_tokens - 1}, K], a row for each token of the prompt after the "
            f"first, not {[rows, columns]!s:.200}"
        )
    named = matrix.values[matrix.values != -1]
    if not len(named):
        raise InvalidRequest(f"{where} names no token id, only -1, which asks for nothing; leave it out")
    _check_vocabulary(named, info, where, " (or -1, where none is named)")
    return matrix


def _sampling_params(given: wire.SamplingParams, prompt_tokens: int, info: BaseModelInfo) -> SamplingParams:
    room = info.max_context - prompt_tokens
    if room < 1:
        raise InvalidRequest(
            f"The prompt has {prompt_tokens} tokens, and {info.name}'s context window of {info.max_context} "
            f"must hold at least one more; send at most {info.max_context - 1}"
        )
    if given.max_tokens is not None and given.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be positive, not {given.max_tokens}")
    if given.max_tokens is not None and given.max_tokens > room:
        raise InvalidRequest(
            "Prompt length plus max_tokens exceeds the model's context window: "
            f"{prompt_tokens} + {given.max_tokens} > {info.max_context}; "
            f"ask for at most {room}, or leave max_tokens out"
        )
    if given.temperature < 0:
        raise InvalidRequest(f"temperature must be 0 (greedy) or more, not {given.temperature}")
    if not 0 < given.top_p <= 1:
        raise InvalidRequest(f"top_p must be above 0 and at most 1, not {given.top_p}")
    if given.top_k != -1 and given.top_k < 1:
        raise InvalidRequest(f"top_k must be positive, or -1 for no limit, not {given.top_k}")
    strings, tokens = _stops(given.stop, info)
    return SamplingParams(
        max_tokens=room if given.max_tokens is None else given.max_tokens,
        seed=secrets.randbelow(SEEDS) if given.seed is None else given.seed % SEEDS,
        temperature=given.temperature,
        top_k=-1 if given.top_k >= info.vocab_size else given.top_k,
        top_p=given.top_p,
        stop_strings=strings,
        stop_tokens=tokens,
    )


def _stops(stop: str | list[str | int] | None, info: BaseModelInfo) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(strings, token ids). None is the model's end-of-sequence; [] is nothing at all."""
    if stop is None:
        return (), info.eos_tokens
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop has {len(stops)} entries; at most {MAX_STOPS} are served")
    strings = tuple(entry for entry in stops if isinstance(entry, str))
    tokens = tuple(entry for entry in stops if not isinstance(entry, str))
    if strings and tokens:
        raise InvalidRequest("stop mixes texts and token ids; send one kind")
    if "" in strings:
        raise InvalidRequest("stop has an empty text, which would stop everything; leave it out")
    longest = max((len(text.encode()) for text in strings), default=0)
    if longest > MAX_STOP_BYTES:
        raise InvalidRequest(f"stop has a text of {longest} bytes in UTF-8; at most {MAX_STOP_BYTES} are served")
    _check_vocabulary(integers(list(tokens), np.int64, "stop"), info, "stop")
    return strings, tokens


def _between(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InvalidRequest(f"{name} must be {least} to {most}, not {value}")


def _check_vocabulary(tokens: np.ndarray, info: BaseModelInfo, where: str, besides: str = "") -> None:
    outside = tokens[(tokens < 0) | (tokens >= info.vocab_size)]
    if len(outside):
        last = info.vocab_size - 1
        raise InvalidRequest(
            f"{where}: token id {outside[0]} is outside {info.name}'s vocabulary, 0 to {last}{besides}"
        )
