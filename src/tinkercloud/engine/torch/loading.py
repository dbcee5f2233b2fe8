"""A base model's files: found or fetched, and read by transformers, with what is wrong with them in sentences."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    modeling_utils,
)
from transformers.utils import GENERATION_CONFIG_NAME

from tinkercloud.base_models import hub_refusal
from tinkercloud.engine.base_model import BaseModelInfo, EngineOptions
from tinkercloud.engine.fingerprint import fingerprint_of, state_of
from tinkercloud.engine.operations import OperationError
from tinkercloud.engine.torch.attention import IMPLEMENTATION
from tinkercloud.engine.torch.build import build_of
from tinkercloud.engine.torch.quantized import quantization_of

log = logging.getLogger(__name__)

COLOUR = re.compile(r"\x1b\[[0-9;]*m")

FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
"""What a base model needs of a hub repository: no pickles, no code."""


def folder_of(options: EngineOptions) -> Path:
    """Where a model's files are, fetched from the hub if need be. OperationError."""
    source = Path(options.source).expanduser()
    if source.is_dir():
        folder = source.resolve()
    elif source.is_absolute() or options.source.startswith((".", "~")) or options.source.count("/") > 1:
        raise OperationError(f"there is no folder {options.source}")
    else:
        patterns = [*FILES, "*.py"] if options.trust_remote_code else FILES
        try:
            folder = Path(snapshot_download(options.source, allow_patterns=patterns))
        except Exception as error:
            raise OperationError(
                f"it is no folder and not in the Hugging Face cache; {hub_refusal(error)}; correct the name, or with a "
                f"network: hf download {options.source}"
            ) from error
    if not (folder / "config.json").is_file():
        raise OperationError(f"{folder} has no config.json, so it is not a transformers model")
    if not any(folder.glob("*.safetensors")):
        raise OperationError(f"{folder} has no *.safetensors file; other formats are not loaded")
    return folder


TELLING = (ValueError, OSError, RuntimeError, ImportError, StrictDataclassError)
"""What transformers raises to say what is wrong with a file. Where a file is not what it takes for granted, it raises
anything."""

NOT_A_MODEL = "its config.json and weights cannot be loaded as a causal language model"
NOT_SERVED = "no model to be served can be made of its config.json and weights"


