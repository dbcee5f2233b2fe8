"""The same numbers by other means: plain transformers, PEFT and autograd, one datum at a time, nothing packed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.engine.precision import DTYPE, rounded
from tinkercloud.engine.operations import Datum


def load_plain(folder: Path):
    """The base model with eager attention, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return rounded(model).eval()


def load_peft(folder: Path, adapter_folder: Path, trainable: bool = False) -> PeftModel:
    return PeftModel.from_pretrained(load_plain(folder), adapter_folder, is_trainable=trainable).eval()


def load_alike(folder: Path, adapter_folder: Path | None) -> PreTrainedModel:
    """The model, with an adapter if there is a folder of one, in the type of the engine's."""
    model = load_peft(folder, adapter_folder) if adapter_folder else load_plain(folder)
    return model.to(getattr(torch, DTYPE))


def new_peft(folder: Path, **config) -> PeftModel:
    """A PEFT adapter with nothing at zero."""
    model = get_peft_model(load_plain(folder), PeftConfig(task_type="CAUSAL_LM", **config)).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def logits(model, tokens: np.ndarray) -> Tensor:
    return model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].float()


def target_logprobs(model, datum: Datum) -> Tensor:
    """log p of each target, in the shape of target_tokens."""
    targets = torch.from_numpy(datum.inputs["target_tokens"])
    rows = logits(model, datum.tokens).log_softmax(-1)[-len(targets) :]
    return rows.gather(1, targets if targets.ndim == 2 else targets[:, None]).view(targets.shape)


def cross_entropy(model, data: Sequence[Datum]) -> tuple[float, list[Tensor]]:
    """(sum of the loss with its gradients left in the model, log-probabilities of each datum)."""
    total, logprobs = 0.0, []
    for datum in data:
        values = target_logprobs(model, datum)
        loss = -(values * torch.from_numpy(datum.inputs["weights"])).sum()
        if loss.requires_grad:
            loss.backward()
        total += loss.item()
        logprobs.append(values.detach())
    return total, logprobs


def lora_parameters(model: PeftModel) -> dict[str, Tensor]:
    """The trained parameters, by the keys of a saved adapter."""
    return {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def lora_gradients(model: PeftModel) -> dict[str, Tensor]:
    """Their gradients, by the keys of a saved adapter."""
    return {key: parameter.grad for key, parameter in lora_parameters(model).items()}


def saved_gradients(folder: Path) -> dict[str, Tensor]:
    """The accumulated gradients of a checkpoint folder, by the keys of a saved adapter."""
    return load_file(folder / "gradients.safetensors")
