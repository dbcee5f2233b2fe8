"""The bench's own arithmetic and its programs beside the server. What it measures is never asserted."""

import io
import json

import pytest
from bench import report
from bench.by_hand import ByHand
from bench.competitor import Competitor
from bench.engine_alone import EngineAlone
from bench.measurement import Measurement
from bench.measurements import ALL
from bench.memory import tree_bytes
from bench.model import CONTEXT, VOCABULARY, make_model, token_rows
from bench.profile import Profile, read_stacks
from bench.readings import Goal, Readings, interleaved, spread
from rich.console import Console


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("bench") / "model")


def test_the_model_is_the_one_that_the_figures_name(folder):
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (256, 4, VOCABULARY)
    assert config["max_position_embeddings"] == CONTEXT
    size = (folder / "model.safetensors").stat().st_size
    assert 4.0e6 < size / 4 < 4.5e6, "float32 parameters"


def test_both_sides_get_the_same_tokens():
    rows = token_rows(3, 7)
    assert rows.shape == (3, 7) and (rows == token_rows(3, 7)).all()
    assert rows.min() >= 0 and rows.max() < VOCABULARY


def test_rounds_alternate_and_drop_the_warm_up():
    calls = []
    clock = iter(range(1, 100))

    def side(name):
        return lambda: calls.append(name) or float(next(clock))

    readings = interleaved(side("ours"), [side("theirs")], repeat=3, warm_up=1)
    assert calls == ["ours", "theirs", "theirs", "ours"] * 2
    assert readings == Readings(ours=(4.0, 5.0, 8.0), theirs=(3.0, 6.0, 7.0))
    assert readings.ratios == (3 / 4, 6 / 5, 7 / 8)


def test_the_competitor_is_its_fastest_variant_over_all_rounds():
    lucky_once, steady = iter([1.0, 1.0, 9.0, 9.0]), iter([3.0, 3.0, 2.0, 4.0])
    readings = interleaved(lambda: 1.0, [lambda: next(lucky_once), lambda: next(steady)], repeat=3, warm_up=1)
    assert readings.theirs == (3.0, 2.0, 4.0) and readings.variant == 1


def test_spread_is_the_distance_of_the_quartiles_by_the_median():
    assert spread((1.0, 2.0, 3.0, 4.0, 5.0)) == pytest.approx(2 / 3)
    assert spread((3.0,)) == 0


@pytest.mark.parametrize(
    ("quantity", "limit", "met"),
    [
        ("speed", 2.0, True),
        ("speed", 2.1, False),
        ("slowdown", 0.5, True),
        ("slowdown", 0.4, False),
        ("seconds", 1.0, True),
        ("seconds", 0.9, False),
        ("bytes", 1.0, True),
        ("bytes", 0.5, False),
    ],
)
def test_a_goal_judges_the_median(quantity, limit, met):
    readings = Readings(ours=(0.1, 1.0, 50.0), theirs=(0.2, 2.0, 100.0))
    assert Goal(quantity, limit).met(readings) is met


def test_the_table_and_the_json_say_the_same():
    fast = Measurement("fast", "a fast thing", "PEFT", Goal("speed", 1.0), lambda stage, repeat: Readings((1.0,)))
    big = Measurement("big", "a big thing", "", Goal("bytes", 1e6), lambda stage, repeat: Readings((1.0,)))
    rows = [(fast, Readings((0.5, 0.5), (1.0, 1.0))), (big, Readings((2e6,)))]

    output = io.StringIO()
    Console(width=140, file=output).print(report.table_of(rows))
    lines = output.getvalue().splitlines()
    (line,) = [line for line in lines if "a fast thing" in line]
    assert "500.0 ms" in line and "1.0 s" in line and "2.00" in line and "≥ 1 x" in line and "✓" in line
    (line,) = [line for line in lines if "a big thing" in line]
    assert "2 MB" in line and "≤ 1 MB" in line and "✗" in line

    results = json.loads(report.to_json(rows, {"step": {"threads": 1}}))
    assert results["measurements"]["fast"]["value"] == 2.0 and results["measurements"]["fast"]["met"]
    assert not results["measurements"]["big"]["met"]
    assert results["competitor"] == {"step": {"threads": 1}}


def test_measurements_have_distinct_names():
    assert len({measurement.name for measurement in ALL}) == len(ALL)


@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`", "ignore:.*is_gradient_checkpointing")
def test_the_engine_and_the_hand_train_as_much(folder):
    """The comparison is fair only if both train all linear layers, the unembedding included."""
    hand, engine = ByHand(str(folder)), EngineAlone(str(folder))
    adapter = engine._trainer._adapters["run"]
    assert sum(parameter.numel() for parameter in hand._parameters) == adapter.parameters.numel()

    hand.forward_backward(rows=2, tokens=8)
    gradients = {name: parameter.grad for name, parameter in hand._model.named_parameters() if parameter.requires_grad}
    assert all(gradient.any() for name, gradient in gradients.items() if "lora_B" in name)
    before = adapter.parameters.clone()
    engine.step(rows=2, tokens=8)
    engine.generate(rows=2, tokens=4, new_tokens=3)
    assert (adapter.parameters != before).any()


def test_a_competitor_finds_its_best_settings(folder):
    competitor = Competitor("bench.by_hand", folder, waits=("passive",))
    work = {"rows": 2, "tokens": 4, "new_tokens": 3}
    try:
        readings = competitor.compared(
            lambda: 1.0, "generate", work, repeat=2, settings={"cache": ["dynamic", "static"]}
        )
        assert len(readings.theirs) == 2 and min(readings.theirs) > 0
        assert competitor.chosen["generate"].keys() == {"wait", "threads", "cache"}
        assert tree_bytes(competitor._processes["passive"].pid) > 50e6
    finally:
        competitor.close()
    assert [process.returncode for process in competitor._processes.values()] == [0]


def test_a_profile_adds_up_stacks(tmp_path):
    a, b, c = "a (/x/tinkercloud/a.py:1)", "b (/x/tinkercloud/b.py:2)", "c (/y/c.py:3)"
    file = tmp_path / "some.stacks"
    file.write_text(f"{a};{b} 30\n{a};{c} 20\n")
    profile = Profile("control", read_stacks(file))
    seconds = dict(profile.inclusive("/tinkercloud/"))
    assert seconds.keys() == {a, b}
    assert seconds[a] == profile.busy_seconds > seconds[b]
