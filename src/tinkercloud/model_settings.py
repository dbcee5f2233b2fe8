"""The settings of a base model: their defaults, units and meanings, and how one is read from tables and texts.

Those in `PerModel` are settings of the server too (`config.py`), for every model that does not set its own.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from tinkercloud.base_models import ModelError, parse_model, resolve_source
from tinkercloud.setting_errors import sentences
from tinkercloud.units import MIB


class PerModel(BaseModel):
    """What may differ between base models: the server's value holds for every model that does not set its own."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    device: str = Field("auto", description="Where the model runs: `cpu`, `cuda`, `cuda:1`; `auto` is the GPU if any.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the frozen weights; `auto` is float32 on the CPU and bfloat16 on a GPU."
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="Hold the weights of the frozen linear layers in 8 or 4 bits, by bitsandbytes (the extra "
        "`quantized`); embeddings, fused experts and the unembedding stay in `dtype`. See models.md.",
    )
    max_rank: int = Field(128, gt=0, description="Largest LoRA rank that a client may ask for.")
    lora_alpha: float = Field(
        32.0,
        gt=0,
        allow_inf_nan=False,
        description="LoRA's alpha of new training runs: an adapter of rank r counts alpha / r times. A run and its "
        "checkpoints keep the one that they were made with.",
    )
    max_context: int = Field(
        0, ge=0, description="Tokens of prompt and generation together; 0 is what the model was made for."
    )
    token_budget: int = Field(4096, gt=0, description="Most tokens in one training micro-batch.")
    activation_bytes: ByteSize = Field(
        0,
        ge=0,
        description="Bytes for what a backward pass needs of its forward pass; 0 is a quarter of the machine's memory, "
        "or half of a GPU's beside the model. Micro-batches stay within it; where one sequence alone does not, its "
        "layers run again in the backward pass; where that is too much as well, the batch is refused.",
    )
    adapter_memory: ByteSize = Field(
        0,
        ge=0,
        description="Bytes for the parameters, gradients and moments of adapters in training; 0 is without a limit. "
        "Beyond it, those that were not used for longest move to disk, or to the host's memory beside a GPU, and come "
        "back when they are used.",
    )
    kv_cache_bytes: ByteSize = Field(
        256 * MIB,
        gt=0,
        description="Bytes for what the sampler remembers of its sequences: a quarter for decode windows, copies of "
        "the keys and values of those that decode together (none in float32 on a CPU, which reads them where they "
        "are); with linear attention at most half for states, so fewer sequences than `max_decode_batch` may run; "
        "the rest for pages of keys and values, but at least one context's.",
    )
    max_decode_batch: int = Field(64, gt=0, description="Sequences decoded in one step.")
    logits_bytes: ByteSize = Field(64 * MIB, gt=0, description="Most bytes that logits may take at a time.")
    threads: int = Field(0, ge=0, description="CPU threads of the engine; 0 is what the machine has.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model's files.")
    price_train: float = Field(
        0, ge=0, allow_inf_nan=False, description="USD for a million tokens of forward and backward passes, in billing."
    )
    price_prefill: float = Field(0, ge=0, allow_inf_nan=False, description="USD for a million tokens of prompts.")
    price_cached: float = Field(
        0, ge=0, allow_inf_nan=False, description="USD for a million tokens of prompts that were remembered."
    )
    price_sample: float = Field(0, ge=0, allow_inf_nan=False, description="USD for a million tokens that were drawn.")
    idle_seconds: float = Field(
        600,
        gt=0,
        description="A lazy model that nothing was asked of for this many seconds leaves memory; "
        "whatever asks for it next brings it back.",
    )
    stuck_seconds: float = Field(
        0,
        ge=0,
        description="An engine that has something to do and comes no further with it for this many seconds is ended "
        "and started again, and what it was doing runs again; 0 is never. A single step, such as a micro-batch, must "
        "not take as long.",
    )


class ModelSettings(PerModel):
    """One base model to serve."""

    name: str = Field(description="What clients call it, as in `base_model=`.")
    source: str = Field("", description="A folder, a Hugging Face id, or `builtin`; without it, the name says it.")
    lazy: bool = Field(False, description="Load it when the first client asks for it instead of at the start.")

    def own(self) -> dict[str, Any]:
        """The settings of `PerModel` that were given for this model, as JSON has them."""
        return self.model_dump(mode="json", include=self.model_fields_set & PerModel.model_fields.keys())

    def model_post_init(self, context: Any, /) -> None:
        self.name, self.source = resolve_source(self.name, self.source)


def read_model(item: Any) -> ModelSettings:
    """One model. ModelError calls it what its user calls it."""
    if isinstance(item, ModelSettings):
        return item
    fields = parse_model(item) if isinstance(item, str) else item
    try:
        return ModelSettings.model_validate(fields)
    except ValidationError as error:
        called = item if isinstance(item, str) else fields.get("name", fields) if isinstance(fields, dict) else fields
        raise ModelError(f"model {called!s:.200}: {sentences(error, ModelSettings)}") from None


def read_models(value: Any) -> Any:
    """Models from tables, `--model` texts, and (from the environment) either one such text or a JSON list of both."""
    if isinstance(value, str):
        value = json.loads(value) if value.lstrip().startswith("[") else [value]
    if not isinstance(value, list | tuple):
        return value
    models, wrong = [], []
    for item in value:
        try:
            models.append(read_model(item))
        except ModelError as error:
            wrong.append(str(error))
    if wrong:
        raise ModelError("; ".join(wrong))
    return models
