"""What an engine is asked and what it answers: plain data, without torch, HTTP or SQL.

These structs are the seam of the whole server. `api` builds them from a client's request, `ledger` stores their bytes,
`scheduler` looks at their sizes, an engine process runs them. Arrays are numpy; nothing here knows how a wire form or
a tensor looks.
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


class CancelSample(Struct, frozen=True, tag="cancel_sample"):
    """Stop a running or waiting sample; it then answers a `Failure`. No error if it is not there. Result: `Done`."""

    request_id: str


class FindSample(Struct, frozen=True, tag="find_sample"):
    """Ask whether a sample has begun. Result: `Place`."""

    request_id: str


SampleOperation = OpenSampler | CloseSampler | Sample | CancelSample | FindSample
Operation = TrainOperation | SampleOperation


# ---------------------------------------------------------------- results


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


class Place(Struct, frozen=True, tag="place"):
    """Where a sample stands."""

    has_begun: bool
    """Also of one that has ended, or is not known."""
    waiting: int
    """Sequences that wait, its own among them."""
    places: int
    """Sequences that run together."""


class Failure(Struct, frozen=True, tag="failure"):
    """The operation did not happen. `category` as the SDK's RequestErrorCategory: "user" if the caller can mend it."""

    error: str
    category: Literal["user", "server", "unknown"]


Result = Done | LossOutput | StepOutput | SaveOutput | LoadOutput | SampleOutput | Place | Failure


# ---------------------------------------------------------------- the engine itself


class ActivationMemory(Struct, frozen=True):
    """What passes take: what a backward pass needs of its forward pass, and a forward pass alone."""

    budget: int
    """Bytes for it."""
    per_token: int
    """Bytes that it takes, measured when the model was loaded."""
    per_token_recomputed: int
    """Bytes that it takes if layers keep only their inputs and are run again."""
    per_token_forward: int = 0
    """Bytes of a pass that keeps nothing; 0 is not known."""

    @property
    def tokens(self) -> int:
        """How many fit together."""
        return self.budget // self.per_token

    @property
    def tokens_recomputed(self) -> int:
        """How many fit together if layers are run again: a longer datum cannot be trained on."""
        return self.budget // self.per_token_recomputed

    def needed(self, tokens: int, *, backward: bool) -> int:
        """Bytes for a datum of so many tokens, with a backward pass at least."""
        return tokens * (self.per_token_recomputed if backward else self.per_token_forward)


Quantization = Literal["none", "8bit", "4bit"]
"""Of the frozen linear layers that LoRA adapts, but for fused experts and the unembedding."""


class BaseModelInfo(Struct, frozen=True):
    """What the rest of the server needs to know of a loaded base model."""

    name: str
    """As clients name it."""
    folder: str
    """Where its files are, tokenizer included."""
    architecture: str
    """`config.architectures[0]`, such as "Qwen3ForCausalLM"."""
    vocab_size: int
    """Rows of the embedding: every valid token id is below it."""
    max_context: int
    """Tokens, prompt and generation together."""
    max_rank: int
    """Of new training runs. An engine runs what was accepted under a larger one."""
    lora_alpha: float
    """Of new adapters."""
    eos_tokens: tuple[int, ...]
    num_parameters: int
    device: str
    dtype: str
    """What is computed in; also of the weights, but for quantised ones."""
    quantization: Quantization = "none"
    activations: ActivationMemory | None = None
    """None as long as it has not been measured."""
    build: str = ""
    """What decides the bits of the engine's numbers: its sources, libraries, processor. To be compared, and read."""
    fingerprint: str = ""
    """Of its weights (`engine/fingerprint.py`): what a name stands for."""

    @property
    def reproducible(self) -> bool:
        """Whether an engine of the same build gives the same bits again."""
        return self.device == "cpu" and self.dtype == "float32"


class AdapterMemory(Struct, frozen=True):
    """What an engine's adapters in training take: their parameters, accumulated gradients and moments."""

    resident_bytes: int
    """Beside the base model."""
    peak_bytes: int
    """The most that `resident_bytes` has been."""
    resident: int
    """How many of them are there."""
    idle: int
    """How many are elsewhere until they are used again."""
    moved_out: int
    """How often one was moved elsewhere."""


class EngineOptions(Struct, frozen=True):
    """How to load one base model (the server's settings for it, resolved)."""

    name: str
    source: str
    """A folder, or a Hugging Face id."""
    device: str = "auto"
    """"auto" is the GPU where there is one."""
    dtype: str = "auto"
    """"auto" is float32 on the CPU and bfloat16 on a GPU."""
    quantization: Quantization = "none"
    max_rank: int = 128
    lora_alpha: float = 32.0
    """Of new adapters; nothing that has been made already changes with it."""
    max_context: int = 0
    """Tokens; 0 is the model's own."""
    token_budget: int = 4096
    """Most tokens in one training micro-batch."""
    activation_bytes: int = 0
    """Bytes for what a backward pass needs of its forward pass; 0 is a share of the machine's memory."""
    adapter_memory: int = 0
    """Bytes for adapters in training: parameters, gradients and moments; 0 is without a limit."""
    kv_cache_bytes: int = 256 * 2**20
    """Memory for the sampler's pages of keys and values, its decode windows and linear attention's states."""
    max_decode_batch: int = 64
    """Sequences decoded in one step."""
    logits_bytes: int = 64 * 2**20
    """Most memory that logits may take at a time."""
    threads: int = 0
    """CPU threads; 0 is what the machine has."""
    trust_remote_code: bool = False
