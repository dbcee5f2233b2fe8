from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tinkercloud.ledger.order import GAP_TIMEOUT, ModelLog, Turn
from tinkercloud.ledger.records import Entry

KINDS = ["forward_backward", "forward", "optim_step", "save_weights", "load_weights"]
ENTRIES = st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(["accepted", "refused"])), max_size=25)


def entry(seq_id: int, kind: str = "forward_backward", state: str = "accepted") -> Entry:
    return Entry(f"m:{seq_id}", "m", seq_id, kind, state, num_tokens=1, created_at=0.0)


def drain(log: ModelLog, now: float = 0.0) -> list[Turn]:
    """All turns there are, each ended before the next is taken."""
    turns = []
    while (turn := log.take(now)) is not None:
        turns.append(turn)
        log.ended(replace(turn.entry, state="failed" if turn.failure else "done"))
    return turns


@given(ENTRIES, st.data())
def test_any_order_of_arrival_gives_the_same_turns(parts: list[tuple[str, str]], data: st.DataObject) -> None:
    entries = [entry(seq_id, kind, state) for seq_id, (kind, state) in enumerate(parts)]
    in_order = ModelLog()
    for one in entries:
        in_order.add(one, 0.0)
    expected = drain(in_order)
    log, turns = ModelLog(), []
    for one in data.draw(st.permutations(entries)):
        log.add(one, 0.0)
        if data.draw(st.booleans()):
            turns += drain(log)
        if data.draw(st.booleans()):
            has_ended = any(turn.entry == one for turn in turns)
            log.add(replace(one, repeated=True, state="done" if has_ended else one.state), 0.0)
    turns += drain(log)
    assert turns == expected
    assert [turn.entry.seq_id for turn in turns] == [one.seq_id for one in entries if one.state == "accepted"]
    assert len(log) == 0 and log.gap_deadline() is None


@given(ENTRIES, st.data())
def test_a_log_that_was_recovered_goes_on_as_the_first_would_have(parts: list, data: st.DataObject) -> None:
    entries = [entry(seq_id, kind, state) for seq_id, (kind, state) in enumerate(parts)]
    log, stored = ModelLog(), {one.seq_id: one for one in entries}
    for one in entries:
        log.add(one, 0.0)
    applied, last_step = -1, -1
    for _ in range(data.draw(st.integers(0, len(entries)))):
        turn = log.take(0.0)
        if turn is None:
            break
        ended = replace(turn.entry, state="failed" if turn.failure else "done", cleared_gradients=turn.clear_gradients)
        log.ended(ended)
        stored[ended.seq_id] = ended
        applied = ended.seq_id
        if ended.kind == "optim_step":
            last_step = applied
    behind = [one for one in stored.values() if one.seq_id > last_step or one.state == "accepted"]
    assert drain(ModelLog.recovered(applied, last_step, behind, now=0.0)) == drain(log)


def test_a_repeat_stands_in_for_a_first_that_nobody_handed_over_and_for_no_other() -> None:
    log = ModelLog()
    log.add(replace(entry(0), repeated=True), 0.0)
    running = log.take(0.0)
    assert running is not None
    log.add(replace(entry(0), repeated=True), 0.0)
    assert log.take(0.0) is None and len(log) == 0, "it runs"
    log.add(replace(entry(1, state="refused"), repeated=True), 0.0)
    log.add(entry(2), 0.0)
    log.ended(replace(entry(0), state="done"))
    log.add(replace(entry(0), state="done", repeated=True), 0.0)
    assert [turn.entry.seq_id for turn in drain(log)] == [2]


def test_a_gap_is_never_skipped() -> None:
    log = ModelLog()
    for seq_id in (0, 2, 3):
        log.add(entry(seq_id), now=10.0)
    assert [turn.entry.seq_id for turn in drain(log, now=10.0)] == [0]
    assert log.peek(now=10.0 + GAP_TIMEOUT - 1) is None
    assert log.gap_deadline() == 10.0 + GAP_TIMEOUT
    log.add(entry(1), now=11.0)
    assert [turn.entry.seq_id for turn in drain(log, now=11.0)] == [1, 2, 3]


def test_a_step_fails_if_a_part_of_its_batch_was_refused() -> None:
    log = ModelLog()
    log.add(entry(0, state="refused"), 0.0)
    for seq_id, kind in enumerate(["forward_backward", "optim_step", "forward_backward", "optim_step"], start=1):
        log.add(entry(seq_id, kind), 0.0)
    assert log.take(0.0) == Turn(entry(1))
    assert log.poisoned_by is not None and log.poisoned_by.seq_id == 0
    step = log.take(0.0)
    assert step is not None and step.clear_gradients and step.failure is not None
    assert step.failure.category == "user" and "forward_backward before it was refused (with" in step.failure.error
    assert entry(0).request_id in step.failure.error
    assert step.lacks == entry(0, state="refused") and "first of" not in step.failure.error
    assert log.poisoned_by is None
    assert [turn.failure for turn in drain(log)] == [None, None]


