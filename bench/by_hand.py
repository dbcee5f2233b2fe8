"""The competitor: the same work as a careful person writes it with torch + PEFT, in a process of its own.

`python -m bench.by_hand FOLDER`, see `bench.worker`. Settings that a careful person would try (threads, the form of the
KV cache) come with each task.
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from bench.model import token_rows
from bench.stage import ALPHA, LEARNING_RATE, RANK
from bench.worker import answer_tasks

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


class ByHand:
    """One model in float32 with one LoRA adapter on all of its linear layers, attention by SDPA."""

    def __init__(self, folder: str) -> None:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, lora_dropout=0.0, bias="none")
        self._model = get_peft_model(base, config).train()
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, fused=True
        )
        # Generation needs no adapter beside the weights: merged is how it is fastest. (The tied embedding is merged
        # too, but B is zero.)
        merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        self._merged = get_peft_model(merged, config).merge_and_unload().eval()

    def forward_backward(self, rows: int, tokens: int) -> None:
        """Gradients of the summed cross entropy of `rows` sequences of `tokens` tokens."""
        self._optimizer.zero_grad(set_to_none=True)
        self._backward(torch.from_numpy(token_rows(rows, tokens + 1)))

    def step(self, rows: int, tokens: int) -> None:
        """Gradients, one AdamW step, and zero gradients for the next one."""
        self._backward(torch.from_numpy(token_rows(rows, tokens + 1)))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _backward(self, tokens: Tensor) -> None:
        logits = self._model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        loss.backward()
        loss.item()

    @torch.inference_mode()
    def generate(self, rows: int, tokens: int, new_tokens: int, cache: str) -> None:
        """`new_tokens` more for each of `rows` prompts of `tokens` tokens, drawn at temperature 1, EOS ignored."""
        prompts = torch.from_numpy(token_rows(rows, tokens))
        drawn = self._merged.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation=cache,
            disable_compile=True,
        )
        assert drawn.shape == (rows, tokens + new_tokens)


if __name__ == "__main__":
    logging.disable_progress_bar()
    answer_tasks(ByHand(sys.argv[1]))
