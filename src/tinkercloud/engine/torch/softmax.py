"""Log-probabilities over the vocabulary: the same bits for the same logits, whoever asks."""

from __future__ import annotations

from torch import Tensor

from tinkercloud.engine.torch.kernels import softmax as kernels
from tinkercloud.engine.torch.kernels.compiled import have_kernels

BLOCK_BYTES = 2**20
"""Of logits that are worked on at a time: they stay in a core's cache from one operation to the next."""


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities float32 of logits float32 [n, V], contiguous, in their place."""
    if have_kernels(logits):
        kernels.log_softmax(logits)
        return logits
    for block in logits.split(_block_rows(logits)):
        block.copy_(block.log_softmax(dim=-1))
    return logits


def softmax_times(log_probabilities: Tensor, factors: Tensor) -> None:
    """Make exp(log_probabilities) * factors of [n, V] and [n] in the place of the first."""
    if have_kernels(log_probabilities):
        kernels.softmax_times(log_probabilities, factors)
        return
    rows = _block_rows(log_probabilities)
    for block, own in zip(log_probabilities.split(rows), factors.split(rows), strict=True):
        block.exp_().mul_(own.unsqueeze(1))


def _block_rows(logits: Tensor) -> int:
    """How many rows [n, V] are worked on at a time where there are no kernels."""
    return max(8, BLOCK_BYTES // (4 * logits.shape[1]))
