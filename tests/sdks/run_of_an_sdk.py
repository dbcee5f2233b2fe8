"""A training run as any SDK can make it: prints what came of it as JSON.

Arguments: the server's URL, and whether to send `protobuf` or `json`. It imports only what the SDK itself needs, so
that it runs in the environment of any version.
"""

import json
import logging
import sys

import tinker
from tinker import types

URL, FORM = sys.argv[1:]
TEXTS = ("The otter likes plums.", "The heron likes rice, and nothing else.")


class Routes(logging.Handler):
    """The routes that were called, from what httpx logs of each request."""

    called = set()

    def emit(self, record):
        method, url, *_ = record.args
        self.called.add(f"{method} {str(url).removeprefix(URL).partition('?')[0]}")


logging.getLogger("httpx").addHandler(Routes())
logging.getLogger("httpx").setLevel(logging.INFO)


def datum(tokens):
    loss_fn_inputs = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=loss_fn_inputs)


def logprobs(output):
    return [list(row["logprobs"].data) for row in output.loss_fn_outputs]


client = tinker.ServiceClient(base_url=URL, api_key="tml-test")
if FORM == "json":  # what an SDK that can do both does if the server does not ask it to send protobuf
    flags = {"proto_write_fwdbwd": False, "fwd_via_fwdbwd": False}
    client.holder._client_config = client.holder._client_config.model_copy(update=flags)
served = [model.model_name for model in client.get_server_capabilities().supported_models]
run = client.create_lora_training_client(base_model="tinkercloud/nano", rank=8, seed=7)
tokenizer = run.get_tokenizer()
batch = [datum(tokenizer.encode(text)) for text in TEXTS]
adam = types.AdamParams(learning_rate=1e-2)


def steps(run, count):
    losses = []
    for _ in range(count):
        forward_backward, step = run.forward_backward(batch, "cross_entropy"), run.optim_step(adam)
        losses.append(forward_backward.result().metrics["loss:sum"])
        step.result()
    return losses


before = run.forward(batch, "cross_entropy").result()
losses = steps(run, 3)
path = run.save_state("middle").result().path
continued = steps(run, 3)
with_optimizer = client.create_training_client_from_state_with_optimizer(path)
without_optimizer = client.create_training_client_from_state(path)
resumed = {"with_optimizer": steps(with_optimizer, 3), "without_optimizer": steps(without_optimizer, 2)}
run.load_state(path).result()
after = run.forward(batch, "cross_entropy").result()

named = run.save_weights_for_sampler("for-sampling").result().path
prompt = types.ModelInput.from_ints(tokenizer.encode("The otter"))
params = types.SamplingParams(max_tokens=6, temperature=1.0, seed=11, stop=[])
samples = {}
samplers = {
    "named": client.create_sampling_client(model_path=named),
    "ephemeral": run.save_weights_and_get_sampling_client(),
}
for kind, sampler in samplers.items():
    drawn = sampler.sample(prompt, num_samples=2, sampling_params=params).result().sequences
    samples[kind] = {
        "tokens": [list(sequence.tokens) for sequence in drawn],
        "logprobs": [list(sequence.logprobs) for sequence in drawn],
        "stop_reasons": [sequence.stop_reason for sequence in drawn],
        "prompt": list(sampler.compute_logprobs(types.ModelInput.from_ints(tokenizer.encode(TEXTS[0]))).result()),
        "base_model": sampler.get_base_model(),
    }

rest = client.create_rest_client()
run_id = run.get_info().model_id
listed = rest.list_checkpoints(run_id).result().checkpoints
print(
    json.dumps(
        {
            "version": tinker.__version__,
            "legacy_route": "POST /api/v1/forward" in Routes.called,
            "served": served,
            "forward": {"before": logprobs(before), "after": logprobs(after)},
            "losses": losses,
            "continued": continued,
            "resumed": resumed,
            "samples": samples,
            "base_model": rest.get_training_run(run_id).result().base_model,
            "in_runs": run_id in [r.training_run_id for r in rest.list_training_runs(limit=50).result().training_runs],
            "checkpoints": sorted([c.checkpoint_type, c.checkpoint_id] for c in listed),
            "rank": rest.get_weights_info_by_tinker_path(path).result().lora_rank,
        }
    )
)
