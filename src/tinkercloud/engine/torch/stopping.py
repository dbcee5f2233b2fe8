"""When a sequence ends: at a stop token, at a stop string, or at its length.

Stop strings are looked for in the text of the last few tokens only, so a token costs the same however long the sequence
is. A string of n bytes lies within the last n tokens that are text, because each of these is at least one byte of it; a
few more tokens to the left make sure that a character cut by the window's edge lies outside of them. Of a long string
the end is looked for first, likewise: nearly always it is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tinkercloud.base_models import has_tokenizer
from tinkercloud.engine.operations import OperationError, SamplingParams

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens included; incomplete characters become U+FFFD."""

WINDOW_MARGIN = 4
"""Tokens decoded before those that can hold the stop string: the most bytes of one UTF-8 character."""


END_BYTES = 32
"""Of a longer stop string so much of its end is looked for first."""

_INCOMPLETE = "\ufffd"


class StopCondition:
    """The stop tokens and strings of one request. Has no state: one serves all samples of the request."""

    def __init__(
        self, tokens: Sequence[int], strings: Sequence[str], decode: Decode | None, num_texts: int = 0
    ) -> None:
        """`num_texts`: ids from here on only pad the model's vocabulary and are no text."""
        self._tokens = frozenset(tokens)
        self._strings = tuple(strings)
        self._decode = decode
        self._num_texts = num_texts
        self._window = max((len(string.encode()) for string in strings), default=0) + WINDOW_MARGIN
        self._ends = tuple(string.encode()[-END_BYTES:].decode(errors="ignore") for string in strings)

    def reached(self, generated: Sequence[int]) -> bool:
        """Whether the newest of the generated tokens ends the sequence: it is a stop token, or its text completes a
        stop string (which may have begun in earlier generated tokens, never in the prompt)."""
        newest = generated[-1]
        if newest in self._tokens:
            return True
        if not self._strings or self._decode is None or newest >= self._num_texts:
            return False
        if self._window > END_BYTES + WINDOW_MARGIN:
            text = self._decode(self._last_texts(generated, END_BYTES + WINDOW_MARGIN))
            # Of a run of bytes that is cut some decoders make no text at all; others, none of a character at its edge.
            between = text[WINDOW_MARGIN:-WINDOW_MARGIN]
            if _INCOMPLETE not in between and not any(end in text for end in self._ends):
                return False
        for cut in range(WINDOW_MARGIN):  # one of these begins with a whole character
            text = self._decode(self._last_texts(generated, self._window - cut))
            if any(string in text for string in self._strings):
                return True
            if _INCOMPLETE not in text:
                return False
        return False

    def _last_texts(self, generated: Sequence[int], count: int) -> Sequence[int]:
        """The last `count` tokens that are text."""
        if max(last := generated[-count:]) < self._num_texts:
            return last
        texts = (token for token in reversed(generated) if token < self._num_texts)
        return [*islice(texts, count)][::-1]


class Tokenizer:
    """The base model's own tokenizer, loaded when a request first has stop strings."""

    def __init__(self, folder: str, trust_remote_code: bool = False) -> None:
        self._folder = Path(folder)
        self._trust_remote_code = trust_remote_code
        self._tokenizer: Any = None
        self._size = 0
        self._before: list[int] = []
        """Decoded before what is asked for, since some tokenizers drop the space that a text begins with."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens as it goes on behind a prompt: special tokens included, nothing cleaned up."""
        self._load()
        return self._text([*self._before, *tokens])[len(self._text(self._before)) :]

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def stop_condition(self, params: SamplingParams) -> StopCondition:
        """Raises `OperationError` for stop strings without a tokenizer to find them with, or empty ones."""
        if "" in params.stop_strings:
            raise OperationError("an empty stop string would end every sequence; leave it out to have none")
        if not params.stop_strings:
            return StopCondition(params.stop_tokens, (), None)
        self._load()
        return StopCondition(params.stop_tokens, params.stop_strings, self.decode, self._size)

    def _load(self) -> Any:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            if not has_tokenizer(self._folder):
                raise OperationError(
                    f"stop strings need the model's tokenizer, and its folder {self._folder.name!r} has none; "
                    "use stop token ids instead"
                )
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(
                    self._folder, local_files_only=True, trust_remote_code=self._trust_remote_code
                )
            except (OSError, ValueError) as error:
                raise OperationError(
                    f"stop strings need the model's tokenizer, and the one in {self._folder.name!r} does not load "
                    f"({error}); use stop token ids instead"
                ) from error
            self._size = len(self._tokenizer)
            self._before = self._tokenizer.encode("a", add_special_tokens=False)
        return self._tokenizer
