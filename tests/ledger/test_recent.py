"""What the ledger keeps in memory stays within its budget, and nothing else depends on what that is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ledger.conftest import OpenLedger
from tinkercloud.ledger import recent

ROOM = 10
STEPS = st.tuples(st.sampled_from(["put", "get", "drop"]), st.integers(0, 5), st.integers(0, ROOM + 2))


@given(st.lists(STEPS, max_size=60))
def test_what_was_used_least_recently_goes_when_there_is_no_room(steps: list[tuple[str, int, int]]) -> None:
    kept: recent.LRU[int] = recent.LRU(ROOM)
    expected: dict[int, int] = {}  # in the order of their use
    for what, key, size in steps:
        if what == "get":
            assert kept.get(key) == expected.get(key)
            if key in expected:
                expected[key] = expected.pop(key)
            continue
        expected.pop(key, None)
        if what == "drop":
            kept.drop(key)
        else:
            kept.put(key, size, size)
            if size <= ROOM:
                expected[key] = size
            while sum(expected.values()) > ROOM:
                del expected[next(iter(expected))]
        assert kept.size == sum(expected.values())


@pytest.mark.anyio
async def test_memory_is_bounded_and_what_has_left_it_is_read_from_disk(open_ledger: OpenLedger, monkeypatch) -> None:
    for name, value in {"ENTRIES": 4, "BLOB_BYTES": 500, "CLIENTS": 2, "ENDS": 3}.items():
        monkeypatch.setattr(recent, name, value)
    ledger = await open_ledger()
    for seq_id in range(20):
        for stream in "abc":
            entry = await ledger.append(stream, seq_id, "sample", b"payload %d" % seq_id * 9)
            await ledger.complete(entry.request_id, b"outcome %d" % seq_id * 9)
    known = ledger._recent
    assert (known.entries.size, known._ends.size) == (4, 2) and known.blobs.size <= 500
    for stream in "abc":
        for seq_id in range(20):
            assert (await ledger.entry(f"{stream}:{seq_id}")).seq_id == seq_id
            assert await ledger.outcome(f"{stream}:{seq_id}") == b"outcome %d" % seq_id * 9
    await ledger.close()
