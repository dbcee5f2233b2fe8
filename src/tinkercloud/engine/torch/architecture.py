"""Whether a model is of a kind that can be served, as far as its configuration says it: without its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import OperationError
from tinkercloud.engine.torch.attention import IMPLEMENTATION
from tinkercloud.engine.torch.loading import (
    NOT_A_MODEL,
    NOT_SERVED,
    check_unembedding,
    config_of,
    dtype_of,
    in_a_sentence,
    info_of,
)
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.quantized import quantization_of


def refusal_of(options: EngineOptions) -> str | None:
    """The sentence with which an engine refuses to load the model in the folder `options.source`; None if there is no
    reason yet. What it finds out with weights alone (whether tokens meet outside of attention) is not known here, nor
    what the library asks for by which transformers loads weights that are quantised in the files."""
    folder, cpu = Path(options.source), torch.device("cpu")
    try:
        dtype = dtype_of(options.dtype, cpu)
        config = config_of(folder, options)
        with in_a_sentence(NOT_A_MODEL):
            quantization_of(options.quantization, config)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=IMPLEMENTATION, trust_remote_code=options.trust_remote_code
                )
        check_unembedding(model)
        with in_a_sentence(NOT_SERVED, telling=()):
            BaseModel(model, info_of(model, folder, "", options, cpu, dtype)).check_whole()
    except OperationError as error:
        return str(error)
    return None
