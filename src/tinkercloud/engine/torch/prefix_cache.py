"""Keys and values of prompts, kept when their sequences have ended, for sequences whose prompts begin alike.

A tree for each set of weights (a `Namespace`): a node is one page, its children the pages that have followed it. What
was drawn after a prompt is kept too, for the next turn of a conversation, where whole steps have a kernel: there a
token's numbers are the same bits whether it was drawn or read. Elsewhere they differ in the last bit, so that a sample
would show what was cached; there only prompts are kept, whose numbers are the same whoever computes them
(`paged_attention`), and the next turn computes the drawn tokens again, once.

Where a model has linear attention, a node may also have a copy of the state behind its page's last token, and a
sequence goes on only from such a node: one whose own turns end there too, since the last bit of a scan depends on where
it was cut (`batching`).

A sequence that runs owns its pages, kept ones too, from the first to the last. So a page without an owner has none
below it that has one, and since a sequence gives back its last pages first, the cache, which takes back what has been
without an owner for longest, takes leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tinkercloud.engine.torch.kv_cache import PAGE_TOKENS, KVCache
from tinkercloud.engine.torch.state_cache import StateCache

TOKEN_BYTES = 4
"""Of an int32 id, in a page's key."""


class Node:
    """One kept page and what has followed it."""

    __slots__ = ("children", "key", "page", "parent", "state")

    def __init__(self, key: bytes, page: int, parent: Node) -> None:
        self.key, self.page, self.parent = key, page, parent
        self.state: int | None = None
        """Slot of a copy of the state behind the page."""
        self.children: dict[bytes, Node] = {}


class Namespace:
    """The kept pages of one set of weights, which never change. Where weights change, a new one takes its place."""

    __slots__ = ("children", "open")

    def __init__(self) -> None:
        self.children: dict[bytes, Node] = {}
        self.open = True
        """Whether pages may still be kept."""


class Prefix(NamedTuple):
    """What is kept of a sequence's beginning."""

    node: Node | Namespace
    """Of its last whole page."""
    pages: Sequence[int]
    """Whole pages, to be shared."""
    partial: int | None
    """A page whose first tokens are the next ones, to be copied from."""
    tokens: int
    """Kept altogether."""


def page_keys(tokens: np.ndarray) -> list[bytes]:
    """A prompt's ids, int32 [N], page by page; the last page may be a partial one."""
    data = np.ascontiguousarray(tokens, dtype=np.int32).tobytes()
    size = PAGE_TOKENS * TOKEN_BYTES
    return [data[start : start + size] for start in range(0, len(data), size)]


class PrefixCache:
    """The nodes of all namespaces. Their pages are the cache's, which takes them back when it needs them."""

    def __init__(self, cache: KVCache, states: StateCache | None = None) -> None:
        """`states`: of models with linear attention."""
        self._cache, self._states = cache, states
        self._with_state: dict[int, Node] = {}
        """Of each copy's slot."""
        self._nodes: dict[int, list[Node]] = {}
        """Of each page. The last one of a prompt may have two: as what it was when the prompt was read, and as a whole
        page after tokens were drawn."""
        cache.on_reclaim = self._remove
        if states is not None:
            states.on_reclaim = self._lose_state

    def find(self, namespace: Namespace, keys: Sequence[bytes], tokens: int) -> Prefix:
        """The longest kept beginning, of at most `tokens` tokens, of a prompt with these keys."""
        node: Node | Namespace = namespace
        pages: list[int] = []
        whole, rest = divmod(tokens, PAGE_TOKENS)
        for key in keys[:whole]:
            child = node.children.get(key)
            if child is None:
                return Prefix(node, pages, None, len(pages) * PAGE_TOKENS)
            node = child
            pages.append(child.page)
        last = node.children.get(keys[whole]) if rest else None
        return Prefix(node, pages, last and last.page, whole * PAGE_TOKENS + (rest if last else 0))

    def find_state(self, namespace: Namespace, keys: Sequence[bytes], tokens: int) -> Prefix:
        """The longest kept beginning, of at most `tokens` tokens, behind which the state is kept too."""
        node: Node | Namespace = namespace
        found: Node | Namespace = namespace
        pages: list[int] = []
        whole = 0
        for key in keys[: tokens // PAGE_TOKENS]:
            child = node.children.get(key)
            if child is None:
                break
            node = child
            pages.append(child.page)
            if child.state is not None:
                found, whole = child, len(pages)
        return Prefix(found, pages[:whole], None, whole * PAGE_TOKENS)

    def keep_state(self, node: Node, slot: int) -> None:
        """Copy a sequence's state, which has taken in all up to the end of this node's page and no more."""
        if self._states is None or node.state is not None:
            return
        node.state = self._states.keep(slot)
        if node.state is not None:
            self._with_state[node.state] = node

    def keep(self, node: Node | Namespace, keys: Sequence[bytes], pages: list[int]) -> Node | Namespace:
        """Keep a sequence's further pages below `node`, as far as they have keys; the node of the last whole one.

        Where another sequence's page is kept already, the sequence gets that one in place of its own.
        """
        for place, key in enumerate(keys):
            child = node.children.get(key)
            partial = len(key) < PAGE_TOKENS * TOKEN_BYTES
            if child is None:
                child = node.children[key] = Node(key, pages[place], node)
                self._nodes.setdefault(child.page, []).append(child)
                self._cache.keep(child.page)
            elif child.page != pages[place] and not partial:
                self._cache.share([child.page])
                self._cache.release([pages[place]])
                pages[place] = child.page
            if not partial:
                node = child
        return node

    def drop(self, namespace: Namespace) -> None:
        """Keep nothing of these weights any more; running sequences go on with the pages that they own."""
        namespace.open = False
        nodes = list(_below(namespace))
        for node in nodes:
            self._forget_state(node)
        for page in {node.page for node in nodes}:
            del self._nodes[page]
            self._cache.forget(page)
        namespace.children = {}

    def _remove(self, page: int) -> None:
        for node in self._nodes.pop(page):
            self._forget_state(node)
            del node.parent.children[node.key]

    def _forget_state(self, node: Node) -> None:
        if self._states is not None and node.state is not None:
            self._states.forget(node.state)
            self._lose_state(node.state)

    def _lose_state(self, slot: int) -> None:
        self._with_state.pop(slot).state = None


def _below(top: Node | Namespace) -> Iterator[Node]:
    waiting: list[Node] = list(top.children.values())
    while waiting:
        node = waiting.pop()
        waiting += node.children.values()
        yield node
