"""Train the embedded model `tinkercloud/nano` from nothing, or measure it: the figures of its card.

python scripts/train_nano.py build/nano        # tokenizer and weights into a folder, deterministic on one machine
python scripts/train_nano.py --measure build/nano
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from nano_measure import measure
from nano_text import Document, documents
from tinkercloud.nano import FOLDER

SEED = 0
VOCABULARY = 2048  # tokens, special ones included
TOKENIZER_DOCUMENTS = 20_000
STEPS = 1300
ROWS, COLUMNS = 8, 256  # tokens of a batch
PEAK_LEARNING_RATE = 3e-3
WARMUP = 50  # steps

PRETOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's pre-tokenizer: every digit is a token of its own, so that sums can be learned."""

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MARKUP_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""Qwen3's added tokens in their order; decoding with `skip_special_tokens` leaves the markup in the text."""


# ---------------------------------------------------------------- tokenizer


def segments(document: Document) -> Iterator[tuple[str, bool]]:
    """The document as (text, whether it is learned), cut at special tokens only, so that the pieces tokenize alike."""
    if document.text:
        yield document.text + "<|endoftext|>", True
        return
    if document.system:
        yield f"<|im_start|>system\n{document.system}<|im_end|>\n", False
    for user, assistant in document.turns:
        block = "<think>\n\n</think>\n\n" if document.thinking_block else ""
        yield f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{block}", False
        yield f"{assistant}<|im_end|>", True
        yield "\n", False
    yield "<|endoftext|>", False


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer on generated text; without a normalizer, so that it gives back any text unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CONTROL_TOKENS) - len(MARKUP_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = ("".join(text for text, _ in segments(document)) for document in documents(SEED))
    words = (part for text in islice(texts, TOKENIZER_DOCUMENTS) for part in text.split("<|im_end|>"))
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=(FOLDER / "chat_template.jinja").read_text(),
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------- training


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Documents packed end to end: (tokens [ROWS, COLUMNS + 1], whether each is learned, of the same shape)."""
    stream = documents(SEED)
    size = ROWS * (COLUMNS + 1)
    tokens: list[int] = []
    learned: list[bool] = []
    while True:
        while len(tokens) < size:
            pieces = [piece for document in islice(stream, 256) for piece in segments(document)]
            encoded = tokenizer([text for text, _ in pieces], add_special_tokens=False)["input_ids"]
            for ids, (_, learn) in zip(encoded, pieces, strict=True):
                tokens += ids
                learned += [learn] * len(ids)
        shape = (ROWS, COLUMNS + 1)
        yield torch.tensor(tokens[:size]).view(shape), torch.tensor(learned[:size]).view(shape)
        del tokens[:size], learned[:size]


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The model's shape, with random weights."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=eos,
            pad_token_id=pad,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=[eos, pad], pad_token_id=pad)
    return model


def learning_rate(step: int, steps: int) -> float:
    """Linear warmup, then linear to zero."""
    return PEAK_LEARNING_RATE * min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """`steps` of Muon (the layers' matrices) and AdamW (all else) on the mean loss of the learned tokens, in fp32."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    rest = [parameter for name, parameter in model.named_parameters() if "proj" not in name]
    optimizers = (
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    )
    started = time.perf_counter()
    for step, (tokens, learned) in enumerate(islice(batches(tokenizer), steps)):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        targets = learned[:, 1:]
        hidden = model.model(tokens[:, :-1], use_cache=False).last_hidden_state
        loss = cross_entropy(model.lm_head(hidden[targets]), tokens[:, 1:][targets])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)


def build(folder: Path, steps: int) -> None:
    """Train everything and write it to `folder` as Hugging Face files, weights in bf16."""
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters")
    train(model, tokenizer, steps)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes the name of a class that 4, which older clients have, does not know.
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings.pop("backend")
    config.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--measure", action="store_true", help="measure the model in the folder, train nothing")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    options = parser.parse_args()
    if not options.measure:
        build(options.folder, options.steps)
    measure(options.folder)


if __name__ == "__main__":
    main()
