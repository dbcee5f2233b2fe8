"""What a request asked to know of its prompt: log-probabilities of its tokens, of the likeliest ones, of ids that it
names and of tokens drawn in their places. Filled in while the prompt is prefilled, step by step, with a bounded number
of rows of logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tinkercloud.engine.operations import Matrix, OperationError, Sample
from tinkercloud.engine.results import AltTokens, TopLogprobs
from tinkercloud.engine.torch.sampling import (
    alternatives_stream,
    draw_alternatives,
    top_logprobs,
    without_distribution,
)
from tinkercloud.engine.torch.softmax import log_softmax

DRAWN_SHARE = 4
"""One in so many of the rows of logits that may be there at a time is drawn from at a time: a draw needs the cumulative
distribution too, in float64."""


class PromptScores:
    """The scores of one request's prompt: log-probabilities of the raw model, whatever the request's temperature.

    The hidden state at position i scores the token at position i + 1; nothing scores the first token. Values depend on
    the prompt and the request's seed alone, not on how the prompt was cut. Its arrays are made when there is something
    to put in: many more requests wait than run.
    """

    def __init__(self, operation: Sample) -> None:
        self._operation = operation
        self._prompt = operation.prompt
        length = len(self._prompt)
        self.targets = _Targets(operation.target_prompt_logprobs) if operation.target_prompt_logprobs else None
        self._tokens_from = length - (operation.prompt_logprobs_last_n or length - 1)
        """The first position whose own and likeliest tokens are scored."""
        wanted = [length]
        if operation.prompt_logprobs or operation.topk_prompt_logprobs:
            wanted.append(self._tokens_from - 1)
        if self.targets is not None:
            wanted.append(self.targets.first_row)
        if operation.prompt_alt_tokens_k:
            wanted.append(0)
        self.needed_from = min(wanted)
        """The first position of the prompt whose hidden state is still to be taken; with `complete`, none is."""

    @cached_property
    def logprobs(self) -> np.ndarray | None:
        """float32 [N]; NaN where nothing was scored."""
        return np.full(len(self._prompt), np.nan, np.float32) if self._operation.prompt_logprobs else None

    @cached_property
    def top(self) -> TopLogprobs | None:
        """[N, k]"""
        most = self._operation.topk_prompt_logprobs
        return without_distribution(len(self._prompt), most) if most else None

    @cached_property
    def alternatives(self) -> AltTokens | None:
        """[N - 1, k]"""
        if not self._operation.prompt_alt_tokens_k:
            return None
        shape = (len(self._prompt) - 1, self._operation.prompt_alt_tokens_k)
        return AltTokens(token_ids=np.zeros(shape, np.int32), logprobs=np.zeros(shape, np.float32))

    @property
    def complete(self) -> bool:
        return self.needed_from >= len(self._prompt) - 1

    def take(self, start: int, hidden: Tensor, logits_of: Callable[[Tensor], Tensor], logit_rows: int) -> None:
        """Score from the hidden states [n, H] of positions start, start + 1, ...; `start` is at most `needed_from`.

        `logits_of` gives logits [m, V] of hidden states [m, H], which are overwritten; it is asked for at most
        `logit_rows` rows at a time.
        """
        end = min(start + len(hidden), len(self._prompt) - 1)
        for first in range(self.needed_from, end, logit_rows):
            last = min(first + logit_rows, end)
            distribution = log_softmax(logits_of(hidden[first - start : last - start]))
            self._score_tokens(first + 1, distribution)
            if self.targets is not None:
                self.targets.score(first, distribution)
            if self.alternatives is not None:
                step = max(1, logit_rows // DRAWN_SHARE)
                for place, rows in zip(range(first, last, step), distribution.split(step), strict=True):
                    self._draw(self.alternatives, place, rows)
        self.needed_from = max(self.needed_from, end)

    def _score_tokens(self, first: int, distribution: Tensor) -> None:
        """The prompt's own tokens and the likeliest ones, at positions first, first + 1, ..., from their
        log-probabilities [m, V]."""
        skipped = max(0, self._tokens_from - first)
        places, distribution = slice(first + skipped, first + len(distribution)), distribution[skipped:]
        if not len(distribution):
            return
        if self.logprobs is not None:
            tokens = torch.from_numpy(self._prompt[places].astype(np.int64)).to(distribution.device)
            self.logprobs[places] = distribution.gather(-1, tokens[:, None])[:, 0].cpu().numpy()
        if self.top is not None:
            most = self.top.token_ids.shape[1]
            self.top.token_ids[places], self.top.logprobs[places] = top_logprobs(distribution, most)

    def _draw(self, alternatives: AltTokens, first: int, distribution: Tensor) -> None:
        """Rows first, first + 1, ... of the alternatives from their log-probabilities [m, V]."""
        rows = slice(first, first + len(distribution))
        seed, count = self._operation.params.seed, alternatives.token_ids.shape[1]
        uniforms = np.stack([alternatives_stream(seed, row).random(count) for row in range(rows.start, rows.stop)])
        ids = draw_alternatives(
            distribution, self._operation.params.temperature, torch.from_numpy(uniforms).to(distribution.device)
        )
        alternatives.token_ids[rows] = ids.to(torch.int32).cpu().numpy()
        alternatives.logprobs[rows] = distribution.gather(-1, ids).cpu().numpy()


class _Targets:
    """The ids that a request names, and their log-probabilities as they become known."""

    def __init__(self, asked: Matrix) -> None:
        self._asked = asked

    @property
    def first_row(self) -> int:
        """The first that names an id."""
        return int(self._asked.rows[np.argmax(self._asked.values >= 0)])

    @cached_property
    def _named(self) -> np.ndarray:
        """Places of `values` that name an id."""
        return np.flatnonzero(self._asked.values >= 0)

    @cached_property
    def _rows(self) -> np.ndarray:
        """The row of each of them."""
        return self._asked.rows[self._named]

    @cached_property
    def _logprobs(self) -> np.ndarray:
        """float32, of each of `values`."""
        return np.zeros(len(self._asked.values), np.float32)

    def score(self, first: int, distribution: Tensor) -> None:
        """Rows first, first + 1, ... from their log-probabilities [m, V]."""
        begin, end = np.searchsorted(self._rows, (first, first + len(distribution)))
        places = self._named[begin:end]
        rows = torch.from_numpy(self._rows[begin:end] - first).to(distribution.device)
        ids = torch.from_numpy(self._asked.values[places]).to(distribution.device)
        self._logprobs[places] = distribution[rows, ids].cpu().numpy()

    def output(self) -> Matrix:
        """Laid out as the request's, 0 where it names nothing."""
        return Matrix(self._logprobs, self._asked.shape, self._asked.row_ends, self._asked.columns)


def check_scoring(operation: Sample, vocab: int) -> None:
    """Raises `OperationError` for what cannot be scored of the prompt."""
    rows = len(operation.prompt) - 1
    if operation.prompt_alt_tokens_k < 0:
        raise OperationError(f"prompt_alt_tokens_k is {operation.prompt_alt_tokens_k}; it must be 0 or more")
    last = operation.prompt_logprobs_last_n
    if last is not None and not (operation.prompt_logprobs and 1 <= last <= rows):
        raise OperationError(f"prompt_logprobs_last_n is {last}; it must be 1 to {rows}, and needs prompt_logprobs")
    targets = operation.target_prompt_logprobs
    if targets is None:
        return
    if targets.shape[0] != rows:
        raise OperationError(f"target_prompt_logprobs has {targets.shape[0]} rows; it must have {rows}")
    if len(targets.rows) != len(targets.values):
        raise OperationError("target_prompt_logprobs has more or fewer token ids than its shape says")
    if not (targets.values >= 0).any() or targets.values.min() < -1 or targets.values.max() >= vocab:
        raise OperationError(f"target_prompt_logprobs must name a token id, 0 to {vocab - 1}, and have else only -1")
