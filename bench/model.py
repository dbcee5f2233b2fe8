"""The base models that are measured on: Qwen3 with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONTEXT = 2048
"""Tokens."""


@dataclass(frozen=True)
class Shape:
    """One of the models."""

    name: str
    label: str
    """Its size, in names of measurements."""
    hidden: int
    layers: int
    vocabulary: int
    head_dim: int = 64
    groups: int = 2
    """Query heads that share a key head."""
    tied: bool = True
    """Whether the unembedding is the embedding."""

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def intermediate(self) -> int:
        return 3 * self.hidden

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of each linear layer, the unembedding included."""
        hidden, keys = self.hidden, self.hidden // self.groups
        attention = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
        mlp = [(hidden, self.intermediate)] * 2 + [(self.intermediate, hidden)]
        return (attention + mlp) * self.layers + [(hidden, self.vocabulary)]

    def product_flop(self, tokens: int, rank: int) -> int:
        """Floating point operations of the matrix products that a forward_backward of so many tokens needs: with each
        frozen weight forwards and backwards to its input, with the adapter's factors also to their gradients."""
        return sum(4 * fan_in * fan_out + 6 * rank * (fan_in + fan_out) for fan_in, fan_out in self.linears) * tokens


SMALL = Shape("bench/qwen3-4m", "4m", hidden=256, layers=4, vocabulary=4096)
MIDDLE = Shape("bench/qwen3-30m", "30m", hidden=512, layers=8, vocabulary=8192)
LARGE = Shape(
    "bench/qwen3-8b", "8b", hidden=4096, layers=36, vocabulary=151_936, head_dim=128, groups=4, tied=False
)  # fmt: skip
"""Qwen3-8B's, for `bench.device`."""


def make_model(shape: Shape, folder: Path, device: str = "cpu", dtype: str = "float32") -> Path:
    """Write the model (no tokenizer: clients send token ids) in transformers' form, the same one each time. `device`
    makes the random numbers."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // shape.groups,
        head_dim=shape.head_dim,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=shape.tied,
        bos_token_id=0,
        eos_token_id=0,
        dtype=dtype,
    )
    with torch.device(device):
        model = Qwen3ForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder
