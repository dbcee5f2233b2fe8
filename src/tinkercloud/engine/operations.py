"""What an engine is asked: operations as plain data, without torch, HTTP or SQL.

With `engine/results.py` these structs are the seam of the whole server. `api` builds them from a client's request,
`ledger` stores their bytes, `scheduler` looks at their sizes, an engine process runs them. Arrays are numpy; nothing
here knows how a wire form or a tensor looks.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from msgspec import Struct


class OperationError(Exception):
    """An operation failed for a reason that its user can mend: the text says what was wrong and what would be right.

    An engine answers it as a `Failure` of category "user"; weights, moments and gradients are as they were before, only
    that a failed `OptimStep` clears the gradients.
    """


# ---------------------------------------------------------------- the parts of operations


class LoraConfig(Struct, frozen=True):
    """A LoRA adapter: W + (alpha / rank) * B @ A on the selected linear layers (SDK `types.LoraConfig`)."""

    rank: int
    alpha: float = 32.0
    seed: int = 0
    """Seeds A (Kaiming uniform); B is zero. The same seed, rank and parts give the same bits."""
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


class Datum(Struct, frozen=True):
    """One training sequence.

    Position i of `tokens` predicts `inputs["target_tokens"][i]`. Where there are fewer targets than tokens, they belong
    to the *last* positions: target j of M sits at position N - M + j.
    """

    tokens: np.ndarray
    """Input token ids, int32 [N], N >= 1."""
    inputs: dict[str, np.ndarray]
    """The loss's inputs by their wire names: target_tokens int64 [M] or [M, K]; weights, advantages, logprobs, ...
    float32 of the same shape."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


OptimizerFamily = Literal["adamw", "dimuon"]
"""Chosen when a model is created, for its life (SDK `types.OptimizerConfig`)."""


class AdamParams(Struct, frozen=True, tag="adamw"):
    """One AdamW step (SDK `types.AdamParams`, with its defaults); weight decay is decoupled."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    """Clip the adapter's whole gradient to this L2 norm; 0 is off."""


class DimuonParams(Struct, frozen=True, tag="dimuon"):
    """One Dimuon step (SDK `types.DimuonParams`, with its defaults)."""

    learning_rate: float
    """Of a direction whose Frobenius norm is the square root of the rank, at rank 32."""
    beta1: float = 0.9
    """How much of the momentum stays from step to step."""
    grad_clip_norm: float = 0.0
    """Clip the adapter's whole gradient to this L2 norm; 0 and below is off."""


OptimizerParams = AdamParams | DimuonParams


def family_of(params: OptimizerParams) -> OptimizerFamily:
    """Whose step these parameters are."""
    return "adamw" if isinstance(params, AdamParams) else "dimuon"


class SamplingParams(Struct, frozen=True):
    """How to draw tokens (SDK `types.SamplingParams`)."""

    max_tokens: int
    """The most tokens to draw; the API fills in what the context leaves when the client gave none."""
    seed: int
    """Fixed when the request is accepted, so that running it again draws the same tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = -1
    """-1 is all."""
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    """Ids that end a sequence. The API puts the model's end-of-sequence ids here when the client gave no `stop`."""


class Matrix(Struct, frozen=True):
    """A matrix as its sender laid it out (SDK `types.TensorData`): dense, or only the cells that are listed (CSR)."""

    values: np.ndarray
    """[rows * columns], row by row; or [cells], of those that are listed."""
    shape: tuple[int, int]
    """(rows, columns)"""
    row_ends: np.ndarray | None = None
    """int64 [rows + 1]: the listed cells of row i are those from row_ends[i] to row_ends[i + 1]. None is dense."""
    columns: np.ndarray | None = None
    """int64 [cells]: where in its row each is."""

    @property
    def rows(self) -> np.ndarray:
        """int64: the row of each value."""
        counts = self.shape[1] if self.row_ends is None else np.diff(self.row_ends)
        return np.repeat(np.arange(self.shape[0]), counts)

    @property
    def num_bytes(self) -> int:
        """What its arrays take."""
        arrays = (self.values, self.row_ends, self.columns)
        return sum(array.nbytes for array in arrays if array is not None)


# ---------------------------------------------------------------- operations of a training model, in seq_id order


class CreateModel(Struct, frozen=True, tag="create_model"):
    """Make a fresh adapter with zero gradients and moments. Result: `Done`."""

    model_id: str
    lora: LoraConfig
    optimizer: OptimizerFamily = "adamw"


class ForwardBackward(Struct, frozen=True, tag="forward_backward"):
    """Loss and, unless `forward_only`, gradients added to the model's accumulator. Result: `LossOutput`."""

    model_id: str
    data: tuple[Datum, ...]
    loss_fn: str
    loss_fn_config: dict[str, float | str] = {}
    forward_only: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(datum.num_tokens for datum in self.data)


class OptimStep(Struct, frozen=True, tag="optimizer_step"):
    """Apply and clear the accumulated gradients. All-or-nothing. Result: `StepOutput`."""

    model_id: str
    params: OptimizerParams
    """Of the model's own family."""


class AdamStep(Struct, frozen=True, tag="optim_step"):
    """An `OptimStep` as logs hold it that were written when there was only AdamW. Nothing makes new ones."""

    model_id: str
    adam: AdamParams


