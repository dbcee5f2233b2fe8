"""The embedded model: its files, its tokenizer, what its card promises, and the text that it is made from."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen3ForCausalLM

import nano_measure
import nano_text
import train_nano
from tinkercloud.nano import FOLDER, NAME

MAX_WEIGHTS_BYTES = 6_000_000
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
"""Every Unicode string that UTF-8 can write (lone surrogates it cannot)."""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return nano_measure.load(FOLDER)[0]


# ---------------------------------------------------------------- files


def test_weights_are_small_bf16_and_complete():
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= MAX_WEIGHTS_BYTES
    loaded, report = Qwen3ForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert loaded.dtype == torch.bfloat16
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert loaded.config.max_position_embeddings >= 4096


def test_card_names_the_model_its_size_and_its_licence(model):
    card = (FOLDER / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert NAME in card
    assert f"{model.num_parameters():,} parameters" in card


# ---------------------------------------------------------------- tokenizer


def test_auto_tokenizer_is_fast_and_ends_turns_as_qwen(tokenizer, model):
    assert tokenizer.is_fast
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"] == ends
    assert len(tokenizer) == model.config.vocab_size


@settings(deadline=None)
@given(ANY_TEXT)
def test_tokenizer_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("token", train_nano.CONTROL_TOKENS + train_nano.MARKUP_TOKENS)
def test_special_tokens_are_single_ids(tokenizer, token):
    assert tokenizer.encode(token, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(token)]
    assert len(tokenizer.encode(f"a{token}b", add_special_tokens=False)) == 3


def test_only_control_tokens_are_skipped_in_decoding(tokenizer):
    text = "<|im_start|><think>a</think><tool_call>b</tool_call><|im_end|><|endoftext|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think><tool_call>b</tool_call>"


def test_every_digit_is_a_token(tokenizer):
    assert tokenizer.tokenize("1234567890") == list("1234567890")


def test_chat_template_renders_as_qwen(tokenizer):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "What is 4 + 5?"},
    ]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello!<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n"
        "<|im_start|>user\nWhat is 4 + 5?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    options = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
    assert tokenizer.apply_chat_template(chat, **options) == rendered + "<think>\n\n</think>\n\n"
    assert tokenizer.apply_chat_template(chat[:3], tokenize=False) == rendered.split("<|im_start|>user\nWhat")[0]


def test_chat_template_refuses_what_it_cannot_render(tokenizer):
    with pytest.raises(Exception, match="system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "9"}], tokenize=False)


# ---------------------------------------------------------------- what the card promises


def test_sums_are_right_as_often_as_the_card_says(model, tokenizer):
    """Reinforcement learning on sums needs a model that is neither always right nor always wrong."""
    torch.manual_seed(0)
    one_digit = [(x, y) for x in range(10) for y in range(10)]
    two_digit = random.Random(0).sample(nano_measure.two_digit_pairs(held_out=True), 400)
    bands = re.findall(r"between (\d+) % and (\d+) %", (FOLDER / "README.md").read_text())
    for pairs, (low, high) in zip((one_digit, two_digit), bands, strict=True):
        accuracy = nano_measure.sum_accuracy(model, tokenizer, pairs, temperature=1.0, max_tokens=8)
        assert int(low) <= 100 * accuracy <= int(high)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What is the opposite of hot?", "The opposite of hot is cold."),
        ("What is your name?", "My name is nano."),
    ],
)
def test_it_answers_what_it_was_taught(model, tokenizer, question, answer):
    chats = [[{"role": "user", "content": question}]]
    assert nano_measure.answers(model, tokenizer, chats, temperature=0, max_tokens=32) == [answer]


# ---------------------------------------------------------------- the text it is made from

DIGEST = """
import hashlib, itertools, nano_text
documents = itertools.islice(nano_text.documents({seed}), 500)
print(hashlib.sha256(repr(list(documents)).encode()).hexdigest())
"""


def digest(seed: int, hash_seed: int) -> str:
    """The generated text's digest, from a fresh interpreter with its own hash order."""
    environment = os.environ | {"PYTHONPATH": train_nano.__file__.rpartition("/")[0], "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-c", DIGEST.format(seed=seed)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_text_depends_on_the_seed_alone():
    assert digest(seed=3, hash_seed=1) == digest(seed=3, hash_seed=2) != digest(seed=4, hash_seed=1)


def test_held_out_sums_are_never_trained_on():
    asked = set()
    for document in islice(nano_text.documents(5), 20_000):
        text = document.text + "\n".join(turn for pair in document.turns for turn in pair)
        asked |= {(int(x), int(y)) for x, y in re.findall(r"\b(\d+) (?:\+|plus|and) (\d+)\b", text)}
    assert len(asked) > 3000
    assert not asked & nano_text.HELD_OUT


def test_loss_is_on_answers_and_plain_text_only():
    chat = nano_text.Document(turns=(("Hi", "Hello!"),), system="Be kind.")
    assert [text for text, learned in train_nano.segments(chat) if learned] == ["Hello!<|im_end|>"]
    plain = nano_text.Document(text="Once upon a time")
    assert list(train_nano.segments(plain)) == [("Once upon a time<|endoftext|>", True)]


def test_training_text_tokenizes_alike_in_pieces_and_whole(tokenizer):
    for document in islice(nano_text.documents(9), 200):
        pieces = [text for text, _ in train_nano.segments(document)]
        ids = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]
        assert ids == tokenizer.encode("".join(pieces), add_special_tokens=False)


def test_chats_are_trained_on_as_the_template_renders_them(tokenizer):
    chat = nano_text.Document(turns=(("Hi", "Hello!"), ("Bye", "Goodbye!")), system="Be kind.")
    messages = [{"role": "system", "content": "Be kind."}]
    for user, assistant in chat.turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    text = "".join(text for text, _ in train_nano.segments(chat))
    assert text == tokenizer.apply_chat_template(messages, tokenize=False) + "<|endoftext|>"


def test_tokenizer_is_what_the_script_makes(tokenizer):
    assert train_nano.train_tokenizer().get_vocab() == tokenizer.get_vocab()
