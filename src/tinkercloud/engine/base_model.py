"""A base model as an engine is told to load it, and what the engine says of it and of the memory around it."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


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
