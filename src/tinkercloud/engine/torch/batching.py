"""Continuous batching: which sequences run in the next step, and which pages they hold. Knows no model.

Tenants share the places evenly (`waiting.py`); the requests of one wait in the order of their arrival. A tenant that
waits and has less than its share gets a place at once: of the tenant that has most, the sequence that has computed
least gives its place back. When pages run out, the newest running sequence gives its pages back. Either waits before
its tenant's others and later computes its pages again. The oldest can always go on, because the cache holds at least
one sequence of the greatest length.

A step has one token of each sequence that decodes, and PREFILL_BUDGET tokens of prompts at most, so that the time
between two tokens is bounded however many prompts wait. The prompt that was admitted first has its chunk in every step,
so that it is done after a known number of them; what it leaves of the budget goes to the tenants that were served
least, and of their prompts to those with the least left to do, so that a short prompt does not wait for long ones.

A sequence's pages are kept for others that begin alike (`prefix_cache`). One that would find much of its prompt in the
cache if it waited for one that is running lets others pass meanwhile: samples of one prompt, whether of one request or
of several, compute it once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

from tinkercloud.engine.torch.kv_cache import PAGE_TOKENS, KVCache, pages_for
from tinkercloud.engine.torch.prefix_cache import TOKEN_BYTES, Namespace, Node, Prefix, PrefixCache, page_keys
from tinkercloud.engine.torch.sequences import Request, Sequence
from tinkercloud.engine.torch.state_cache import StateCache
from tinkercloud.engine.torch.waiting import WaitingSequences

PREFILL_CHUNK = 256
"""Tokens of one sequence that are prefilled in one step, up to the next multiple of it."""

PREFILL_BUDGET = 512
"""Tokens prefilled in one step, all sequences together: bounds how long a new prompt delays running sequences. On a CPU
more is no faster, and less is slower (docs/performance.md)."""

WORTH_WAITING = 64
"""Tokens that a sequence need not compute if it waits for another one: from so many on it waits, and from half of what
it would compute otherwise."""

MOST_LEADERS = 3
"""For how many others a sequence waits, one after another, before it computes its prompt itself: what they leave may be
gone by then, or never be kept, and others may come for ever."""

Turn = tuple[Sequence, int]
"""A sequence, and how many of its tokens run in this step."""


class ContinuousBatch:
    """The waiting and the running sequences of a sampler."""

    def __init__(
        self, cache: KVCache, max_sequences: int, states: StateCache | None = None, keeps_drawn: bool = False
    ) -> None:
        """`states`: of models with linear attention, a slot for each sequence that may run. `keeps_drawn`: whether
        pages of drawn tokens are kept too."""
        self._cache, self._states = cache, states
        self._prefixes = PrefixCache(cache, states)
        self._keeps_drawn = keeps_drawn and states is None
        self.max_sequences = max_sequences
        self.only: Collection[Request] | None = None
        """The requests whose sequences may start; None is all."""
        self._waiting = WaitingSequences()
        self._running: list[Sequence] = []
        self.preemptions = 0
        """Times that a running sequence gave its pages back, since the start."""

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return sum(self._waiting.lengths.values())

    def add(self, request: Request) -> None:
        """Let a request's sequences wait for their turn."""
        self._waiting.add(request, self._running)

    def remove(self, request: Request) -> None:
        """Take all of a request's sequences out and free their pages."""
        for sequence in [member for member in self._running if member.request is request]:
            self.finish(sequence)
        self._waiting.discard(request)

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out and free its pages."""
        self._keep(sequence)
        if self._keeps_drawn:
            self._keep_drawn(sequence)
        self._running.remove(sequence)
        self._release(sequence)

    def interrupt_all(self) -> None:
        """Let every running sequence wait, in order, and be computed again: what the last step wrote to pages is not
        to be trusted."""
        running, self._running = self._running, []
        for sequence in reversed(running):
            self._release(sequence)
            if sequence.stop_reason is None:
                sequence.rewind()
                self._waiting.put_back(sequence)

    def forget(self, namespace: Namespace) -> None:
        """Keep no prompts of these weights any more; nobody new will sample from them."""
        self._prefixes.drop(namespace)

    def schedule(self) -> list[Turn]:
        """Who runs next, with pages for the tokens: each sequence that decodes, and prefill up to the budget; sorted by
        sampler."""
        for sequence in self._running:
            self._keep(sequence)
        self._grow()
        if self._waiting:
            self._admit()
        turns = [(sequence, 1) for sequence in self._running if sequence.num_tokens - sequence.cached == 1]
        behind = [sequence for sequence in self._running if sequence.num_tokens - sequence.cached > 1]
        budget = PREFILL_BUDGET
        for sequence in behind[:1] + sorted(behind[1:], key=self._urgency):
            count = self._next_cut(sequence) - sequence.cached
            if count <= budget:
                budget -= count
                turns.append((sequence, count))
        for sequence, count in turns:
            self._waiting.serve(sequence, count)
        turns.sort(key=lambda turn: turn[0].request.sampler.order)
        return turns

    def _urgency(self, sequence: Sequence) -> tuple[int, int]:
        """Of a sequence that prefills; less comes first."""
        return self._waiting.served(sequence), sequence.num_tokens - sequence.cached

    def _next_cut(self, sequence: Sequence) -> int:
        """Where a sequence's next turn ends: at a multiple of PREFILL_CHUNK or where its prompt ends; among its drawn
        tokens anywhere. With linear attention also at the prompt's last state that is copied, and among drawn tokens
        after one, as when they were drawn."""
        chunk = (sequence.cached // PREFILL_CHUNK + 1) * PREFILL_CHUNK
        if not sequence.holds_prompt:
            end = min(chunk, sequence.request.prompt_tokens)
            last = _last_state(sequence.request)
            return min(end, last) if self._states and sequence.cached < last else end
        return sequence.cached + 1 if self._states else min(chunk, sequence.num_tokens)

    def _grow(self) -> None:
        """A page for each running sequence whose next token needs one, taken from the newest if none is free."""
        for sequence in list(self._running):
            needed = pages_for(sequence.num_tokens) - len(sequence.pages)
            while needed > self._cache.free and sequence.pages:
                self._preempt(self._running[-1])
            if needed and sequence.pages:
                sequence.pages += self._cache.allocate(needed)

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._give_back(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.finish(sequence)
        self._waiting.put_back(sequence)

    def _admit(self) -> None:
        """Start waiting sequences, in turn, while there are pages and places, or a tenant that has more than its share
        of these for one that has less. Nothing passes a sequence for which there are too few pages."""
        prefilling = [sequence for sequence in self._running if not sequence.holds_prompt]
        places = Counter(sequence.tenant for sequence in self._running)
        share = max(1, self.max_sequences // len(places.keys() | self._waiting.lengths.keys()))
        for sequence in self._waiting.in_turn(places):
            is_full = len(self._running) >= self.max_sequences
            richest, most = places.most_common(1)[0] if is_full else ("", 0)
            if is_full and (self.only is not None or places[sequence.tenant] >= share or most <= share):
                break
            if (self.only is not None and sequence.request not in self.only) or self._follows(sequence, prefilling):
                continue
            if is_full:
                theirs = [other for other in self._running if other.tenant == richest]
                self._give_back(min(reversed(theirs), key=lambda other: other.cached))
                places[richest] -= 1
            if not self._start(sequence):
                break
            self._waiting.take(sequence)
            self._running.append(sequence)
            places[sequence.tenant] += 1
            if not sequence.holds_prompt:
                prefilling.append(sequence)

    def _follows(self, sequence: Sequence, prefilling: list[Sequence]) -> bool:
        """Whether it is better for a sequence to wait until one of those that prefill has come further."""
        request = sequence.request
        if not request.sampler.prefixes.open:
            return False  # nothing will be kept of what another one computes
        leader = sequence.leader
        if leader and leader.namespace is request.sampler.prefixes and leader.cached < sequence.awaited:
            return True
        sequence.leader = None
        if sequence.leaders == MOST_LEADERS:
            return False
        found: int | None = None
        for other in prefilling:
            if other.namespace is not request.sampler.prefixes:
                continue
            # Log-probabilities that keep a sequence from reusing its prompt will be there when its sibling has done it.
            most = sequence.shareable if other.request is request else sequence.reusable
            common = min(most, request.common_tokens(other.request))
            if self._states:
                common = _common_state(request, other.request, common)
            if common <= other.cached:
                continue
            if found is None:
                found = self._kept_of(sequence).tokens
            saved, missing = common - found, sequence.num_tokens - found
            if saved >= min(WORTH_WAITING, missing / 2):
                sequence.leader, sequence.awaited = other, common
                sequence.leaders += 1
                return True
        return False

    def _kept_of(self, sequence: Sequence) -> Prefix:
        """What is kept of a sequence's prompt, and need not be computed again."""
        request = sequence.request
        namespace = request.sampler.prefixes
        if self._states:
            return self._prefixes.find_state(namespace, self._state_keys(request), sequence.reusable)
        return self._prefixes.find(namespace, request.page_keys, sequence.reusable)

    def _start(self, sequence: Sequence) -> bool:
        """Give a sequence pages for all its tokens, those that are kept and new ones; False if too few are free. One
        more page for each running sequence stays free, so that what starts is not soon preempted again."""
        request, whole = sequence.request, pages_for(sequence.num_tokens)
        prefix = self._kept_of(sequence)
        missing = whole - len(prefix.pages)
        free = self._cache.free - self._cache.idle_among(prefix.pages)
        if missing + len(self._running) > free:
            return False
        sequence.pages = self._cache.share(prefix.pages)
        sequence.cached = len(prefix.pages) * PAGE_TOKENS
        if prefix.partial is not None and missing < free:
            (source,) = self._cache.share([prefix.partial])  # so that it is not what is taken for the new pages
            sequence.pages += self._cache.allocate(missing)
            self._cache.copy(source, sequence.pages[len(prefix.pages)], prefix.tokens - sequence.cached)
            self._cache.release([source])
            sequence.cached = prefix.tokens
        else:
            sequence.pages += self._cache.allocate(missing)
        if self._states:
            sequence.slot = self._states.allocate(prefix.node.state if isinstance(prefix.node, Node) else None)
        sequence.namespace = request.sampler.prefixes
        sequence.node, sequence.kept = prefix.node, len(prefix.pages)
        if request.cache_hit_tokens is None:
            request.cache_hit_tokens = sequence.cached
        return True

    def _keep(self, sequence: Sequence) -> None:
        """Keep the pages of the prompt that are complete, for others that begin alike."""
        if sequence.namespace is None or not sequence.namespace.open:
            return
        keys = sequence.request.page_keys
        first, complete = sequence.kept, len(keys) if sequence.holds_prompt else sequence.cached // PAGE_TOKENS
        if self._states:
            if not _leaves_state(sequence.request, sequence.cached):
                return
            keys, complete = self._state_keys(sequence.request), sequence.cached // PAGE_TOKENS
        if first < complete:
            own = sequence.pages[first:complete]
            sequence.node = self._prefixes.keep(sequence.node, keys[first:complete], own)
            sequence.pages[first:complete] = own
            sequence.kept = complete
        if self._states and isinstance(sequence.node, Node):
            self._prefixes.keep_state(sequence.node, sequence.slot)

    def _state_keys(self, request: Request) -> list[bytes]:
        """Keys of a prompt's pages up to its last state. Those of the turn that ends there are only for prompts whose
        last state is there too: in others the same tokens are part of a longer turn, which may show in the last bit."""
        if request.state_keys is None:
            keys, last = request.page_keys, _last_state(request)
            common = last // PREFILL_CHUNK * PREFILL_CHUNK // PAGE_TOKENS
            mark = last.to_bytes(TOKEN_BYTES, "little")
            request.state_keys = keys[:common] + [key + mark for key in keys[common : last // PAGE_TOKENS]]
        return request.state_keys

    def _keep_drawn(self, sequence: Sequence) -> None:
        """Keep the complete pages that have drawn tokens, for a prompt that begins with all of these."""
        if sequence.namespace is None or not sequence.namespace.open or not sequence.holds_prompt:
            return
        first, complete = sequence.request.prompt_tokens // PAGE_TOKENS, sequence.cached // PAGE_TOKENS
        if first < complete:
            keys = page_keys(sequence.tokens(first * PAGE_TOKENS, complete * PAGE_TOKENS))
            own = sequence.pages[first:complete]
            self._prefixes.keep(sequence.node, keys, own)
            sequence.pages[first:complete] = own

    def _release(self, sequence: Sequence) -> None:
        self._cache.release(sequence.pages)
        sequence.pages = []
        sequence.cached = 0
        sequence.namespace = sequence.node = None
        sequence.kept = 0
        if self._states:
            self._states.release(sequence.slot)


def _last_state(request: Request) -> int:
    """Tokens of a prompt behind which its last state is copied; 0 for short ones, which it would cost a turn."""
    return (request.prompt_tokens - 1) // PAGE_TOKENS * PAGE_TOKENS if request.prompt_tokens > WORTH_WAITING else 0


def _leaves_state(request: Request, end: int) -> bool:
    """Whether the state behind so many tokens of a prompt is copied for others."""
    last = _last_state(request)
    return 0 < end <= last and (end == last or end % math.lcm(PREFILL_CHUNK, PAGE_TOKENS) == 0)


def _common_state(request: Request, other: Request, common: int) -> int:
    """Tokens up to the last state that two prompts leave alike, of their `common` first tokens."""
    last, others = _last_state(request), _last_state(other)
    if last == others <= common:
        return last
    whole = math.lcm(PREFILL_CHUNK, PAGE_TOKENS)
    return min(common, last, others) // whole * whole
