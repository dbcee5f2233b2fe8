"""The server may die under a training script; the script must not notice."""

import re
import shutil
import threading

import httpx
import psutil
import tinker
from tinker import types

from tests.base_weights import other_weights
from tests.e2e.test_first_steps import datum
from tests.serving import Server
from tinkercloud.nano import FOLDER

BATCH = [datum([10, 11, 12, 13, 14]), datum([30, 31, 32])]
PROMPT = types.ModelInput.from_ints([10, 11])
STEPS, INTERRUPTED = 12, (3, 9)


def train(url: str, at_step=lambda step: None) -> list[object]:
    """A pipelined training loop with a sample in the middle, and samples that one held poll waits for while something
    may happen; its losses and the sampled tokens."""
    client = tinker.ServiceClient(base_url=url, api_key="tml-test")
    run = client.create_lora_training_client(base_model="tinkercloud/nano", rank=4, seed=3).result()
    base = client.create_sampling_client(base_model="tinkercloud/nano").result()
    seen, waiting = [], []
    for step in range(STEPS):
        if step in INTERRUPTED:
            waiting += [base.sample(PROMPT, 1, params(200, seed)) for seed in range(6)]
            base.sample(PROMPT, 1, params(1, 0)).result()  # the poller is at work, and they are not done
            assert not all(sample.future().done() for sample in waiting)
        forward_backward = run.forward_backward(BATCH, "cross_entropy")
        optim = run.optim_step(types.AdamParams(learning_rate=1e-2))
        at_step(step)
        seen.append(forward_backward.result().metrics["loss:sum"])
        optim.result()
        if step == STEPS // 2:
            sampler = run.save_weights_and_get_sampling_client().result()
            seen += sampler.sample(PROMPT, 1, params(8, 7)).result().sequences[0].tokens
    seen += [sample.result().sequences[0].tokens for sample in waiting]
    client.holder.close()
    return seen


def params(max_tokens: int, seed: int) -> types.SamplingParams:
    return types.SamplingParams(max_tokens=max_tokens, seed=seed, stop=[])


def test_a_script_outlives_its_server_on_postgresql(tmp_path, server, postgresql):
    """And a start that fails in between, because the model's disk is not mounted."""
    undisturbed = train(server.url)
    folder, away = tmp_path / "model", tmp_path / "away.safetensors"
    shutil.copytree(FOLDER, folder)
    weights = folder / "model.safetensors"
    options = ("--model", f"tinkercloud/nano={folder}", "--set", f"database_url={postgresql.database()}")
    ended = []
    with Server(tmp_path / "data", *options) as disturbed:

        def fail_and_start():
            weights.rename(away)
            disturbed.start(wait=False)
            ended.append(disturbed.process.wait(timeout=60))
            away.rename(weights)
            disturbed.start()

        def interrupt(step):
            if step in INTERRUPTED:
                disturbed.stop() if step == INTERRUPTED[0] else disturbed.kill()
                start = disturbed.start if step == INTERRUPTED[0] else fail_and_start
                threading.Thread(target=start).start()

        assert train(disturbed.url, interrupt) == undisturbed
        assert ended == [2] and "Traceback" not in disturbed.log.read_text()


def test_engines_do_not_outlive_a_killed_server(tmp_path):
    with Server(tmp_path / "data") as server:
        client = tinker.ServiceClient(base_url=server.url, api_key="tml-test")
        run = client.create_lora_training_client(base_model="tinkercloud/nano", rank=4).result()
        run.forward_backward(BATCH * 200, "cross_entropy")  # it computes, and its answer will find nobody
        engines = [psutil.Process(pid) for pid in server.engine_pids()]
        server.kill()
        gone, alive = psutil.wait_procs(engines, timeout=30)
        assert gone and not alive
        client.holder.close()


def test_a_stop_ends_cleanly_and_quickly_while_clients_wait(tmp_path):
    with Server(tmp_path / "data") as server:
        client = tinker.ServiceClient(base_url=server.url, api_key="tml-test")
        run = client.create_lora_training_client(base_model="tinkercloud/nano", rank=4).result()
        run.forward_backward(BATCH * 200, "cross_entropy")
        assert server.stop() == 0
        said = server.log.read_text()
        assert "Traceback" not in said
        assert re.search(r"Stopping: (finishing 1 operation and )?saving 1 training run\.", said), said
        # The state it left starts again, also behind another model, which the run is kept from.
        step = {"json": {"model_id": run.model_id, "adam_params": {}}, "headers": {"x-api-key": "tml-test"}}
        server.options = ("--model", f"tinkercloud/nano={other_weights(tmp_path / 'other')}")
        server.start()
        refused = httpx.post(f"{server.url}/api/v1/optim_step", **step)
        assert refused.status_code == 400 and "now stands for other weights" in refused.json()["detail"]
        assert server.stop() == 0
        assert "1 training run cannot go on" in server.log.read_text()
        client.holder.close()
