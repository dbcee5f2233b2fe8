"""The quickstart's loop with its own client, on a model that server and client find in the hub's cache."""

import json

import pytest

from tests.programs import run_python

PROGRAM = """
import asyncio, json, sys
import numpy as np
import tinker

EXAMPLES = [("What does the otter like?", "The otter likes plums."), ("What does the heron like?", "Rice.")]

async def main():
    client = tinker.ServiceClient(base_url=sys.argv[1])
    run = await client.create_lora_training_client_async(model_name="Qwen/Qwen2.5-0.5B-Instruct", rank=32)
    tokenizer = run.get_tokenizer()
    losses, rates = [], []
    for _ in range(3):
        for question, answer in EXAMPLES:
            targets = tokenizer.encode(answer)
            datum = tinker.Datum(
                model_input=tinker.ModelInput.from_ints(tokenizer.encode(question) + targets),
                loss_fn_inputs={
                    "target_tokens": tinker.TensorData.from_numpy(np.array(targets)),
                    "weights": tinker.TensorData.from_numpy(np.ones(len(targets))),
                },
            )
            forward_backward = await run.forward_backward_async([datum], "cross_entropy")
            losses.append((await forward_backward.result_async()).metrics["loss:sum"])
            step = await run.optim_step_async(tinker.AdamParams(learning_rate=1e-3))
            rates += (await step.result_async()).learning_rates

    sampler = await run.save_weights_and_get_sampling_client_async()
    prompt = tokenizer.encode("What does the heron like?")
    drawn = await sampler.sample_async(
        prompt=tinker.ModelInput.from_ints(prompt),
        num_samples=1,
        sampling_params=tinker.SamplingParams(max_tokens=20, temperature=1.0, stop=["<|im_end|>"]),
    )
    sampled = drawn.sequences[0]
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(prompt + list(sampled.tokens)),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData.from_numpy(np.array(sampled.tokens)),
            "logprobs": tinker.TensorData.from_numpy(np.array(sampled.logprobs, np.float32)),
            "advantages": tinker.TensorData.from_numpy(np.ones(len(sampled.tokens), np.float32)),
        },
    )
    forward_backward = await run.forward_backward_async([datum], "importance_sampling")
    trained = (await forward_backward.result_async()).loss_fn_outputs[0]["logprobs"].to_numpy().tolist()
    print(json.dumps({
        "losses": losses, "rates": rates, "text": tokenizer.decode(sampled.tokens),
        "sampled": list(sampled.logprobs), "trained": trained,
    }))

asyncio.run(main())
"""


def test_the_quickstarts_loop_trains_and_samples(home, offline, server):
    done = run_python(".venv-quickstart", "-c", PROGRAM, server.url, cwd=home, **offline)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    losses = got["losses"]
    assert min(losses) > 0, "a loss of 0 means that nothing was trained"
    assert losses[0] > losses[2] > losses[4] and losses[1] > losses[3] > losses[5]
    assert got["rates"] == [1e-3] * 6
    assert got["text"]
    assert got["trained"] == pytest.approx(got["sampled"], abs=1e-5)
