"""The paged cache: exact accounting, sharing, and no leak of one sequence's numbers into another's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinkercloud.engine.torch.kv_cache import PAGE_TOKENS, KVCache, LayerShape, OutOfPages, pages_for


def make_cache(num_pages: int = 8, dtype: torch.dtype = torch.float32) -> KVCache:
    layers = {0: LayerShape(2, 4, 4), 3: LayerShape(1, 4, 6)}
    return KVCache(layers, num_pages, dtype, torch.device("cpu"))


def write(cache: KVCache, pages: list[int], start: int, count: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Random keys and values for `count` tokens from `start`; returns what was written to each layer."""
    slots = torch.tensor([pages[i // PAGE_TOKENS] * PAGE_TOKENS + i % PAGE_TOKENS for i in range(start, start + count)])
    written = {}
    for layer, shape in cache.layers.items():
        written[layer] = (
            torch.randn(count, shape.kv_heads, shape.key_dim).to(cache.dtype),
            torch.randn(count, shape.kv_heads, shape.value_dim).to(cache.dtype),
        )
        cache.write(layer, slots, *written[layer])
    return written


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_pages_for(tokens, pages):
    assert pages_for(tokens) == pages


def test_what_is_written_is_read_back_in_order_of_the_tokens():
    cache = make_cache()
    cache.allocate(2)
    pages = list(reversed(cache.allocate(3)))
    written = write(cache, pages, 0, 40)
    for layer, (key, value) in written.items():
        keys, values = cache.read(layer, torch.tensor([pages]))
        assert torch.equal(keys[0, :, :40], key.transpose(0, 1))
        assert torch.equal(values[0, :, :40], value.transpose(0, 1))


def test_more_than_is_free_is_refused_and_takes_nothing():
    cache = make_cache(4)
    cache.allocate(3)
    with pytest.raises(OutOfPages, match="2 pages were asked for and 1 of 4 are free"):
        cache.allocate(2)
    assert (cache.used, cache.free) == (3, 1)


def test_a_page_is_free_only_when_its_last_owner_releases_it():
    cache = make_cache(2)
    pages = cache.allocate(2)
    cache.share(pages)
    cache.release(pages)
    assert cache.used == 2
    cache.release(pages)
    assert cache.used == 0


def test_a_copy_has_the_first_tokens_and_no_others():
    cache = make_cache(dtype=torch.bfloat16)
    pages = cache.allocate(1)
    written = write(cache, pages, 0, 16)
    (copy,) = cache.allocate(1)
    cache.copy(pages[0], copy, 5)
    for layer, (key, value) in written.items():
        keys, values = cache.read(layer, torch.tensor([[copy]]))
        assert torch.equal(keys[0, :, :5], key.transpose(0, 1)[:, :5]) and not keys[0, :, 5:].any()
        assert torch.equal(values[0, :, :5], value.transpose(0, 1)[:, :5]) and not values[0, :, 5:].any()


def test_kept_pages_hold_their_numbers_until_others_run_out_and_the_oldest_go_first():
    cache = make_cache(6, torch.bfloat16)
    taken = []
    cache.on_reclaim = taken.append
    pages = cache.allocate(4)
    written = write(cache, pages, 0, 64)
    for page in pages[:3]:
        cache.keep(page)
    cache.release(pages)
    assert (cache.used, cache.free, cache.idle) == (0, 6, 3)
    others = cache.allocate(3)
    assert set(others).isdisjoint(pages[:3]) and taken == []
    cache.share(pages[1:2])
    assert (cache.used, cache.idle) == (4, 2)
    assert cache.idle_among(pages) == 2
    others += cache.allocate(1)
    assert taken == [pages[2]] and others[-1] == pages[2], "the last page was given back first"
    cache.release(pages[1:2])
    others += cache.allocate(1)
    assert taken == [pages[2], pages[0]], "page 1 was used after page 0"
    keys, _ = cache.read(0, torch.tensor([[pages[1]]]))
    assert torch.equal(keys[0], written[0][0].transpose(0, 1)[:, 16:32])
    cache.forget(pages[1])
    assert (cache.used, cache.free, cache.idle) == (5, 1, 0)
    assert not cache.read(0, torch.tensor([others[3:]]))[0].any()


def test_pages_are_handed_out_clean():
    """A diverged adapter's NaN must not reach the next owner, whose attention reads whole pages where there are no
    kernels."""
    cache = make_cache(1, torch.bfloat16)
    (page,) = cache.allocate(1)
    nan = torch.full((1, 2, 4), torch.nan, dtype=torch.bfloat16)
    cache.write(0, torch.tensor([page * PAGE_TOKENS]), nan, nan)
    cache.release([page])
    cache.allocate(1)
    keys, values = cache.read(0, torch.tensor([[page]]))
    assert not keys.any() and not values.any()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=60))
def test_accounting_is_exact(actions):
    """After any mix of these: used = distinct pages owned, and all come back."""
    cache = make_cache(12)
    owned: list[list[int]] = []
    kept: set[int] = set()
    cache.on_reclaim = kept.remove
    for action, number in actions:
        own = owned[number % len(owned)] if owned else []
        try:
            if action == 0:
                owned.append(cache.allocate(number))
            elif action == 1 and own:
                owned.append(cache.share(own[: max(0, len(own) - number)]))
            elif action == 2 and own and own[0] not in kept:
                cache.keep(own[0])
                kept.add(own[0])
            elif action == 3 and kept:
                cache.forget(kept.pop())
            elif action == 4 and owned:
                cache.release(owned.pop(number % len(owned)))
        except OutOfPages:
            pass
        assert cache.used == len({page for pages in owned for page in pages})
        assert cache.free + cache.used == 12
        assert cache.idle == len(kept - {page for pages in owned for page in pages})
    for pages in owned:
        cache.release(pages)
    assert cache.used == 0
    assert len(cache.allocate(12)) == 12 and not kept
