"""Whether a model is of a kind that can be served, as far as its configuration says it: without its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.operations import OperationError
from tinkercloud.engine.torch.attention import IMPLEMENTATION
from tinkercloud.engine.torch.loading import check_unembedding, config_of, dtype_of, info_of, one_line
from tinkercloud.engine.torch.model import BaseModel


def refusal_of(options: EngineOptions) -> str | None:
    """The sentence with which an engine refuses to load the model in the folder `options.source`; None if there is no
    reason yet. What it finds out with weights alone (whether tokens meet outside of attention) is not known here."""
    folder, cpu = Path(options.source), torch.device("cpu")
    try:
        config = config_of(folder, options)
        dtype = dtype_of(options.dtype, cpu)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=IMPLEMENTATION, trust_remote_code=options.trust_remote_code
                )
        except Exception as error:  # whatever a configuration that is none makes it raise
            raise OperationError(f"it cannot be loaded as a causal language model: {one_line(error)}") from error
        check_unembedding(model)
        BaseModel(model, info_of(model, folder, "", options, cpu, dtype)).check_whole()
    except OperationError as error:
        return str(error)
    return None