class SaveWeights(Struct, frozen=True, tag="save_weights"):
    """Write a checkpoint folder: adapter_config.json and adapter_model.safetensors (PEFT's layout), with
    `with_optimizer` also optimizer.safetensors, with `with_gradients` also gradients.safetensors.

    The folder appears whole or not at all (temporary folder, fsync, rename). Result: `SaveOutput`.
    """

    model_id: str
    folder: str
    with_optimizer: bool = False
    with_gradients: bool = False
    replace: bool = False
    """Replace a folder that is already there; else it is an error."""
    external: bool = False
    """Write the weights alone, as `engine/external_weights.py` has it: for other programs, not to be loaded here."""
    recipients: tuple[str, ...] = ()
    """The public keys that external weights are encrypted to; none leaves them plain."""


class LoadWeights(Struct, frozen=True, tag="load_weights"):
    """Replace the model's weights by a checkpoint folder's, creating the model if it is new (rank, alpha and parts are
    the checkpoint's). Gradients become zero, or the folder's with `with_gradients`; moments become zero, or the
    folder's with `with_optimizer`. A model that is there keeps its optimizer, and a folder's moments must be of it.
    Result: `LoadOutput`."""

    model_id: str
    folder: str
    with_optimizer: bool = False
    with_gradients: bool = False
    optimizer: OptimizerFamily = "adamw"
    """Of a new model, without `with_optimizer`; with it the folder's."""


class ClearGradients(Struct, frozen=True, tag="clear_gradients"):
    """Zero the model's accumulated gradients (a chunk of its batch was refused). Result: `Done`."""

    model_id: str


class DropModel(Struct, frozen=True, tag="drop_model"):
    """Forget the model and free its memory; no error if it is not there. Result: `Done`."""

    model_id: str


TrainOperation = (
    CreateModel | ForwardBackward | OptimStep | AdamStep | SaveWeights | LoadWeights | ClearGradients | DropModel
)


# ---------------------------------------------------------------- operations of samplers


class OpenSampler(Struct, frozen=True, tag="open_sampler"):
    """Make weights available for sampling under an id: a sampler checkpoint's folder, or the base model's own
    (folder ""). They never change afterwards, unless they are `shared`. Result: `Done`."""

    sampler_id: str
    folder: str = ""
    shared: str = ""
    """What samplers say that share mutable weights. Opening one of them with another folder gives its weights to all of
    them from the next step on: running sequences keep the keys and values that they have and go on with these."""
    owner: str = ""
    """Whose it is: what is kept of prompts is found by their owner's samplers alone, so that nobody learns from times
    or counts what others have sent."""


class CloseSampler(Struct, frozen=True, tag="close_sampler"):
    """Forget a sampler's weights once its running sequences have ended. Result: `Done`."""

    sampler_id: str


class Sample(Struct, frozen=True, tag="sample"):
    """Draw `num_samples` continuations of a prompt (SDK `types.SampleRequest`). Result: `SampleOutput`.

    Sampled log-probabilities are those of the distribution at the request's temperature, before top-k and top-p; at
    temperature 0, and with `raw_logprobs` always, of temperature 1. Prompt log-probabilities are the raw model's.
    """

    request_id: str
    sampler_id: str
    prompt: np.ndarray
    """Token ids, int32 [N], N >= 1."""
    params: SamplingParams
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    record_stability_info: bool = False
    """Whether the output has `policy_logprobs` too, which the loss stable_reinforce needs."""
    target_prompt_logprobs: Matrix | None = None
    """int64 token ids [N - 1, K] to score: row i at prompt position i + 1; -1 asks for nothing."""
    prompt_alt_tokens_k: int = 0
    """How many tokens to draw at each prompt position after the first, at the request's temperature."""
    prompt_logprobs_last_n: int | None = None
    """Of `prompt_logprobs`, which it needs, and `topk_prompt_logprobs`: score the last n tokens alone, 1 to N - 1."""
    raw_logprobs: bool = False
    """Whether sampled log-probabilities are the raw model's."""
    tenant: str = ""
    """Who shares the sampler evenly with others, however much each asks for: the session."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt)

    @property
    def most_answer_bytes(self) -> int:
        """What the arrays of its `SampleOutput` take if every sample is drawn to its greatest length."""
        pair = 8  # a token id and a log-probability
        of_drawn = pair * (1 + self.topk_sample_logprobs + self.record_stability_info)
        of_prompt = pair * (self.topk_prompt_logprobs + self.prompt_alt_tokens_k + self.prompt_logprobs)
        targets = self.target_prompt_logprobs.num_bytes if self.target_prompt_logprobs is not None else 0
        return self.num_samples * self.params.max_tokens * of_drawn + self.num_tokens * of_prompt + targets


class CancelSample(Struct, frozen=True, tag="cancel_sample"):
    """Stop a running or waiting sample; it then answers a `Failure`. No error if it is not there. Result: `Done`."""

    request_id: str


class FindSample(Struct, frozen=True, tag="find_sample"):
    """Ask whether a sample has begun. Result: `Place`."""

    request_id: str


class AskLoad(Struct, frozen=True, tag="ask_load"):
    """Ask how full the sampler is. Result: `SamplerLoad`."""


SampleOperation = OpenSampler | CloseSampler | Sample | CancelSample | FindSample | AskLoad
Operation = TrainOperation | SampleOperation
