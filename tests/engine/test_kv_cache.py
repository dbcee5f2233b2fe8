"""The paged cache: exact accounting, sharing, and no leak of one sequence's numbers into another's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinkercloud.engine.torch.kv_cache import PAGE_TOKENS, KVCache, LayerShape, OutOfPages, pages_for


def make_cache(num_pages: int = 8) -> KVCache:
    layers = {0: LayerShape(2, 4, 4), 3: LayerShape(1, 4, 6)}
    return KVCache(layers, num_pages, torch.float32, torch.device("cpu"))


def write(cache: KVCache, pages: list[int], start: int, count: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Random keys and values for `count` tokens from `start`; returns what was written to each layer."""
    slots = torch.tensor([pages[i // PAGE_TOKENS] * PAGE_TOKENS + i % PAGE_TOKENS for i in range(start, start + count)])
    written = {}
    for layer, shape in cache.layers.items():
        written[layer] = (
            torch.randn(count, shape.kv_heads, shape.key_dim),
            torch.randn(count, shape.kv_heads, shape.value_dim),
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


def test_a_fork_shares_full_pages_and_copies_the_partial_one():
    cache = make_cache()
    pages = cache.allocate(3)
    written = write(cache, pages, 0, 37)
    forked = cache.fork(pages, 37)
    assert forked[:2] == pages[:2] and forked[2] != pages[2]
    assert cache.used == 4
    write(cache, forked, 37, 3)
    for layer, (key, _) in written.items():
        keys, _ = cache.read(layer, torch.tensor([pages, forked]))
        assert torch.equal(keys[0, :, :37], keys[1, :, :37])
        assert torch.equal(keys[1, :, :37], key.transpose(0, 1))
        assert not keys[0, :, 37:].any() and keys[1, :, 37:40].all()


def test_a_fork_at_a_page_border_copies_nothing():
    cache = make_cache(2)
    pages = cache.allocate(2)
    assert cache.fork(pages, 32) == pages
    assert cache.used == 2


def test_a_fork_without_a_page_for_the_copy_takes_nothing():
    cache = make_cache(2)
    pages = cache.allocate(2)
    with pytest.raises(OutOfPages):
        cache.fork(pages, 20)
    cache.release(pages)
    assert cache.used == 0


def test_pages_are_handed_out_clean():
    """A diverged adapter's NaN must not reach the next owner, whose attention reads whole pages."""
    cache = make_cache(1)
    (page,) = cache.allocate(1)
    slots = torch.tensor([page * PAGE_TOKENS])
    cache.write(0, slots, torch.full((1, 2, 4), torch.nan), torch.full((1, 2, 4), torch.nan))
    cache.release([page])
    cache.allocate(1)
    keys, values = cache.read(0, torch.tensor([[page]]))
    assert not keys.any() and not values.any()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=60))
def test_accounting_is_exact(actions):
    """After any mix of allocating, forking and releasing: used = distinct pages owned, and all come back."""
    cache = make_cache(12)
    owned: list[list[int]] = []
    for action, number in actions:
        try:
            if action == 0:
                owned.append(cache.allocate(number))
            elif action == 1 and owned:
                source = owned[number % len(owned)]
                owned.append(cache.fork(source, max(0, len(source) * PAGE_TOKENS - number)))
            elif owned:
                cache.release(owned.pop(number % len(owned)))
        except OutOfPages:
            pass
        assert cache.used == len({page for pages in owned for page in pages})
        assert cache.free + cache.used == 12
    for pages in owned:
        cache.release(pages)
    assert cache.used == 0
