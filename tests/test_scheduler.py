from hypothesis import given
from hypothesis import strategies as st

from tinkercloud.scheduler.cycle import Waiting, charge, next_cycle


def waiting(model: str, owner: str, tokens: int, at: float = 0.0) -> Waiting:
    return Waiting(model, owner, f"{model}:op", tokens, at)


queues = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 5000), st.floats(0, 100)), min_size=1, max_size=12
).map(lambda rows: [waiting(f"m{i}", owner, tokens, at) for i, (owner, tokens, at) in enumerate(rows)])


@given(queues, st.integers(1, 8000))
def test_a_cycle_makes_progress_within_its_budget(queue, budget):
    cycle = next_cycle(queue, budget, {})
    assert cycle, "something waits, so something runs"
    assert len({w.model_id for w in cycle}) == len(cycle)
    assert set(w.request_id for w in cycle) <= set(w.request_id for w in queue)
    sized = [w.num_tokens for w in cycle if w.num_tokens]
    assert sum(sized) <= budget or len(sized) == 1
    assert all(w in cycle for w in queue if w.num_tokens == 0), "steps and saves never wait for tokens"


@given(queues)
def test_everything_that_fits_runs_together(queue):
    assert {w.model_id for w in next_cycle(queue, 10**9, {})} == {w.model_id for w in queue}


def test_whoever_was_served_least_goes_first():
    queue = [waiting("m1", "greedy", 600, at=0), waiting("m2", "modest", 600, at=9)]
    assert [w.owner for w in next_cycle(queue, 1000, {"greedy": 10_000})] == ["modest"]
    assert [w.owner for w in next_cycle(queue, 1000, {"modest": 10_000})] == ["greedy"]
    assert [w.owner for w in next_cycle(queue, 1000, {})] == ["greedy"], "between equals, the one that waits longest"


def test_owners_share_by_tokens_however_many_models_they_have():
    """One owner with nine models and one with a single model: each gets about half of the tokens."""
    served: dict[str, float] = {}
    total = {"many": 0, "one": 0}
    for _ in range(200):
        queue = [waiting(f"m{i}", "many", 100, at=i) for i in range(9)] + [waiting("n", "one", 100, at=99)]
        cycle = next_cycle(queue, 200, served)
        served = charge(served, cycle, {w.owner for w in queue})
        for operation in cycle:
            total[operation.owner] += operation.num_tokens
    assert abs(total["many"] - total["one"]) <= 200


def test_being_idle_earns_no_credit():
    served = charge({}, [waiting("m", "early", 10_000)], {"early"})
    served = charge(served, [], {"early", "late"})
    assert served["late"] == min(served.values()), "a newcomer is level with the least served"
    assert served == charge(served, [], {"early", "late"})
    assert "early" not in charge(served, [], {"late"}), "who has nothing waiting is forgotten"
