"""The base model that is measured on: a Qwen3 of 4 million parameters with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

VOCABULARY = 4096
CONTEXT = 2048
"""Tokens."""


def make_model(folder: Path) -> Path:
    """Write the model (no tokenizer: clients send token ids) in transformers' form, the same one each time."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def token_rows(rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Random token ids, int64 [rows, length], the same ones for whoever asks with these arguments."""
    return np.random.default_rng(seed).integers(1, VOCABULARY, (rows, length))
