"""What a request asked to know of its prompt: the log-probabilities of its tokens, and the likeliest ones in their
places. Filled in while the prompt is prefilled, step by step, with a bounded number of rows of logits at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tinkercloud.engine.torch.sampling import top_logprobs, without_distribution
from tinkercloud.engine.types import Sample, TopLogprobs


class PromptScores:
    """The scores of one request's prompt, of the raw model whatever the request's temperature.

    The hidden state at position i scores the token at position i + 1; nothing scores the first token.
    """

    def __init__(self, operation: Sample) -> None:
        self._prompt = operation.prompt
        self._top = operation.topk_prompt_logprobs
        length = len(operation.prompt)
        wanted = operation.prompt_logprobs or self._top
        self.needed_from = 0 if wanted else length
        """The first position of the prompt whose hidden state is still to be taken; with `complete`, none is."""
        self.logprobs = np.full(length, np.nan, np.float32) if operation.prompt_logprobs else None
        """float32 [N]; NaN where nothing was scored."""
        self.top: TopLogprobs | None = without_distribution(length, self._top) if self._top else None

    @property
    def complete(self) -> bool:
        return self.needed_from >= len(self._prompt) - 1

    def take(self, start: int, hidden: Tensor, logits_of: Callable[[Tensor], Tensor], logit_rows: int) -> None:
        """Score from the hidden states [n, H] of positions start, start + 1, ...; `start` is at most `needed_from`.

        `logits_of` gives logits [m, V] of hidden states [m, H]; it is asked for at most `logit_rows` rows at a time.
        """
        end = min(start + len(hidden), len(self._prompt) - 1)
        for first in range(self.needed_from, end, logit_rows):
            last = min(first + logit_rows, end)
            self._score(first + 1, logits_of(hidden[first - start : last - start]).log_softmax(-1))
        self.needed_from = max(self.needed_from, end)

    def _score(self, first: int, distribution: Tensor) -> None:
        """Fill in the positions first, first + 1, ... from their log-probabilities [m, V]."""
        places = slice(first, first + len(distribution))
        if self.logprobs is not None:
            tokens = torch.from_numpy(self._prompt[places].astype(np.int64)).to(distribution.device)
            self.logprobs[places] = distribution.gather(-1, tokens[:, None])[:, 0].cpu().numpy()
        if self.top is not None:
            self.top.token_ids[places], self.top.logprobs[places] = top_logprobs(distribution, self._top)
