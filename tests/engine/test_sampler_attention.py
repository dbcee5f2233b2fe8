"""Paged attention against attention over whole sequences, for every shape of step that sampling has."""

from __future__ import annotations

import pytest
import torch

from tinkercloud.engine.torch.attention import Attention, PackedAttention
from tinkercloud.engine.torch.decode_window import CacheRows
from tinkercloud.engine.torch.in_place_attention import InPlaceAttention
from tinkercloud.engine.torch.kv_cache import PAGE_TOKENS, KVCache, LayerShape, pages_for
from tinkercloud.engine.torch.paged_attention import PagedAttention

HEADS, KV_HEADS, DIM = 4, 2, 8
LENGTHS = [40, 1, 17, 100, 33, 16]
"""Tokens of each sequence, of which the last are the step's."""

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
"""One score for each head."""

STEPS = {
    "decode": [1, 1, 1, 1, 1, 1],
    "prefill": LENGTHS,
    "mixed": [1, 1, 17, 40, 1, 2],
}


def inputs() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Query [1, Hq, T, D], key and value [1, Hkv, T, D] of each whole sequence."""
    torch.manual_seed(0)
    return [tuple(torch.randn(1, heads, n, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)) for n in LENGTHS]


def attend_paged(
    counts: list[int], chosen: list[int], dtype: torch.dtype = torch.float32, in_place: bool = False, **options
) -> list[torch.Tensor]:
    """Outputs [count, Hq, D] of the last `counts` tokens of the chosen sequences, as one step over a cache."""

    def of(step: list[CacheRows]) -> Attention:
        return InPlaceAttention(cache, step) if in_place else PagedAttention(cache, step, torch.device("cpu"))

    cache = KVCache({5: LayerShape(KV_HEADS, DIM, DIM)}, 40, dtype, torch.device("cpu"))
    cache.has_kernels = in_place
    if in_place:
        _diverge(cache)
    step, parts = [], []
    for index in chosen:
        query, key, value = (part.to(dtype) for part in inputs()[index])
        start = LENGTHS[index] - counts[index]
        pages = cache.allocate(pages_for(LENGTHS[index]))[::-1]
        if start:
            past = of([CacheRows(pages, 0, start)])
            past(5, query[:, :, :start], key[:, :, :start], value[:, :, :start], scaling=0.3)
        step.append(CacheRows(pages, start, counts[index]))
        parts.append(tuple(part[:, :, start:] for part in (query, key, value)))
    attention = of(step)
    query, key, value = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return list(attention(5, query, key, value, scaling=0.3, **options)[0].split([rows.count for rows in step]))


def _diverge(cache: KVCache) -> None:
    """Let every page hold NaN, as after an adapter that has diverged: attention in place must not read them."""
    pages = cache.allocate(cache.free)
    slots = torch.arange(PAGE_TOKENS, (cache.num_pages + 1) * PAGE_TOKENS)
    nan = torch.full((len(slots), KV_HEADS, DIM), torch.nan)
    cache.write(5, slots, nan, nan)
    cache.release(pages)


@pytest.mark.parametrize("counts", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 10}, {"softcap": 2.0}, {"sliding_window": 7, "softcap": 2.0}, {"sinks": SINKS}],
    ids=["plain", "window", "cap", "window-cap", "sinks"],
)
@pytest.mark.parametrize(
    "dtype, in_place, tolerance",
    [(torch.float32, True, 1e-6), (torch.float32, False, 1e-6), (torch.bfloat16, False, 2e-2)],
    ids=["in-place", "float", "bfloat"],
)
def test_same_as_over_whole_sequences(counts, options, dtype, in_place, tolerance):
    for index, output in enumerate(attend_paged(counts, list(range(len(LENGTHS))), dtype, in_place, **options)):
        whole = PackedAttention([LENGTHS[index]])(5, *inputs()[index], scaling=0.3, **options)[0]
        torch.testing.assert_close(output.float(), whole[-counts[index] :], atol=tolerance, rtol=0)


@pytest.mark.parametrize("counts", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "gathered"])
def test_a_sequence_has_the_same_bits_in_every_step(counts, in_place):
    together = attend_paged(counts, list(range(len(LENGTHS))), in_place=in_place)
    for index, output in enumerate(together):
        assert torch.equal(attend_paged(counts, [index], in_place=in_place)[0], output)
