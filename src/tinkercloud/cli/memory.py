"""How much memory a base model will take, as far as its files or the hub can say."""

from __future__ import annotations

import json
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tinkercloud.base_models import hub_refusal, source_folder
from tinkercloud.config import Settings
from tinkercloud.model_settings import ModelSettings
from tinkercloud.units import MIB

HUB_SECONDS = 10.0
"""How long the hub may take to say whether it has a model."""
ENGINE_BYTES = 512 * MIB
"""What an engine process takes of the machine's memory beside its model (torch, activations), roughly; on a GPU, what
it takes there."""
QUANTIZED_WIDTHS = {"8bit": 1, "4bit": 0.5 + 4 / 64}
"""Bytes of one number; 4-bit ones have a float32 scale for each block of 64."""
MAX_HEADER_BYTES = 100 * MIB
"""The format's own limit."""


class Numbers(NamedTuple):
    """How many numbers a model's weights are."""

    total: int
    quantizable: int | None
    """Of them; None if nobody knows."""


class HubAnswer(NamedTuple):
    """What the hub says of a model."""

    refusal: str | None
    """Why it does not give the model, in a few words; None if it does."""
    numbers: int | None = None
    """How many numbers its weights are, if the hub knows."""


def model_bytes(settings: Settings, model: ModelSettings, on_gpu: bool) -> int | None:
    """Weights as they are loaded, the sampler's cache and the logits; None if nobody knows how large the model is.

    Files say little of memory: weights that are saved in bfloat16 take twice as much in float32.
    """
    folder = local_folder(model)
    numbers = stored_numbers(folder) if folder else None
    if numbers is None and not Path(source_folder(model.source)).is_dir():
        total = ask_hub(model.source).numbers
        numbers = None if total is None else Numbers(total, None)
    if numbers is None:
        return None
    width = _width(settings.for_model(model, "dtype"), on_gpu)
    weights, quantization = numbers.total * width, settings.for_model(model, "quantization")
    if quantization != "none":
        if numbers.quantizable is None:
            return None
        weights -= int(numbers.quantizable * (width - QUANTIZED_WIDTHS[quantization]))
    context = _cached_numbers(folder) * _context(settings, model, folder) * width if folder else 0
    cache = max(settings.for_model(model, "kv_cache_bytes"), context)
    return weights + cache + settings.for_model(model, "logits_bytes")


def local_folder(model: ModelSettings) -> Path | None:
    """Where the model's files are on this machine, or None if the hub's cache does not have them."""
    folder = Path(source_folder(model.source))
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model.source, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def stored_numbers(folder: Path) -> Numbers | None:
    """Of the weights in a model's folder; None if they are not all there."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    try:
        if single.is_file() or not index.is_file():  # in transformers' order
            files = [single]
        else:
            files = [folder / name for name in set(json.loads(index.read_bytes())["weight_map"].values())]
        totals, quantizable = zip(*map(_numbers_in, files), strict=True)
        return Numbers(sum(totals), sum(quantizable))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error):
        return None


def _numbers_in(file: Path) -> Numbers:
    """From a safetensors file's header: its length in 8 bytes, then JSON with the shape of each tensor."""
    total = quantizable = 0
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{file} is not safetensors")
        for name, tensor in json.loads(opened.read(length)).items():
            if name != "__metadata__":
                numbers = _product(tensor["shape"])
                total += numbers
                quantizable += numbers if _is_quantizable(name) else 0
    return Numbers(total, quantizable)


def _is_quantizable(name: str) -> bool:
    """Whether a tensor is the weight of a layer that quantization is about; experts are fused when they are loaded."""
    from tinkercloud.engine.peft_layout import part_of

    module, _, kind = name.rpartition(".")
    return kind == "weight" and ".experts." not in name and part_of(module) != "unembed"


def _product(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _width(dtype: str, on_gpu: bool) -> int:
    """Bytes of one number."""
    return 4 if dtype == "float32" or (dtype == "auto" and not on_gpu) else 2


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
        text = config.get("text_config", config)
        return text if isinstance(text, dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _context(settings: Settings, model: ModelSettings, folder: Path) -> int:
    """Tokens. The sampler's cache has room for at least this many."""
    own = _config(folder).get("max_position_embeddings")
    return settings.for_model(model, "max_context") or (own if isinstance(own, int) else 0)


def _cached_numbers(folder: Path) -> int:
    """How many numbers the sampler keeps of each token; 0 if the configuration does not say it in the usual words."""
    config = _config(folder)
    try:
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        numbers = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width
        return numbers if isinstance(numbers, int) else 0
    except (KeyError, TypeError, ZeroDivisionError):
        return 0


@lru_cache
def ask_hub(source: str) -> HubAnswer:
    """What the hub says of a model, asked once."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(source, timeout=HUB_SECONDS)
    except Exception as error:  # its client lets those of its HTTP library through
        return HubAnswer(hub_refusal(error))
    return HubAnswer(None, info.safetensors.total if info.safetensors else None)
