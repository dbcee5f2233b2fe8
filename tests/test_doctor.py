"""What `tinkercloud doctor` finds, and how it says to mend it."""

import inspect
import json
import os
import re
import shutil
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import HTTPServer
from pathlib import Path

import pytest

from tests.command_line import OtherServer, in_process, run
from tinkercloud.cli import doctor, serve
from tinkercloud.nano import FOLDER


def test_doctor_finds_a_sound_machine_sound(tmp_path):
    done = run("doctor", "--port", "0", "--device", "cpu", "--data-dir", str(tmp_path / "not" / "yet"))
    assert done.returncode == 0, done.stdout
    assert "✗" not in done.stdout
    assert "model tinkercloud/nano" in done.stdout
    assert not (tmp_path / "not").exists(), "doctor only looks"


def test_doctor_says_how_to_mend_what_is_broken(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        models = ("--model", f"mine={tmp_path}", "--model", "nobody/nothing")
        data_dir = ("--data-dir", "/proc/tinkercloud")
        done = run("doctor", "--port", port, *models, *data_dir, TINKERCLOUD_PROT="1", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    broken = {line.split(" ", 1)[1]: lines[number + 1] for number, line in enumerate(lines) if line.startswith("✗")}
    assert all(mend.startswith("  → ") for mend in broken.values())
    for start in ("TINKERCLOUD_PROT", "port 127.0.0.1", "data folder", "model mine", "model nobody/nothing"):
        assert any(name.startswith(start) for name in broken), (start, done.stdout)


def test_doctor_says_of_a_host_that_is_not_here_that_it_is_the_host(tmp_path):
    done = in_process("doctor", "--host", "192.0.2.1", "--data-dir", str(tmp_path))
    (mend,) = re.findall(r"✗ port .*\n  → (.*)", done.stdout)
    assert mend == "give another --host, an address of this machine"


def test_doctor_says_what_a_server_that_others_can_reach_lacks(tmp_path):
    options = ("--host", "0.0.0.0", "--port", "0", "--data-dir", str(tmp_path))
    done = in_process("doctor", *options, "--set", f"tls_cert={tmp_path}/a", "--set", f"tls_key={tmp_path}/b")
    assert re.search(r"✗ keys 0\.0\.0\.0 can be reached .*\n  → make one first", done.stdout)
    assert re.search(r"✗ certificate .* are no certificate and its key that can be read", done.stdout)
    in_process("keys", "create", "alice", "--data-dir", str(tmp_path))
    assert "keys" not in in_process("doctor", *options).stdout


def test_doctor_goes_on_after_models_that_are_wrong(tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    cut = shutil.copytree(FOLDER, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 100_000)
    wrong = ("--model", "a=/no/such/folder", "--model", "nobody/x/y/z", "--model", "b,max_rank=0")
    folders = ("--model", f"half={tmp_path / 'half'}", "--model", f"cut={cut}")
    done = run("doctor", "--port", "0", *wrong, *folders, TINKERCLOUD_PROT="1")
    assert done.returncode == 1
    broken = [line for line in done.stdout.splitlines() if line.startswith("✗")]
    for said in (
        "'/no/such/folder'",
        "'nobody/x/y/z'",
        "max_rank",
        "model half",
        "model cut model.safetensors is damaged",
        "TINKERCLOUD_PROT",
    ):
        assert any(said in line for line in broken), (said, done.stdout)
    assert "data folder" in done.stdout, "the rest is looked at as well"
    at_once = run("serve", *wrong)
    assert at_once.returncode == 2 and at_once.stderr.count("\n") == 1
    for said in ("'/no/such/folder'", "'nobody/x/y/z'", "max_rank"):
        assert said in at_once.stderr


def test_a_model_without_a_tokenizer_is_sound_but_for_that(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    line = ("doctor", "--port", "0", "--device", "cpu", "--data-dir", str(tmp_path / "data"), "--model", f"m={folder}")
    done = run(*line)
    assert done.returncode == 0, done.stdout
    (warned,) = [line for line in done.stdout.splitlines() if line.startswith("!")]
    assert warned == f"! model m {folder} has no tokenizer"
    (folder / "tokenizer.json").write_text("{}")
    done = in_process(*line)
    assert "no tokenizer" not in done.stdout and done.exit_code == 0


def test_doctor_says_that_a_model_cannot_be_served_as_the_engine_says_it(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "m")
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "vocab_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    done = in_process("doctor", "--port", "0", "--device", "cpu", "--model", f"m={folder}")
    assert done.exit_code == 1
    layer = "its layer h.0.attn.c_attn, a Conv1D, would stay without LoRA"
    assert f"✗ model m GPT2LMHeadModel is not supported: {layer}" in done.stdout


def test_doctor_goes_on_after_a_config_that_is_none(tmp_path):
    sound = json.loads((FOLDER / "config.json").read_bytes())
    configs = {
        "number": 3,
        "words": sound | {"vocab_size": "many", "max_position_embeddings": "long", "num_key_value_heads": "some"},
        "nothing": sound | {"hidden_size": 0},
        "parts": {"model_type": "gemma3", "text_config": 5},
    }
    models = []
    for name, config in configs.items():
        folder = shutil.copytree(FOLDER, tmp_path / name)
        (folder / "config.json").write_text(json.dumps(config))
        models += ["--model", f"{name}={folder}"]
    done = in_process("doctor", "--port", "0", "--device", "cpu", "--data-dir", str(tmp_path), *models)
    assert done.exit_code == 1 and "data folder" in done.stdout
    for name in configs:
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"✗ model {name} ")]
        assert "config.json" in line


def test_a_model_that_only_the_hub_could_give_is_refused_in_one_sentence_and_without_a_url(tmp_path):
    options = ("--port", "0", "--data-dir", str(tmp_path), "--model", "some/model")
    done = run("serve", *options, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 2
    why = "not in the Hugging Face cache; offline (HF_HUB_OFFLINE)"
    assert (
        f"error: some/model: it is no folder and {why}; correct the name, or with a network: hf download" in done.stderr
    )
    assert "http://" not in done.stderr
    assert (
        why in run("doctor", "--port", "0", "--model", "some/model", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)).stdout
    )


def test_doctor_takes_what_serve_takes():
    assert inspect.signature(doctor.doctor).parameters == inspect.signature(serve.serve).parameters


def model_of(folder: Path, numbers: int, names: tuple[str, ...] = ("w",), **config: int) -> str:
    """A model's folder whose weights, in bfloat16 and as many under each name, are a hole in the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    places = {name: [2 * numbers * i, 2 * numbers * (i + 1)] for i, name in enumerate(names)}
    tensors = {name: {"dtype": "BF16", "shape": [numbers], "data_offsets": place} for name, place in places.items()}
    header = json.dumps(tensors).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * numbers * len(names))
    return f"{folder.name}={folder}"


NANO_MIB = (512, 256, 64)
"""Beside the weights: the engine, the sampler's cache, the logits."""
OF_128_MIB = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 512}
"""1024 numbers of each token: with 2**15 tokens of context, 128 MiB in float32."""


@pytest.mark.parametrize(
    ("options", "config", "needed"),
    [
        ((), {}, sum(NANO_MIB) + 400),
        (("--dtype", "bfloat16"), {}, sum(NANO_MIB) + 200),
        (("--set", "kv_cache_bytes=1MiB"), {}, 512 + 64 + 1 + 400),
        (("--set", "kv_cache_bytes=1MiB"), OF_128_MIB | {"max_position_embeddings": 2**15}, 512 + 64 + 128 + 400),
        (("--set", "kv_cache_bytes=1MiB", "--max-context", "4096"), OF_128_MIB, 512 + 64 + 16 + 400),
    ],
)
def test_doctor_counts_memory_as_the_engine_takes_it(tmp_path, options, config, needed):
    model = model_of(tmp_path / "m", 100 * 2**20, **config)
    done = in_process("doctor", "--port", "0", "--device", "cpu", "--model", model, *options)
    assert f"about {needed:,} MiB needed\n" in done.stdout


@pytest.mark.parametrize(
    ("quantization", "needed"), [("none", 6 * 256), ("8bit", 4 * 256 + 2 * 64), ("4bit", 4 * 256 + 2 * 36)]
)
def test_doctor_counts_what_is_quantised(tmp_path, quantization, needed):
    """Of a model whose files have each expert by itself: the engine fuses those and does not quantise them."""
    names = ("self_attn.q_proj.weight", "mlp.shared_expert.up_proj.weight", "self_attn.q_proj.bias")
    names = tuple(f"model.layers.0.{name}" for name in (*names, "mlp.experts.0.up_proj.weight"))
    model = model_of(tmp_path / "m", 64 * 2**20, (*names, "lm_head.weight", "model.embed_tokens.weight"))
    done = in_process("doctor", "--port", "0", "--device", "cpu", "--model", f"{model},quantization={quantization}")
    assert f"about {sum(NANO_MIB) + needed:,} MiB needed\n" in done.stdout
    assert ("✓ bitsandbytes" in done.stdout) == (quantization != "none")


def test_doctor_counts_a_models_own_settings(tmp_path):
    models = [f"{model_of(tmp_path / name, 2**20)},kv_cache_bytes={size}MiB" for name, size in (("a", 1), ("b", 2))]
    done = in_process("doctor", "--port", "0", "--device", "cpu", "--model", models[0], "--model", models[1])
    assert f"about {2 * (512 + 64 + 4) + 1 + 2:,} MiB needed\n" in done.stdout


def test_doctor_asks_the_hub_how_large_a_model_is(tmp_path):
    with HTTPServer(("127.0.0.1", 0), OtherServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
        model = "some/model,quantization=8bit"  # the hub does not say how much of it is layers
        line = ("doctor", "--port", "0", "--device", "cpu", "--model")
        with ThreadPoolExecutor() as pool:
            asked, quantised = pool.submit(run, *line, "some/model", **hub), pool.submit(run, *line, model, **hub)
            offline = pool.submit(run, *line, "some/model", HF_HUB_OFFLINE="1")
        server.shutdown()
    assert f"about {sum(NANO_MIB) + 40:,} MiB needed\n" in asked.result().stdout
    for answer in (quantised, offline):
        assert "about 512 MiB needed, and what some/model takes, whose size is not known yet" in answer.result().stdout


def test_doctor_reports_settings_that_cannot_be_read():
    done = run("doctor", TINKERCLOUD_PORT="tcp://10.0.0.1:80")
    assert done.returncode == 1
    assert "✗ settings port" in done.stdout