@contextmanager
def in_a_sentence(what: str, telling: tuple[type[Exception], ...] = TELLING) -> Iterator[None]:
    """Whatever is raised within is an OperationError: `what`, and the error's own words. The log of an engine has where
    an error comes from that is not `telling`: the mistake may be ours."""
    try:
        yield
    except OperationError:
        raise
    except Exception as error:
        if not isinstance(error, telling):
            log.info("%s", what, exc_info=True)
        raise OperationError(f"{what}: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if isinstance(error, TELLING) else f"{type(error).__name__}: {said}"


@in_a_sentence("transformers cannot read its config.json")
def config_of(folder: Path, options: EngineOptions) -> PreTrainedConfig:
    """A model's configuration, if its positions do not depend on the batch. OperationError."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    of_layers = [part for part in rope.values() if isinstance(part, dict)]
    kinds = {part.get("rope_type") for part in of_layers or [rope]} & {"longrope", "dynamic"}
    if kinds:
        raise OperationError(
            f"its rotary embedding ({kinds.pop()}) depends on the longest sequence in a batch, so a client's "
            "numbers would depend on others'"
        )
    own = getattr(text, "max_position_embeddings", None) or 0
    if options.max_context > own > 0:
        raise OperationError(f"max_context {options.max_context} is above the model's own {own}")
    _eos_tokens_of(folder, text)  # transformers reads the same file beside the weights, and says of which less clearly
    return config


def device_of(name: str) -> torch.device:
    """The device of a setting. OperationError if it is not there."""
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OperationError(f"device {name!r} cannot be used: {error}") from error
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The type of a setting, on a device. OperationError."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise OperationError(f"dtype {name!r} is not one of auto, float32, bfloat16, float16")
    return dtype


def weights_of(
    folder: Path, config: PreTrainedConfig, options: EngineOptions, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """The model with its weights, where it will run. OperationError."""
    with in_a_sentence(NOT_A_MODEL):
        quantization = quantization_of(options.quantization, config)
    # Quantised one by one where they will be, so that the whole in `dtype` need never fit.
    quantized = {"quantization_config": quantization, "device_map": {"": str(device)}} if quantization else {}
    with _transformers_report() as report, in_a_sentence(NOT_A_MODEL):
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=IMPLEMENTATION,
                use_safetensors=True,
                trust_remote_code=options.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that it says which they are
                **quantized,
            )
        except SafetensorError as error:
            damaged = f"a weight file in {folder} is damaged or cut short ({error}); fetch it again"
            raise OperationError(damaged) from error
        except Exception as error:
            if why := _not_fused(report):
                raise OperationError(why) from error
            raise
    _check_weights(options.name, type(model).__name__, loading)
    check_unembedding(model)
    return model if quantization else model.to(device)


def check_unembedding(model: PreTrainedModel) -> None:
    """Refuse models whose logits are not W h. OperationError."""
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise OperationError(f"{type(model).__name__} has no linear unembedding")


@contextmanager
def _transformers_report() -> Iterator[list[str]]:
    """Keeps out of the log what transformers says of weights that do not fit, a table in colours: what it means here,
    this module says. The lines of the table, when there is one."""
    lines: list[str] = []

    def is_none(record: logging.LogRecord) -> bool:
        text = COLOUR.sub("", record.getMessage())
        if "LOAD REPORT" not in text:
            return True
        lines.extend(text.splitlines())
        return False

    logger = logging.getLogger(modeling_utils.__name__)
    logger.addFilter(is_none)
    try:
        yield lines
    finally:
        logger.removeFilter(is_none)


def _not_fused(report: list[str]) -> str | None:
    """Which weights transformers could not make of several in the files, and why, if that is what went wrong: it says
    so in its report alone."""
    names = [line.split()[0] for line in report if "| CONVERSION" in line]
    causes = [cause for cause, line in pairwise(report) if line.startswith("Error: ")]
    if not names or not causes:
        return None
    return f"its weights do not make up {names[0]}, or have other shapes than by its config.json: {causes[0]}"


def _check_weights(name: str, kind: str, loading: dict[str, Any]) -> None:
    """Refuse files without all weights of the model, each in its shape; warn of weights that it has no use for."""
    missing, unexpected = loading["missing_keys"], loading["unexpected_keys"]
    if loading["mismatched_keys"]:
        weight, found, wanted = min(loading["mismatched_keys"])
        raise OperationError(
            f"its weight {weight} has the shape {list(found)}, and by its config.json it is {list(wanted)}"
        )
    if missing:
        raise OperationError(f"its files lack {len(missing)} weights, such as {min(missing)}")
    if unexpected:
        log.warning(
            "%s: its files have %d weights that are of no part of a %s and are left out, such as %s",
            name,
            len(unexpected),
            kind,
            min(unexpected),
        )


def info_of(
    model: PreTrainedModel,
    folder: Path,
    fingerprint: str,
    options: EngineOptions,
    device: torch.device,
    dtype: torch.dtype,
) -> BaseModelInfo:
    """What the server is told of the model. OperationError."""
    config = model.config.get_text_config()
    architectures = model.config.architectures or [type(model).__name__]
    max_context = options.max_context or getattr(config, "max_position_embeddings", None)
    if not max_context:
        raise OperationError("it does not say how long its context is; set max_context")
    return BaseModelInfo(
        name=options.name,
        folder=str(folder),
        architecture=architectures[0],
        vocab_size=model.get_input_embeddings().num_embeddings,
        max_context=max_context,
        max_rank=options.max_rank,
        lora_alpha=options.lora_alpha,
        eos_tokens=_eos_tokens_of(folder, config),
        num_parameters=model.num_parameters(),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        quantization=options.quantization,
        build=build_of(device, dtype, options.logits_bytes, options.quantization),
        fingerprint=fingerprint,
    )


def state_in(folder: Path) -> str:
    """Of a model's files, as long as none changes. OperationError."""
    with in_a_sentence(f"the files in {folder} are not all there, or damaged"):
        return state_of(folder)


def fingerprint_in(folder: Path, remembered: Path | None) -> str:
    """Of a model's files; in `remembered` is kept what was read of them. OperationError."""
    with in_a_sentence(f"the files in {folder} are damaged"):
        return fingerprint_of(folder, remembered)


def _eos_tokens_of(folder: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """generation_config.json's end-of-sequence ids, then the config's, without repeats. OperationError."""
    found = {"config.json": getattr(config, "eos_token_id", None)}
    if (folder / GENERATION_CONFIG_NAME).is_file():
        with in_a_sentence(f"transformers cannot read its {GENERATION_CONFIG_NAME}"):
            found = {GENERATION_CONFIG_NAME: GenerationConfig.from_pretrained(folder).eos_token_id} | found
    ids = []
    for file, entry in found.items():
        of_file = entry if isinstance(entry, list) else [] if entry is None else [entry]
        if wrong := [token for token in of_file if type(token) is not int]:
            raise OperationError(f"in its {file}, eos_token_id is {wrong[0]!r}, which is no token id")
        ids += of_file
    return tuple(dict.fromkeys(ids))
