"""What `tinkercloud/nano` can do, in figures: its sums, and its answers to what it was taught."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from nano_text import ABILITIES, HELD_OUT, LARGEST_SUMMAND

Message = dict[str, str]

SEED = 1234567  # not the training text's
FEW_SHOT: list[Message] = [{"role": "user", "content": "What is 4 + 5?"}, {"role": "assistant", "content": "9"}]
CLOSED = [name for name in ABILITIES if name not in ("greeting", "group", "story", "sums")]
"""The kinds of chat in which a question has one right answer."""


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in fp32 on the CPU, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    chats: list[list[Message]],
    temperature: float,
    max_tokens: int,
) -> list[str]:
    """What the assistant says next in each chat; greedy at temperature 0, else drawn from torch's global generator."""
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    drawn: list[str] = []
    for start in range(0, len(prompts), 256):
        inputs = tokenizer(prompts[start : start + 256], padding=True, padding_side="left", return_tensors="pt")
        how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        output = model.generate(**inputs, **how, max_new_tokens=max_tokens)
        new = output[:, inputs["input_ids"].shape[1] :]
        drawn += tokenizer.batch_decode(new, skip_special_tokens=True)
    return drawn


def sum_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[tuple[int, int]],
    temperature: float,
    prefix: Sequence[Message] = (),
    max_tokens: int = 16,
) -> float:
    """The share of "What is x + y?" whose answer ends in the right number."""
    chats = [[*prefix, {"role": "user", "content": f"What is {x} + {y}?"}] for x, y in pairs]
    said = answers(model, tokenizer, chats, temperature, max_tokens)
    right = [re.findall(r"\d+", text)[-1:] == [str(x + y)] for text, (x, y) in zip(said, pairs, strict=True)]
    return sum(right) / len(right)


def two_digit_pairs(held_out: bool) -> list[tuple[int, int]]:
    """Pairs of two-digit summands that never occur in the training text, or those that may."""
    return [(x, y) for x in range(10, 100) for y in range(10, 100) if ((x, y) in HELD_OUT) == held_out]


def ability_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ability: str, number: int) -> float:
    """The share of a kind's last questions that are answered greedily word for word, the turns before them given."""
    rng = random.Random(SEED)
    drawn = [ABILITIES[ability][0](rng) for _ in range(number)]
    chats = []
    for turns in drawn:
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        chats.append(messages[:-1])
    said = answers(model, tokenizer, chats, temperature=0, max_tokens=32)
    return sum(text == turns[-1][1] for text, turns in zip(said, drawn, strict=True)) / number


def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Plain text after a plain prompt, at temperature 0.7."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=100)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def measure(folder: Path) -> None:
    """Print the figures of the model card."""
    model, tokenizer = load(folder)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    size = (folder / "model.safetensors").stat().st_size
    print(f"{model.num_parameters():,} parameters, {size / 1e6:.1f} MB")
    everything = [(rng.randint(0, LARGEST_SUMMAND), rng.randint(0, LARGEST_SUMMAND)) for _ in range(1000)]
    print(f"{'right sums':48}temperature 1   greedy")
    for name, pairs, options in (
        ("one-digit", [(x, y) for x in range(10) for y in range(10)] * 5, {}),
        ("two-digit, not in the training text", two_digit_pairs(True), {}),
        ("two-digit, in the training text", rng.sample(two_digit_pairs(False), 1000), {}),
        ("0 to 100, after one example, at most 5 tokens", everything, {"prefix": FEW_SHOT, "max_tokens": 5}),
    ):
        drawn, greedy = (sum_accuracy(model, tokenizer, pairs, t, **options) for t in (1.0, 0.0))
        print(f"{name:48}{drawn:13.0%}{greedy:9.0%}")
    print("right answers to other questions, greedy")
    for name in CLOSED:
        print(f"{name:48}{ability_accuracy(model, tokenizer, name, 200):13.0%}")
    print(continuation(model, tokenizer, "Once upon a time"))
