"""Target log-probabilities from hidden states, without ever holding the whole batch's logits.

The unembedding runs in chunks of rows. Where everything fits into one chunk its log-probabilities are kept for the
backward pass; else backward recomputes the chunks, and only of rows that have a gradient.
"""

from __future__ import annotations

from itertools import groupby, pairwise
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from tinkercloud.engine.torch.lora import LoraBatch, Segment, add_lora_gradients, inner_products
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.products import product
from tinkercloud.engine.torch.softmax import log_softmax, softmax_times


class _Chunk(NamedTuple):
    start: int
    end: int
    lora: LoraBatch
    """Segments counted from `start`; a datum's rows are cut where they alone say."""


class TargetLogprobs:
    """log p(token | row) of (row, token) pairs; `values` float32 [n]. If asked, `entropies` float32 [n], nats: of the
    whole distribution of each pair's row."""

    def __init__(
        self,
        model: BaseModel,
        hidden: Tensor,
        rows: Tensor,
        tokens: Tensor,
        lora: LoraBatch,
        logits_bytes: int,
        with_entropies: bool = False,
    ) -> None:
        """`hidden` [T, H] (no autograd); `rows` int64 [n], not decreasing, and `tokens` int64 [n] are the pairs.

        Every row lies in a segment of `lora`, which lie back to back from row 0 with their datums. `logits_bytes`
        bounds one chunk's logits.
        """
        self._model, self._hidden, self._lora = model, hidden, lora
        self._max_rows = max(8, logits_bytes // (4 * model.info.vocab_size) // 8 * 8)
        self._tokens = tokens
        self._rows, self._place = torch.unique_consecutive(rows, return_inverse=True)
        self._kept: Tensor | None = None
        chunks = self._chunks(self._rows)
        values, entropies = [], []
        ends = torch.searchsorted(self._place, torch.tensor([chunk.end for chunk in chunks], device=rows.device))
        first = 0
        for chunk, last in zip(chunks, ends.tolist(), strict=True):
            log_probabilities = self._log_probabilities(self._rows[chunk.start : chunk.end], chunk.lora)
            values.append(log_probabilities[self._place[first:last] - chunk.start, tokens[first:last]])
            if with_entropies:
                entropies.append(row_entropies(log_probabilities))
            if len(chunks) == 1:
                self._kept = log_probabilities
            first = last
        self.values = torch.cat(values)
        self.entropies = torch.cat(entropies)[self._place] if with_entropies else None

    def backward(self, d_values: Tensor) -> Tensor:
        """d_hidden [T, H] from d_values [n]; the unembedding's adapter gradients go where the segments say.

        May be called once.
        """
        d_hidden = torch.zeros_like(self._hidden)
        wanted = d_values.nonzero().squeeze(1)
        if len(wanted) == 0:
            return d_hidden
        d_values, tokens = d_values[wanted], self._tokens[wanted]
        active, place = torch.unique_consecutive(self._place[wanted], return_inverse=True)
        kept, self._kept = self._kept, None
        if kept is not None and len(active) < len(kept):
            kept = kept[active]
        rows = self._rows[active]
        unembedding = self._model.unembedding
        for start, end, lora in self._chunks(rows):
            chunk_rows = rows[start:end]
            log_probabilities = kept if kept is not None else self._log_probabilities(chunk_rows, lora)
            first, last = torch.searchsorted(place, torch.tensor([start, end], device=place.device)).tolist()
            local, weight = place[first:last] - start, d_values[first:last]
            # d logits = onehot * d - softmax * (sum of the row's d)
            row_sum = torch.zeros(end - start, device=weight.device).index_add_(0, local, weight)
            row_sum.neg_()
            softmax_times(log_probabilities, row_sum)
            d_logits = log_probabilities
            d_logits.view(-1).index_add_(0, local * d_logits.shape[1] + tokens[first:last], weight)
            d_logits = d_logits.to(self._hidden.dtype)
            x = self._hidden[chunk_rows]
            d_x = product(d_logits, unembedding.weight)
            inner = inner_products(unembedding, lora, x)
            add_lora_gradients(unembedding, lora, x, inner, d_logits, d_x)
            d_hidden[chunk_rows] = d_x
        return d_hidden

    def _log_probabilities(self, rows: Tensor, lora: LoraBatch) -> Tensor:
        return log_softmax(self._model.logits(self._hidden[rows], lora))

    def _chunks(self, rows: Tensor) -> list[_Chunk]:
        """Cut rows (increasing) into chunks of whole pieces. A piece is cut from one datum's rows alone, so that its
        gradient's sums have the same order whatever else is in the batch."""
        edges, owners = [0], []
        for number, segment in enumerate(self._lora):
            for length, count in segment.datums:
                edges += range(edges[-1] + length, edges[-1] + length * count + 1, length)
                owners += [number] * count
        places = torch.searchsorted(rows, torch.tensor(edges, device=rows.device)).tolist()
        chunks: list[_Chunk] = []
        start = end = 0
        pieces: list[tuple[int, int]] = []
        for owner, (low, high) in zip(owners, pairwise(places), strict=True):
            for first in range(low, high, self._max_rows):
                last = min(first + self._max_rows, high)
                if last - start > self._max_rows:
                    chunks.append(_Chunk(start, end, self._segments(pieces)))
                    start, pieces = first, []
                pieces.append((owner, last - first))
                end = last
        chunks.append(_Chunk(start, end, self._segments(pieces)))
        return chunks

    def _segments(self, pieces: list[tuple[int, int]]) -> LoraBatch:
        """The segments of pieces, (place in the batch's segments, rows), that lie back to back from row 0."""
        segments: list[Segment] = []
        for owner, own in groupby(pieces, key=itemgetter(0)):
            start = segments[-1].end if segments else 0
            segments.append(self._lora[owner].over(start, (rows for _, rows in own)))
        return LoraBatch(segments)


def row_entropies(log_probabilities: Tensor) -> Tensor:
    """-sum p log p of each row [n, vocabulary], nats [n]."""
    rows = len(log_probabilities)
    if rows == 1:
        # The sum of a single row may be cut among threads, and would then have other bits than beside another row.
        log_probabilities = log_probabilities.expand(2, -1)
    return -log_probabilities.exp().mul_(log_probabilities).sum(-1)[:rows]
