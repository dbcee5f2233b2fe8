"""A few of the faults that `make chaos` tries all of."""

from tests.chaos.faults import Bench, Fault
from tests.serving import Server

FAULTS = (
    Fault("engine", "rename", 1, kills=True),
    Fault("engine", "write", 2, kills=False),
    Fault("server", "pwrite64", 3, kills=False),
)


def test_a_fault_in_the_middle_of_a_write_does_not_show(tmp_path):
    with Server(tmp_path / "data") as server:
        bench = Bench(server)
        assert [fault for fault in FAULTS if not bench.hit(fault)] == [], "it came to all of them"
        bench.verify()
