"""Stop tokens and stop strings, with a byte-level tokenizer as Qwen's and Llama 3's are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinkercloud.engine.operations import OperationError, SamplingParams
from tinkercloud.engine.torch.stopping import END_BYTES, WINDOW_MARGIN, StopCondition, Tokenizer

PIECES = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "▁foo"]

MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("E", "N"), ("Ġ", "w")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE tokenizer: every byte is a token, and some longer ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate([*alphabet, *("".join(pair) for pair in MERGES)])}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=MERGES))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, additional_special_tokens=["<|end|>"])
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return PreTrainedTokenizerFast.from_pretrained(folder)


def stop_after(folder, tokens: list[int], *strings: str) -> int | None:
    """How many of the tokens are kept, feeding one at a time; None if none of them stops."""
    condition = Tokenizer(str(folder)).stop_condition(SamplingParams(max_tokens=1, seed=0, stop_strings=strings))
    return next((n for n in range(1, len(tokens) + 1) if condition.reached(tokens[:n])), None)


def test_stop_tokens():
    condition = StopCondition([7, 9], (), None)
    assert [condition.reached([1, token]) for token in (7, 8, 9)] == [True, False, True]


def test_nothing_stops_without_stops():
    assert not StopCondition([], (), None).reached([0])


def test_the_whole_last_token_is_kept(folder, tokenizer):
    tokens = tokenizer.encode("hello wll", add_special_tokens=False)
    assert [tokenizer.decode([token]) for token in tokens] == ["hello", " w", "ll"]
    assert stop_after(folder, tokens, "h") == 1
    assert stop_after(folder, tokens, "wl") == 3


def test_a_stop_string_across_token_borders(folder, tokenizer):
    tokens = tokenizer.encode("hello END!", add_special_tokens=False)
    assert [tokenizer.decode([token]) for token in tokens] == ["hello", " ", "EN", "D", "!"]
    assert stop_after(folder, tokens, "lo END") == 4
    assert stop_after(folder, tokens, "lo EX", "o E") == 3


@pytest.mark.parametrize("text", ["aé", "a→b", "x🎉y", "a🎉"])
def test_a_multi_byte_character_counts_when_its_last_byte_is_there(folder, tokenizer, text):
    character = next(char for char in text if ord(char) > 127)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    expected = text.index(character) + len(character.encode())
    assert stop_after(folder, tokens, character) == expected


def bytes_of(text: str) -> list[int]:
    """As tokens of `fallback`."""
    return [1 + byte for byte in text.encode()]


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    """A tokenizer as Llama 2's: bytes for what it has no piece for, and when it decodes, no space at the beginning."""
    model = models.BPE(vocab={piece: index for index, piece in enumerate(PIECES)}, merges=[], byte_fallback=True)
    fast = FastTokenizer(model)
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    path = tmp_path_factory.mktemp("fallback")
    PreTrainedTokenizerFast(tokenizer_object=fast).save_pretrained(path)
    return path


def test_a_space_that_a_text_begins_with_counts(fallback):
    foo, b = PIECES.index("▁foo"), PIECES.index("b")
    assert [stop_after(fallback, tokens, " foo") for tokens in ([foo], [b, foo], [b])] == [1, 2, None]
    assert stop_after(fallback, [b, foo], "foo") == stop_after(fallback, [b, foo], "b f") == 2
    assert stop_after(fallback, bytes_of(" é"), " é") == 3


@pytest.mark.parametrize("before", ["", "日", "日本語", "é🎉→x日", "日本語のとても長い文章をここに書く"])
@pytest.mark.parametrize("stop", ["停", "é→", "とても長い終わりの言葉をここに書いておく。"])
def test_a_stop_string_in_a_run_of_bytes_counts(fallback, before, stop):
    """Cut within a character, all of the run is no text to such a tokenizer."""
    assert stop_after(fallback, bytes_of(before + stop), stop) == len((before + stop).encode())


def test_special_tokens_are_text(folder, tokenizer):
    tokens = tokenizer.encode("hello<|end|> w", add_special_tokens=False)
    assert stop_after(folder, tokens, "<|end|>") == 2


def test_ids_past_the_tokenizer_are_no_text(folder, tokenizer):
    """Models pad their vocabulary: such an id can be drawn."""
    for padding in (1, 200):  # however many
        tokens = [*tokenizer.encode("EN", add_special_tokens=False), *[len(tokenizer) + 100] * padding]
        assert (
            stop_after(folder, [*tokens, *tokenizer.encode("D!", add_special_tokens=False)], "END") == len(tokens) + 1
        )


@settings(max_examples=20)
@given(
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.text(st.characters(codec="utf-8"), min_size=12, max_size=20),
)
def test_a_long_stop_string_ends_where_it_is_complete(folder, tokenizer, before, stop):
    if "\ufffd" in before + stop:
        return
    stop *= 3
    tokens = tokenizer.encode(before + stop + "!", add_special_tokens=False)
    whole = next(n for n in range(1, len(tokens) + 1) if stop in tokenizer.decode(tokens[:n]))
    assert stop_after(folder, tokens, stop, "x" * 1024) == whole
    assert stop_after(folder, tokens[: whole - 1], stop, "x" * 1024) is None


@given(text=st.text(st.characters(codec="utf-8"), max_size=60), start=st.integers(0, 59), length=st.integers(1, 12))
def test_same_as_searching_the_whole_text(folder, tokenizer, text, start, length):
    """The window finds what decoding everything after each token finds."""
    stop = text[start : start + length]
    if not stop or "\ufffd" in stop:
        return
    tokens = tokenizer.encode(text, add_special_tokens=False)
    whole = next(n for n in range(1, len(tokens) + 1) if stop in tokenizer.decode(tokens[:n]))
    assert stop_after(folder, tokens, stop) == whole


def test_work_per_token_does_not_grow():
    """Only a window as long as the stop string is decoded, of a long one only where its end is there."""
    seen: list[int] = []

    def decode(tokens):
        seen.append(len(tokens))
        return "é" * len(tokens)

    def most(*strings: str) -> int:
        seen.clear()
        condition = StopCondition([], strings, decode, num_texts=1)
        for n in range(1, 200):
            condition.reached([0] * n)
        return max(seen)

    assert most("stop", "é") == 8
    assert most("stop" * 100) == END_BYTES + WINDOW_MARGIN
    assert most("stop" * 35 + "é" * 16) == 140 + 32 + WINDOW_MARGIN


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path):
    params = SamplingParams(max_tokens=1, seed=0, stop_strings=("x",))
    with pytest.raises(OperationError, match="use stop token ids instead"):
        Tokenizer(str(tmp_path)).stop_condition(params)
    Tokenizer(str(tmp_path)).stop_condition(SamplingParams(max_tokens=1, seed=0, stop_tokens=(3,)))


def test_an_empty_stop_string_is_refused(folder):
    with pytest.raises(OperationError, match="empty stop string"):
        Tokenizer(str(folder)).stop_condition(SamplingParams(max_tokens=1, seed=0, stop_strings=("",)))
