"""Old and new SDKs, unmodified, get the same numbers from one server: losses, samples, resumed runs."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.programs import run_python
from tests.serving import Server

PROGRAM = str(Path(__file__).with_name("run_of_an_sdk.py"))
SDKS = {
    "0.38.0": (".venv-clients", "protobuf"),
    "0.34.0": (".venv-sdk-0.34", "protobuf"),
    "0.22.3": (".venv-sdk-0.22", "protobuf"),
    "0.22.3 sending JSON": (".venv-sdk-0.22", "json"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each SDK printed; they run side by side."""
    home = tmp_path_factory.mktemp("sdks")
    with Server(home / "data") as server, ThreadPoolExecutor(len(SDKS)) as pool:
        begun = {
            name: pool.submit(run_python, venv, PROGRAM, server.url, form, cwd=home)
            for name, (venv, form) in SDKS.items()
        }
        return {name: result(name, program.result()) for name, program in begun.items()}


def result(name, program):
    assert program.returncode == 0, f"SDK {name}: {program.stderr}"
    return json.loads(program.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SDKS)
def test_each_sdk_trains_saves_resumes_and_samples(results, name):
    got = results[name]
    assert got["version"] == name.split()[0]
    assert got["legacy_route"] == ("JSON" in name), "`/forward` is for those that send JSON, and only for them"
    assert got["served"] == ["tinkercloud/nano"] and got["base_model"] == "tinkercloud/nano" and got["in_runs"]
    assert got["rank"] == 8
    assert got["checkpoints"] == [["sampler", "sampler_weights/for-sampling"], ["training", "weights/middle"]]

    losses = got["losses"] + got["continued"]
    assert losses[0] == pytest.approx(-sum(map(sum, got["forward"]["before"])), rel=1e-6)
    assert losses[-1] < losses[0] / 2
    assert got["continued"][0] == pytest.approx(-sum(map(sum, got["forward"]["after"])), rel=1e-6)
    with_optimizer, without_optimizer = got["resumed"].values()
    assert with_optimizer == got["continued"]
    assert without_optimizer[0] == got["continued"][0] and without_optimizer[1] != got["continued"][1]

    named, ephemeral = got["samples"]["named"], got["samples"]["ephemeral"]
    assert named == ephemeral, "the same weights and the same seed"
    assert [len(tokens) for tokens in named["tokens"]] == [6, 6] and named["tokens"][0] != named["tokens"][1]
    assert named["stop_reasons"] == ["length", "length"]
    assert named["prompt"][0] is None
    assert named["prompt"][1:] == pytest.approx(got["forward"]["after"][0], abs=1e-5)


@pytest.mark.parametrize("name", [name for name in SDKS if name != "0.38.0"])
def test_every_sdk_gets_the_same_numbers(results, name):
    """To the bit: the wire forms lose nothing, and the server is deterministic."""
    how = {"version": "", "legacy_route": ""}
    assert results[name] | how == results["0.38.0"] | how
