"""Windows give what gathered pages give, bit for bit, step after step, and stay within their memory."""

from __future__ import annotations

import pytest
import torch

from tinkercloud.engine.torch.decode_window import SPARE_TOKENS, CacheRows, DecodeWindows
from tinkercloud.engine.torch.kv_cache import PAGE_TOKENS, KVCache, LayerShape, pages_for
from tinkercloud.engine.torch.paged_attention import PagedAttention

HEADS, KV_HEADS, DIM = 4, 2, 8
CPU = torch.device("cpu")
STARTS = [5, 40, 16, 31]
STEPS = SPARE_TOKENS + 40


def _cache() -> KVCache:
    """Of a dtype that has no kernels: float32 is attended where its pages are."""
    return KVCache({0: LayerShape(KV_HEADS, DIM, DIM)}, 60, torch.bfloat16, CPU)


def _rows(seed: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, count, DIM, generator=generator).bfloat16() for heads in (HEADS, KV_HEADS, KV_HEADS)]


def _outputs(max_bytes: int | None, leaves_after: int) -> tuple[list[torch.Tensor], int]:
    """What decoding gives, the first sequence only for some steps, and how many windows there were. None: no windows at
    all."""
    cache = _cache()
    windows = None if max_bytes is None else DecodeWindows(cache, max_bytes, CPU)
    pages = [cache.allocate(pages_for(start + STEPS)) for start in STARTS]
    for number, start in enumerate(STARTS):
        PagedAttention(cache, [CacheRows(pages[number], 0, start)], CPU)(0, *_rows(number, start), scaling=0.3)
    outputs, seen = [], {}
    for step in range(STEPS):
        members = range(0 if step < leaves_after else 1, len(STARTS))
        rows = [CacheRows(pages[number], STARTS[number] + step, 1) for number in members]
        attention = PagedAttention(cache, rows, CPU, windows)
        parts = zip(*(_rows(1000 * number + step, 1) for number in members), strict=True)
        outputs.append(attention(0, *(torch.cat(part, dim=2) for part in parts), scaling=0.3))
        if windows is not None:
            seen |= {id(window): window for window in windows._windows}
            assert sum(window.tokens for window in windows._windows) * cache.token_bytes <= max_bytes
    return outputs, len(seen)


@pytest.mark.parametrize("leaves_after", [STEPS, 30])
def test_same_bits_as_gathered_pages(leaves_after):
    expected, _ = _outputs(None, leaves_after)
    token = _cache().token_bytes
    for tokens, most in ((10_000, 20), (200, 20), (0, 0)):
        got, windows = _outputs(tokens * token, leaves_after)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
        assert windows <= most
        assert (windows > 0) == (tokens > 0)


def test_a_sequence_that_comes_back_has_a_new_window():
    """Its pages are others then, even if it has the same length."""
    cache = _cache()
    windows = DecodeWindows(cache, 2**20, CPU)
    pages = cache.allocate(2)
    (first,) = windows.step([[CacheRows(pages, PAGE_TOKENS, 1)]])
    assert windows.step([[CacheRows(pages, PAGE_TOKENS + 1, 1)]]) == [first]
    assert windows.step([[CacheRows(list(pages), PAGE_TOKENS + 2, 1)]]) != [first]
