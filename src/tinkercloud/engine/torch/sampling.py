"""Drawing the next token of many sequences at once, each with its own temperature, top-k, top-p and random stream.

A draw inverts the cumulative distribution at one uniform number, so a sequence uses exactly one number per token and
its stream depends on (seed, sample index, position) and on nothing else: not on the batch it is in, and not on whether
it was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinkercloud.engine.operations import OperationError, SamplingParams
from tinkercloud.engine.results import TopLogprobs
from tinkercloud.engine.torch.kernels.compiled import have_kernels
from tinkercloud.engine.torch.kernels.draws import drawn
from tinkercloud.engine.torch.kernels.softmax import BLOCK

NO_LOGPROB = -99999.0
"""In `TopLogprobs`, where a position has no distribution (SDK `SampleResponse`)."""

_FLOAT32 = torch.finfo(torch.float32)

_ALTERNATIVES = 2**63
"""Streams from here on are a prompt's; those below, samples'."""


def random_stream(seed: int, sample_index: int) -> np.random.Generator:
    """The uniform numbers of one sequence: number i, in [0, 1), draws its token i.

    Philox is counter-based (Salmon et al., 2011): streams of different keys are independent, and one costs 200 bytes.
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed, sample_index], dtype=np.uint64)))


def alternatives_stream(seed: int, position: int) -> np.random.Generator:
    """The uniform numbers that draw the alternatives to one token of a prompt. No sample of the request has them."""
    return random_stream(seed, _ALTERNATIVES + position)


def check_params(params: SamplingParams) -> None:
    """Raises `OperationError` for parameters that describe no distribution."""
    if params.max_tokens < 1:
        raise OperationError(f"max_tokens is {params.max_tokens}; it must be at least 1")
    if not 0 <= params.temperature < float("inf"):
        raise OperationError(f"temperature is {params.temperature}; it must be 0 (greedy) or a positive number")
    if params.top_k < 1 and params.top_k != -1:
        raise OperationError(f"top_k is {params.top_k}; it must be at least 1, or -1 for all tokens")
    if not 0 < params.top_p <= 1:
        raise OperationError(f"top_p is {params.top_p}; it must be above 0 and at most 1")
    if not 0 <= params.seed < 2**64:
        raise OperationError(f"seed is {params.seed}; it must be in [0, 2**64)")


class Draw(NamedTuple):
    tokens: Tensor
    """int64 [n]"""
    logprobs: Tensor
    """float32 [n]: log-probability of each token at its row's temperature (greedy: 1), before top-k and top-p. NaN
    where the logits were not finite."""
    logits: Tensor
    """float32 [n, V] at its row's temperature, less their maximum."""
    normalizers: Tensor
    """float32 [n, 1]: the logarithm of the sum of a row's exponentials."""

    @property
    def distribution(self) -> Tensor:
        """float32 [n, V]: the log-probabilities that `logprobs` are from."""
        return self.logits - self.normalizers


def draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Draw:
    """One token for each row of `logits`, float32 [n, V], from its parameters and its number in [0, 1).

    Greedy rows take the lowest of equally likely ids. `logits` may be overwritten.
    """
    vocab, device = logits.shape[-1], logits.device
    temperatures = [_divisor(row.temperature) if row.temperature != 0 else 0.0 for row in params]
    if have_kernels(logits):
        numbers = np.array(temperatures, dtype=np.float32), np.array(uniforms, dtype=np.float64)
        tokens, normalizers = drawn(logits, *map(torch.from_numpy, numbers))
    else:
        tokens, normalizers = _drawn(logits, torch.tensor(temperatures, dtype=torch.float32, device=device), uniforms)
    filtered = [
        index for index, row in enumerate(params) if row.temperature != 0 and (0 < row.top_k < vocab or row.top_p < 1)
    ]
    if filtered:
        weights = _filtered(logits[filtered], [params[index] for index in filtered])
        tokens[filtered] = _invert(weights, _block_sums(weights), [uniforms[index] for index in filtered])
    logprobs = (logits.gather(-1, tokens[:, None]) - normalizers)[:, 0]
    return Draw(tokens, logprobs, logits, normalizers)


def _divisor(temperature: float) -> float:
    """A temperature as float32, neither 0 nor infinite: long before, the distribution is a single point, or uniform."""
    return min(max(temperature, _FLOAT32.tiny), _FLOAT32.max)


def draw_alternatives(distribution: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """For each number in [0, 1) of `uniforms`, float64 [n, k], an id drawn with replacement at a temperature from its
    row of log-probabilities, float32 [n, V]: int64 [n, k]."""
    if temperature == 0:
        return distribution.argmax(-1, keepdim=True).expand(-1, uniforms.shape[1])
    scaled = distribution - distribution.amax(-1, keepdim=True)
    if temperature != 1:
        scaled.div_(_divisor(temperature))
    cumulative = scaled.exp_().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, _below(uniforms * total, total), right=True)
    return ids.clamp_(max=distribution.shape[-1] - 1)


