"""The quickstart's programs, as they stand there but for the server's address, with plain `python`."""

import re

import pytest

from tests.programs import ROOT, run_python

COMPLETE_EXAMPLE = """
import asyncio
import numpy as np
import tinker

async def train():
    # Setup
    client = tinker.ServiceClient(base_url="http://localhost:8000")
    training_client = await client.create_lora_training_client_async(
        model_name="Qwen/Qwen2.5-0.5B-Instruct",
        rank=32
    )
    tokenizer = training_client.get_tokenizer()

    # Training data
    examples = [
        ("What is 2+2?", "The answer is 4."),
        ("What is the capital of France?", "The capital of France is Paris."),
    ]

    # Training loop
    for epoch in range(3):
        for prompt, response in examples:
            # Prepare data
            input_tokens = tokenizer.encode(prompt)
            target_tokens = tokenizer.encode(response)
            all_tokens = input_tokens + target_tokens

            datum = tinker.Datum(
                model_input=tinker.ModelInput.from_ints(all_tokens),
                loss_fn_inputs={
                    "target_tokens": tinker.TensorData.from_numpy(
                        np.array(target_tokens, dtype=np.int64)
                    ),
                    "weights": tinker.TensorData.from_numpy(
                        np.ones(len(target_tokens), dtype=np.float32)
                    ),
                }
            )

            # Forward-backward
            fwd_bwd = await training_client.forward_backward_async([datum], "cross_entropy")
            result = await fwd_bwd.result_async()
            print(f"Epoch {epoch}, Loss: {result.metrics.get('loss:sum', 0):.4f}")

            # Optimizer step
            await (await training_client.optim_step_async(
                tinker.AdamParams(learning_rate=1e-5)
            )).result_async()

    # Test generation
    sampling_client = await training_client.save_weights_and_get_sampling_client_async()
    prompt = tinker.ModelInput.from_ints(tokenizer.encode("What is 2+2?"))
    response = await sampling_client.sample_async(
        prompt, 1, tinker.SamplingParams(max_tokens=50, temperature=0.1)
    )
    print(f"\\nGenerated: {tokenizer.decode(response.sequences[0].tokens)}")

if __name__ == "__main__":
    asyncio.run(train())
"""

STEPS = """
import asyncio
import numpy as np
import tinker
import torch

async def main():
    # Steps 1 and 2
    client = tinker.ServiceClient(
        base_url="http://localhost:8000",
        api_key="slime-dev-key"  # or set TINKER_API_KEY env var
    )
    training_client = await client.create_lora_training_client_async(
        model_name="Qwen/Qwen2.5-0.5B-Instruct",
        rank=32,                    # LoRA rank
        train_mlp=True,            # Train MLP layers
        train_attn=True,           # Train attention layers
        train_unembed=True,        # Train unembedding layer
    )
    tokenizer = training_client.get_tokenizer()

    # Step 3, supervised: the targets are not the end of the input, and weights are float64
    tokens = tokenizer.encode("Hello, how are you?")
    target_tokens = tokenizer.encode("I'm doing well, thank you!")
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData.from_numpy(np.array(target_tokens)),
            "weights": tinker.TensorData.from_numpy(np.ones(len(target_tokens))),
        }
    )

    # Step 4
    fwd_bwd_future = await training_client.forward_backward_async(
        data=[datum],              # List of Datum objects
        loss_fn="cross_entropy"    # or "importance_sampling" for RL
    )
    result = await fwd_bwd_future.result_async()
    print(f"Loss: {result.metrics.get('loss:sum', 0)}")
    training_logprobs = result.loss_fn_outputs[0]["logprobs"].to_torch()
    print("supervised", len(target_tokens), len(training_logprobs), bool((training_logprobs < 0).all()))

    # Step 5
    optim_future = await training_client.optim_step_async(
        tinker.AdamParams(
            learning_rate=1e-6,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8
        )
    )
    optim_result = await optim_future.result_async()
    print(f"Learning rates: {optim_result.learning_rates}")

    # Step 6
    sampling_client = await training_client.save_weights_and_get_sampling_client_async()
    prompt = tinker.ModelInput.from_ints(tokenizer.encode("Once upon a time"))
    response = await sampling_client.sample_async(
        prompt=prompt,
        num_samples=1,
        sampling_params=tinker.SamplingParams(
            max_tokens=100,
            temperature=0.7,
            stop=["<|endoftext|>"]
        )
    )
    generated_tokens = response.sequences[0].tokens
    generated_text = tokenizer.decode(generated_tokens)
    print("generated", len(generated_tokens))

    # Step 3, reinforcement learning: the response's tokens are the last of the input
    prompt_tokens = tokenizer.encode("Once upon a time")
    response = await sampling_client.sample_async(
        prompt=prompt, num_samples=1, sampling_params=tinker.SamplingParams(max_tokens=20, temperature=1.0, stop=[])
    )
    response_tokens = list(response.sequences[0].tokens)
    full_tokens = prompt_tokens + response_tokens
    sampling_logprobs = torch.tensor(response.sequences[0].logprobs)
    advantages = torch.ones(len(response_tokens))
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(full_tokens),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData.from_torch(torch.tensor(response_tokens)),
            "logprobs": tinker.TensorData.from_torch(sampling_logprobs),
            "advantages": tinker.TensorData.from_torch(advantages),
        }
    )

    # Performance tips: both submitted before either is waited for, several data in one call
    data, loss_fn, adam_params = [datum] * 4, "importance_sampling", tinker.AdamParams(learning_rate=1e-6)
    fwd_bwd_future = await training_client.forward_backward_async(data, loss_fn)
    optim_future = await training_client.optim_step_async(adam_params)
    fwd_bwd_result = await fwd_bwd_future.result_async()
    optim_result = await optim_future.result_async()
    outputs = fwd_bwd_result.loss_fn_outputs
    off = max((output["logprobs"].to_torch() - sampling_logprobs).abs().max().item() for output in outputs)
    print("rl", len(outputs), len(response_tokens), off)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def printed(run, server):
    """Runs one of the programs against the server; what it printed."""

    def run_against_server(program: str) -> str:
        program = program.replace("http://localhost:8000", server.url)
        done = run(program, HF_ENDPOINT=f"{server.url}/hf")
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run_against_server


def test_complete_example(printed):
    text = printed(COMPLETE_EXAMPLE)
    losses = [float(loss) for loss in re.findall(r"Epoch \d, Loss: ([\d.]+)", text)]
    assert len(losses) == 6 and min(losses) > 0
    assert losses[4] < losses[2] < losses[0] and losses[5] < losses[3] < losses[1]
    assert "Generated: " in text


def test_steps_and_tips(printed):
    text = printed(STEPS)
    assert float(re.search(r"Loss: ([\d.]+)", text)[1]) > 0
    assert "Learning rates: [1e-06]" in text
    targets, logprobs, negative = re.search(r"supervised (\d+) (\d+) (\w+)", text).groups()
    assert (targets, negative) == (logprobs, "True")
    assert 0 < int(re.search(r"generated (\d+)", text)[1]) <= 100
    data, tokens, off = re.search(r"rl (\d+) (\d+) (\S+)", text).groups()
    assert (data, tokens) == ("4", "20")
    assert float(off) < 1e-4  # the trainer gives what the sampler gave


def test_the_example_of_the_readme_trains_and_samples(server, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "clients/tinker_gmi/README.md").read_text(), re.DOTALL)
    done = run_python(".venv-quickstart", "-c", example.replace("http://localhost:8000", server.url), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *steps, text = done.stdout.splitlines()
    assert len(steps) == 20 and text == " On the moon."
