"""The bench's own arithmetic and its programs beside the server. What it measures is never asserted."""

import io
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest
import torch
from bench import device, report
from bench.by_hand import ByHand
from bench.competitor import Competitor
from bench.data import BATCHES, token_rows
from bench.engine_alone import EngineAlone
from bench.measurement import Measurement
from bench.measurements import ALL
from bench.measurements.many_samples import Round, Rounds
from bench.memory import PeakMemory, tree_bytes
from bench.model import CONTEXT, MIDDLE, SMALL, make_model
from bench.profile import Profile, read_stacks
from bench.readings import Goal, Readings, interleaved, spread
from bench.stage import waits
from rich.console import Console

from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.engine.torch.model import BaseModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(SMALL, tmp_path_factory.mktemp("bench") / "model")


@pytest.mark.parametrize(
    ("shape", "hidden", "layers", "vocabulary", "parameters"),
    [(SMALL, 256, 4, 4096, 4.2e6), (MIDDLE, 512, 8, 8192, 29.4e6)],
)
def test_the_models_are_the_ones_that_the_figures_name(tmp_path, shape, hidden, layers, vocabulary, parameters):
    folder = make_model(shape, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (hidden, layers, vocabulary)
    assert config["max_position_embeddings"] == CONTEXT
    assert (folder / "model.safetensors").stat().st_size / 4 == pytest.approx(parameters, rel=0.02), "float32"
    model = BaseModel.load(EngineOptions(name="bench", source=str(folder), device="cpu"))
    assert [(linear.in_features, linear.out_features) for linear in model.linears[-1:]] == shape.linears[-1:]
    assert sorted((linear.in_features, linear.out_features) for linear in model.linears) == sorted(shape.linears)


def test_both_sides_get_the_same_tokens():
    rows = token_rows(3, 7)
    assert rows.shape == (3, 7) and (rows == token_rows(3, 7)).all()
    assert rows.min() >= 0 and rows.max() < SMALL.vocabulary
    assert all(example.tokens.min() > 0 and example.tokens.max() < SMALL.vocabulary for example in batch("ragged"))


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
    lucky_once, steady, slow = iter([2.0, 2.0, 9.0, 9.0]), iter([3.0, 3.0, 2.5, 4.0]), iter([4.0, 3.5])
    theirs = [lambda: next(lucky_once), lambda: next(steady), lambda: next(slow)]
    readings = interleaved(lambda: 1.0, theirs, repeat=3, warm_up=1)
    assert readings.theirs == (3.0, 2.5, 4.0) and readings.variant == 1
    assert next(slow, None) is None, "what is far behind is not tried after the second round"


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
        ("fewer_bytes", 0.5, True),
        ("fewer_bytes", 0.4, False),
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
    rows = [(fast, Readings((0.5, 0.5), (1.0, 1.0), note="61 % of peak")), (big, Readings((2e6,)))]

    output = io.StringIO()
    Console(width=140, file=output).print(report.table_of(rows))
    lines = output.getvalue().splitlines()
    (line,) = [line for line in lines if "a fast thing" in line]
    assert (
        "500.0 ms" in line
        and "1.0 s" in line
        and "2.00" in line
        and "≥ 1 x" in line
        and "✓" in line
        and "61 % of peak" in line
    )
    (line,) = [line for line in lines if "a big thing" in line]
    assert "2 MB" in line and "≤ 1 MB" in line and "✗" in line

    results = json.loads(report.to_json(rows, {"step": {"threads": 1}}))
    assert results["measurements"]["fast"]["value"] == 2.0 and results["measurements"]["fast"]["met"]
    assert not results["measurements"]["big"]["met"]
    assert results["competitor"] == {"step": {"threads": 1}}


def test_one_device_is_measured_without_a_server(tmp_path, capsys):
    """What a GPU will be measured with, on the CPU."""
    sizes = dict(sequences=2, tokens=8, samples=2, new_tokens=3, token_budget=64)
    tenants, file = [1, 2], tmp_path / "device.json"
    device.main("cpu", "float32", "4m", tenants, **sizes, peak_tflops=0.5, repeat=2, output=file)
    results = json.loads(file.read_text())
    one, two, sampling = results["readings"]
    assert [reading["what"].endswith(own) for reading, own in ((one, "1 tenant"), (two, "2 tenants"))] == [True] * 2
    # 16 tokens, 3.1 million weights and the unembedding's one million: 4 FLOP each, and the adapter's of rank 16.
    flop = SMALL.product_flop(16, 16)
    assert 16 * 4 * 4.1e6 < flop < 16 * 4 * 6e6
    for reading in (one, two):
        assert reading["tokens_per_second"] == pytest.approx(16 / reading["seconds"])
        assert reading["mfu"] == pytest.approx(flop / reading["seconds"] / 0.5e12)
    assert sampling["tokens_per_second"] == pytest.approx(6 / sampling["seconds"])
    assert results["settings"]["peak_is"] == "given" and "MFU" in capsys.readouterr().out


def test_measurements_have_distinct_names():
    assert len({measurement.name for measurement in ALL}) == len(ALL)


@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`", "ignore:.*is_gradient_checkpointing")
def test_the_engine_and_the_hand_train_as_much(folder):
    """The comparison is fair only if both train all linear layers, the unembedding included."""
    hand, engine = ByHand(str(folder)), EngineAlone(str(folder))
    adapter = engine._trainer._adapters["run"]
    assert sum(parameter.numel() for parameter in hand._parameters) == adapter.parameters.numel()

    hand.forward_backward("uniform", rows=2, tokens=8)
    gradients = {name: parameter.grad for name, parameter in hand._model.named_parameters() if parameter.requires_grad}
    assert all(gradient.any() for name, gradient in gradients.items() if "lora_B" in name)
    before = adapter.parameters.clone()
    engine.step(rows=2, tokens=8)
    engine.generate(rows=4, tokens=4, new_tokens=3, adapters=2)
    assert (adapter.parameters != before).any()


SHAPES = {
    "uniform": {"rows": 2, "tokens": 8},
    "ragged": {"rows": 4, "shortest": 2, "longest": 16},
    "soft": {"rows": 2, "tokens": 8, "choices": 3},
}


def batch(kind):
    return BATCHES[kind](**SHAPES[kind])


def test_ragged_batches_have_the_lengths_that_they_name():
    assert sorted(len(example.tokens) for example in batch("ragged")) == [2, 7, 11, 16]


@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`", "ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("uniform", {}),
        ("uniform", {"groups": 2}),
        ("ragged", {}),
        ("ragged", {"groups": 4}),
        ("soft", {}),
        ("soft", {"form": "log_softmax", "groups": 2}),
    ],
)
def test_the_engine_and_the_hand_compute_the_same_gradients(folder, kind, variant):
    """From the same weights. A fresh B is zero, and so is A's gradient: B's says it all."""
    hand, engine = ByHand(str(folder)), EngineAlone(str(folder))
    adapter = engine._trainer._adapters["run"]
    for (a, b), module in zip(
        filter(None, adapter.layout.views(adapter.parameters)), _in_engine_order(hand, adapter), strict=True
    ):
        module.lora_A["default"].weight.data.copy_(a)
        module.lora_B["default"].weight.data.copy_(b)
    hand.forward_backward(kind, **SHAPES[kind], **variant)
    engine.forward_backward(kind, **SHAPES[kind])
    for (_, d_b), module in zip(
        filter(None, adapter.layout.views(adapter.gradient)), _in_engine_order(hand, adapter), strict=True
    ):
        torch.testing.assert_close(module.lora_B["default"].weight.grad, d_b, atol=1e-4, rtol=1e-4)