def _drawn(logits: Tensor, temperatures: Tensor, uniforms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """See `kernels.draws.drawn`: the same for other devices."""
    # Relative to the maximum, so that a tiny temperature gives -inf and 0 rather than inf - inf.
    logits.sub_(logits.amax(-1, keepdim=True)).div_(temperatures.where(temperatures != 0, 1)[:, None])
    weights = logits.exp()
    sums = _block_sums(weights)
    # Greedy tokens are of the logits: their log-probabilities may round to a tie that is none.
    tokens = torch.where(temperatures == 0, logits.argmax(-1), _invert(weights, sums, uniforms))
    return tokens, sums.sum(-1, keepdim=True).log_().float()


def _filtered(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities [n, V], up to a factor of each row, without what top-k, then top-p of what is left, rule out.
    Of equally likely ids the lowest stay. `logits` are a draw's own; they are overwritten."""
    vocab, device = logits.shape[-1], logits.device
    top_k = [min(row.top_k, vocab) if row.top_k > 0 else vocab for row in params]
    top_p = torch.tensor([row.top_p for row in params], dtype=torch.float64, device=device)[:, None]
    # Logits are ranked and not their exponentials, which are the same number at a great temperature. Of the order only
    # the values are used: that of equal ones would depend on the other rows' top-k.
    if max(top_k) < vocab:
        in_order = logits.topk(max(top_k) + 1, dim=-1).values
    else:
        in_order = logits.sort(dim=-1, descending=True).values
    width = in_order.shape[-1]
    is_out = torch.arange(width, device=device) >= torch.tensor(top_k, device=device)[:, None]
    values = in_order.exp().masked_fill_(is_out, 0)
    cumulative = values.cumsum(-1, dtype=torch.float64)
    filled = top_p * cumulative[:, -1:]
    # A token is in the nucleus if those before it do not yet fill it; the most likely one always is.
    count = (cumulative.sub_(values) < filled).sum(-1, keepdim=True).clamp_(min=1)
    least = in_order.gather(-1, count - 1)
    kept = logits >= least
    is_equal = (in_order.gather(-1, count.clamp(max=width - 1)) == least) & (count < width)
    if rows := is_equal[:, 0].nonzero()[:, 0].tolist():
        kept[rows] = _largest(logits[rows], least[rows], count[rows])
    return logits.exp_().masked_fill_(~kept, 0)


def _largest(numbers: Tensor, least: Tensor, count: Tensor) -> Tensor:
    """Bool [n, V]: which are the `count` [n, 1] largest of each row, `least` [n, 1] being the last of them; of those
    that equal it, the first ones."""
    above, equal = numbers > least, numbers == least
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= count - above.sum(-1, keepdim=True)))


def _block_sums(weights: Tensor) -> Tensor:
    """Sums of `BLOCK` neighbouring weights each, the last block's of what is left: [n, V] to float64 [n, blocks]."""
    whole = weights.shape[-1] // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1, dtype=torch.float64)
    if whole == weights.shape[-1]:
        return sums
    return torch.cat((sums, weights[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)), dim=-1)


def _invert(weights: Tensor, sums: Tensor, uniforms: Sequence[float]) -> Tensor:
    """The first id at which the cumulative weight passes the uniform number's share of the whole, int64 [n].

    `sums` are the weights' `_block_sums`: first the block is found, then the id in it.
    """
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1:]
    share = _below(torch.tensor(uniforms, dtype=torch.float64, device=total.device)[:, None] * total, total)
    block = torch.searchsorted(cumulative, share, right=True).clamp_(max=sums.shape[-1] - 1)
    before = cumulative.gather(-1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0)
    ids = block * BLOCK + torch.arange(BLOCK, device=block.device)
    last = weights.shape[-1] - 1
    own = weights.gather(-1, ids.clamp(max=last)).masked_fill_(ids > last, 0).cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(own, _below(share - before, own[:, -1:]), right=True)
    return (block * BLOCK + place)[:, 0].clamp_(max=last)


def _below(share: Tensor, total: Tensor) -> Tensor:
    """The share, made less than the total where rounding has lifted it to that: past the total there is no id."""
    return torch.minimum(share, torch.nextafter(total, torch.zeros_like(total)))


def top_logprobs(distribution: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k most likely ids of each row and their log-probabilities, most likely first, of equally likely ones the
    lowest: int32 and float32 [n, k]."""
    in_order, ids = distribution.topk(min(k + 1, distribution.shape[-1]), dim=-1)
    values, ids, least = in_order[:, :k], ids[:, :k], in_order[:, k - 1 : k]
    if rows := (in_order[:, k:] == least).any(-1).nonzero()[:, 0].tolist():
        count = torch.full((len(rows), 1), k, device=distribution.device)
        ids[rows] = _largest(distribution[rows], least[rows], count).nonzero()[:, 1].view(-1, k)
    ids = ids.sort(dim=-1).values
    order = distribution.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(-1, order).to(torch.int32).cpu().numpy(), values.cpu().numpy()


def without_distribution(positions: int, k: int) -> TopLogprobs:
    """A `TopLogprobs` to fill in: id 0 and `NO_LOGPROB` everywhere."""
    return TopLogprobs(
        token_ids=np.zeros((positions, k), dtype=np.int32),
        logprobs=np.full((positions, k), NO_LOGPROB, dtype=np.float32),
    )