def test_a_step_says_how_many_parts_of_its_batch_were_refused() -> None:
    log = ModelLog()
    for seq_id in range(3):
        log.add(entry(seq_id, state="refused"), 0.0)
    for seq_id, kind in enumerate(["optim_step", "forward_backward", "optim_step"], start=3):
        log.add(entry(seq_id, kind), 0.0)
    step, *others = drain(log)
    assert step.failure is not None
    assert "forward_backward before it was refused (the first of 3, with" in step.failure.error
    assert [turn.failure for turn in others] == [None, None]


def test_a_step_fails_if_a_part_of_its_batch_failed() -> None:
    log = ModelLog()
    for seq_id, kind in enumerate(["forward_backward", "forward_backward", "optim_step"]):
        log.add(entry(seq_id, kind), 0.0)
    first, second = log.take(0.0), log.take(0.0)
    assert first is not None and second is not None
    log.ended(replace(first.entry, state="failed"))
    log.ended(replace(second.entry, state="done"))
    step = log.take(0.0)
    assert step is not None and step.clear_gradients and step.failure is not None
    assert "forward_backward before it failed (with" in step.failure.error


def test_a_refused_forward_or_step_poisons_nothing() -> None:
    log = ModelLog()
    for seq_id, kind in enumerate(["forward", "optim_step", "save_weights"]):
        log.add(entry(seq_id, kind, "refused"), 0.0)
    log.add(entry(3, "optim_step"), 0.0)
    assert drain(log) == [Turn(entry(3, "optim_step"))]


def test_loading_weights_clears_what_was_lacking() -> None:
    log = ModelLog()
    log.add(entry(0, state="refused"), 0.0)
    log.add(entry(1, "load_weights"), 0.0)
    log.add(entry(2, "optim_step"), 0.0)
    assert [turn.failure for turn in drain(log)] == [None, None]


def test_behind_a_lost_operation_everything_fails_and_names_it() -> None:
    log = ModelLog(applied_seq=4)
    kinds = {7: "forward_backward", 8: "optim_step", 10: "save_weights"}
    for seq_id, kind in kinds.items():
        log.add(entry(seq_id, kind), now=100.0)
    log.add(entry(11, "save_weights"), now=300.0)
    turns = drain(log, now=100.0 + GAP_TIMEOUT)
    assert [turn.entry.seq_id for turn in turns] == [7, 8, 10, 11]
    assert all(turn.failure is not None and "operations 5 to 6" in turn.failure.error for turn in turns)
    assert [turn.clear_gradients for turn in turns] == [False, True, False, False]
    log.add(entry(5), now=500.0)
    log.add(entry(12, "save_weights"), now=500.0)
    late, next_one = drain(log, now=500.0)
    assert late.entry.seq_id == 5 and late.failure is not None and "send it again" in late.failure.error
    assert next_one == Turn(entry(12, "save_weights"))


def test_the_step_after_a_lost_operation_fails_too() -> None:
    log = ModelLog()
    log.add(entry(1, "save_weights"), now=0.0)
    assert len(drain(log, now=GAP_TIMEOUT)) == 1
    log.add(entry(2), now=GAP_TIMEOUT)
    log.add(entry(3, "optim_step"), now=GAP_TIMEOUT)
    forward_backward, step = drain(log, now=GAP_TIMEOUT)
    assert forward_backward.failure is None and step.failure is not None and step.clear_gradients


@given(st.sets(st.integers(0, 30), max_size=15), st.data())
def test_after_the_timeout_nothing_waits(seq_ids: set[int], data: st.DataObject) -> None:
    log = ModelLog()
    for seq_id in data.draw(st.permutations(sorted(seq_ids))):
        log.add(entry(seq_id, data.draw(st.sampled_from(KINDS))), now=0.0)
    first_gap = next(n for n in range(32) if n not in seq_ids)
    turns = drain(log, now=GAP_TIMEOUT)
    assert [turn.entry.seq_id for turn in turns] == sorted(seq_ids)
    assert all(turn.failure is not None for turn in turns if turn.entry.seq_id > first_gap)
    assert all(turn.failure is None for turn in turns if turn.entry.seq_id < first_gap)
    assert len(log) == 0


@given(st.lists(st.one_of(st.integers(0, 12), st.just("take"))))
def test_what_is_lacking_is_known_at_any_time(story: list[int | str]) -> None:
    log, arrived = ModelLog(), set()
    for event in story:
        if event == "take":
            log.take(0.0)
        else:
            log.add(entry(event), 0.0)
            arrived.add(event)
        for seq_id in range(14):
            assert log.lacks_before(seq_id) == any(n not in arrived for n in range(log.next_seq, seq_id))


def test_what_is_lacking_is_not_searched_for_from_the_start_each_time() -> None:
    """A client sends thousands of chunks ahead of a busy engine, and each is refused."""

    class Counting(dict):
        lookups = 0

        def __contains__(self, key: object) -> bool:
            self.lookups += 1
            return super().__contains__(key)

    log = ModelLog()
    log._waiting = Counting()
    for seq_id in range(2000):
        assert not log.lacks_before(seq_id)
        log.add(entry(seq_id, state="refused"), 0.0)
    assert log._waiting.lookups < 10 * 2000