def _in_engine_order(hand, adapter):
    modules = dict(hand._model.base_model.model.named_modules())
    return [modules[name] for name in adapter.layout.names]


def test_many_tenants_are_trained_on_both_sides(folder):
    hand, engine = ByHand(str(folder)), EngineAlone(str(folder))
    for side in (hand, engine):
        side.tenants(count=3, rows=1, tokens=4)
    assert len({id(engine._trainer._adapters[f"tenant-{n}"]) for n in range(3)}) == 3
    assert all(engine._trainer._adapters[f"tenant-{n}"].gradient.any() for n in range(3))
    gradients = {name: p.grad for name, p in hand._model.named_parameters() if "lora_B.tenant-2" in name}
    assert len(gradients) == 29 and all(gradient.any() for gradient in gradients.values())


def test_shares_add_up(folder):
    shares = EngineAlone(str(folder)).shares("forward_backward", {"kind": "uniform", "rows": 2, "tokens": 16})
    assert shares.keys() | {"attention"} == {"products", "attention", "operators", "kernels and python"}, (
        "or a kernel's"
    )
    assert all(part > 0 for part in shares.values()) and sum(shares.values()) == pytest.approx(1, abs=0.05)


def test_peak_memory_sees_what_is_gone_again():
    program = "import sys; input(); x = bytearray(50_000_000); del x; print('done', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        peak = PeakMemory(process.pid)
        print(file=process.stdin, flush=True)
        process.stdout.readline()
        assert 45e6 < peak.above < 60e6
        process.stdin.close()


def test_growth_is_that_of_the_worst_round():
    rounds = [Round([], most, [], 0.0) for most in ({1: 60, 2: 15}, {1: 90, 2: 40}, {1: 95, 2: 30})]
    grown = Rounds(1, {1: 50, 2: 10}, rounds)
    assert grown.growth([1]) == 45
    assert grown.growth([1, 2]) == 70


def test_waits_are_in_the_order_of_the_requests():
    futures = [Future() for _ in range(2)]
    sent = time.perf_counter()
    threading.Timer(0.05, lambda: futures[1].set_result(None)).start()
    threading.Timer(0.10, lambda: futures[0].set_result(None)).start()
    slow, fast = waits(futures, sent)
    assert 0.05 <= fast < slow and slow >= 0.10

    futures[0] = Future()
    futures[0].set_exception(ValueError("refused"))
    with pytest.raises(ValueError, match="refused"):
        waits(futures, sent)


def test_a_competitor_finds_its_best_settings(folder):
    competitor = Competitor("bench.by_hand", folder, waits=("passive",))
    work = {"rows": 2, "tokens": 4, "new_tokens": 3}
    try:
        readings = competitor.compared(
            lambda: 1.0, "generate", work, repeat=2, settings={"cache": ["dynamic", "static"]}
        )
        assert len(readings.theirs) == 2 and min(readings.theirs) > 0
        assert competitor.chosen["generate 2 4 3"].keys() == {"wait", "threads", "cache"}
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
