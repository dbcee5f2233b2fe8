"""The competitor: the same work as a careful person writes it with torch + PEFT, in a process of its own.

`python -m bench.by_hand FOLDER`, see `bench.worker`. Settings that a careful person would try (threads, how sequences
are put into batches, the form of a loss or of the KV cache) come with each task.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from bench.data import BATCHES, Example, token_rows, uniform
from bench.stage import ALPHA, LEARNING_RATE, RANK
from bench.worker import answer_tasks

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
CONFIG = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, lora_dropout=0.0, bias="none")


class ByHand:
    """One model in float32 with LoRA adapters on all of its linear layers, attention by SDPA."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._models: list[nn.Module] = []
        self._model = get_peft_model(self._base(), CONFIG).train()
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, fused=True
        )

    def _base(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32, attn_implementation="sdpa")

    def _merged(self, adapter: int) -> nn.Module:
        """Generation needs no adapter beside the weights: merged is how it is fastest, with a model for each adapter.
        (The tied embedding is merged too, but B is zero.)"""
        while len(self._models) <= adapter:
            self._models.append(get_peft_model(self._base(), CONFIG).merge_and_unload().eval())
        return self._models[adapter]

    # ------------------------------------------------------------ training

    def forward_backward(self, kind: str, groups: int = 1, form: str = "logsumexp", **shape: int) -> None:
        """Gradients of the summed loss of a batch of `bench.data`.

        Sorted by length and cut into `groups`, each padded to its own longest. `form`: of the loss of soft targets.
        """
        self._optimizer.zero_grad(set_to_none=True)
        examples = sorted(BATCHES[kind](**shape), key=lambda example: len(example.tokens))
        size = -(-len(examples) // groups)
        for first in range(0, len(examples), size):
            self._backward(examples[first : first + size], form)

    def step(self, rows: int, tokens: int) -> None:
        """Gradients, one AdamW step, and zero gradients for the next one."""
        self._backward(uniform(rows, tokens))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def tenants(self, count: int, rows: int, tokens: int) -> None:
        """Gradients of `count` adapters, one after the other, each of a batch of its own."""
        for tenant in range(count):
            name = f"tenant-{tenant}"
            if name not in self._model.peft_config:
                self._model.add_adapter(name, CONFIG)
            self._model.set_adapter(name)
            self._model.zero_grad(set_to_none=True)
            self._backward(uniform(rows, tokens, seed=tenant))
        self._model.set_adapter("default")

    def _backward(self, examples: Sequence[Example], form: str = "logsumexp") -> None:
        """Attention is causal, so tokens that fill up a sequence's end need no mask, only no target: their rows are
        left out of the unembedding."""
        model = self._model.base_model.model
        lengths = torch.tensor([len(example.tokens) for example in examples])
        tokens = pad_sequence([torch.from_numpy(example.tokens) for example in examples], batch_first=True)
        targets = torch.cat([torch.from_numpy(example.targets) for example in examples])
        weights = torch.cat([torch.from_numpy(example.weights) for example in examples])
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        rows = hidden.flatten(0, 1) if real.all() else hidden[real]
        loss = _loss(model.lm_head(rows), targets, weights, form)
        loss.backward()
        loss.item()

    # ------------------------------------------------------------ sampling

    @torch.inference_mode()
    def generate(self, rows: int, tokens: int, new_tokens: int, cache: str, adapters: int = 1) -> None:
        """`new_tokens` more for each of `rows` prompts of `tokens` tokens, drawn at temperature 1, EOS ignored; the
        prompts shared out among the adapters, one of which runs after the other."""
        for adapter, prompts in enumerate(torch.from_numpy(token_rows(rows, tokens)).chunk(adapters)):
            self._generate(self._merged(adapter), prompts, new_tokens, cache)

    def _generate(self, model: nn.Module, prompts: Tensor, new_tokens: int, cache: str) -> None:
        drawn = model.generate(
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
        assert drawn.shape == (len(prompts), prompts.shape[1] + new_tokens)


def _loss(logits: Tensor, targets: Tensor, weights: Tensor, form: str) -> Tensor:
    """-sum of weight * log p(target): logits [n, V], targets and weights [n] or [n, K]."""
    if targets.ndim == 1:
        return (cross_entropy(logits, targets, reduction="none") * weights).sum()
    if form == "log_softmax":
        return -(logits.log_softmax(-1).gather(-1, targets) * weights).sum()
    return (logits.logsumexp(-1) * weights.sum(-1)).sum() - (logits.gather(-1, targets) * weights).sum()


if __name__ == "__main__":
    logging.disable_progress_bar()
    answer_tasks(ByHand(sys.argv[1]))
