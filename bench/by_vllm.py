"""vLLM on the CPU, in an environment of its own: `PYTHON -m bench.by_vllm FOLDER`, see `bench.worker`.

In one process with its engine and without its HTTP server, in float32, with a LoRA adapter on the layers that vLLM
adapts: all but the unembedding. Random A's and B's of zeros: they take as long as trained ones.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from bench.data import token_rows
from bench.model import CONTEXT
from bench.stage import ALPHA, RANK
from bench.worker import answer_tasks

LAYERS = {
    "self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}


class ByVllm:
    """One model with an adapter, or without."""

    def __init__(self, folder: str) -> None:
        self._llm = LLM(
            folder, skip_tokenizer_init=True, dtype="float32", max_model_len=CONTEXT, enable_lora=True,
            max_lora_rank=RANK, enable_prefix_caching=False, seed=0,
        )  # fmt: skip
        adapter = _write_adapter(Path(folder), Path(f"{folder}-vllm-adapter"))
        self._adapter = LoRARequest("adapter", 1, str(adapter))

    def generate(self, rows: int, tokens: int, new_tokens: int, adapted: bool = True) -> None:
        """`new_tokens` more for each of `rows` prompts of `tokens` tokens, drawn at temperature 1 with their
        log-probabilities, EOS ignored."""
        params = SamplingParams(max_tokens=new_tokens, temperature=1.0, ignore_eos=True, detokenize=False, logprobs=0)
        prompts = [{"prompt_token_ids": row.tolist()} for row in token_rows(rows, tokens)]
        adapter = self._adapter if adapted else None
        for answer in self._llm.generate(prompts, params, use_tqdm=False, lora_request=adapter):
            assert len(answer.outputs[0].token_ids) == new_tokens


def _write_adapter(model: Path, folder: Path) -> Path:
    """In PEFT's form."""
    folder.mkdir(exist_ok=True)
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    sizes = {
        "q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip
    matrices = {}
    for layer in range(config["num_hidden_layers"]):
        for part, names in LAYERS.items():
            for name in names:
                fan_in, fan_out = sizes[name]
                path = f"base_model.model.model.layers.{layer}.{part}.{name}"
                matrices[f"{path}.lora_A.weight"] = torch.randn(RANK, fan_in) / fan_in**0.5
                matrices[f"{path}.lora_B.weight"] = torch.zeros(fan_out, RANK)
    save_file(matrices, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(sizes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


if __name__ == "__main__":
    answer_tasks(ByVllm(sys.argv[1]))
