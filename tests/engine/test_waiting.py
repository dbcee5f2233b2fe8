"""The order of what waits, judged by a plain list for each tenant."""

from __future__ import annotations

import random
from collections import Counter

from tinkercloud.engine.torch.waiting import WaitingSequences


class Asked:
    """What a queue knows of a request, and how often it looks at which request a sequence is of."""

    looks = 0

    def __init__(self, tenant: str, count: int) -> None:
        self.tenant = tenant
        self.sequences = [Waiting(self) for _ in range(count)]


class Waiting:
    def __init__(self, request: Asked) -> None:
        self._request, self.tenant = request, request.tenant

    @property
    def request(self) -> Asked:
        Asked.looks += 1
        return self._request

    def __eq__(self, other: object) -> bool:
        Asked.looks += 1
        return self is other

    __hash__ = object.__hash__


def test_who_comes_and_goes_leaves_the_others_in_order():
    dice = random.Random(0)
    waiting, lists, requests, ran = WaitingSequences(), {"a": [], "b": []}, [], []
    for _ in range(600):
        does = dice.choice(["add", "add", "start", "start", "put back", "discard"])
        if does == "add":
            requests.append(Asked(dice.choice("ab"), dice.randrange(1, 4)))
            waiting.add(requests[-1], ran)
            lists[requests[-1].tenant] += requests[-1].sequences
        elif does == "start" and waiting:
            one = dice.choice([sequence for sequences in lists.values() for sequence in sequences[:3]])
            waiting.take(one)
            lists[one.tenant].remove(one)
            ran.append(one)
        elif does == "put back" and ran:
            one = ran.pop(dice.randrange(len(ran)))
            waiting.put_back(one)
            lists[one.tenant].insert(0, one)
        elif does == "discard" and requests:
            gone = requests.pop(dice.randrange(len(requests)))
            waiting.discard(gone)
            ran = [sequence for sequence in ran if sequence not in gone.sequences]
            lists[gone.tenant] = [one for one in lists[gone.tenant] if one not in gone.sequences]
        in_turn = list(waiting.in_turn(Counter()))
        assert {tenant: [one for one in in_turn if one.tenant == tenant] for tenant in lists} == lists
        assert waiting.lengths == {tenant: len(ones) for tenant, ones in lists.items() if ones}


def test_cancelling_many_looks_at_none_of_the_others():
    waiting, requests = WaitingSequences(), [Asked("a", 1) for _ in range(500)]
    for request in requests:
        waiting.add(request, ())
    Asked.looks = 0
    for request in requests:
        waiting.discard(request)
    assert not waiting
    assert Asked.looks <= 10 * len(requests)
