"""Operations, adapters, checkpoints and samples that cannot be: refused with a sentence, and the same run trains on."""

import math

import pytest
from tinker import types
from tinker.types.optimizer import OptimizerConfigBase

from tests.e2e.by_hand import CONTEXT, NANO, OTHER, OTHER_VOCABULARY, PATIENCE, Run, datum, refused


@pytest.fixture(scope="module")
def server(limited_server):
    return limited_server


@pytest.fixture(scope="module")
def run(server):
    """A training run that survives everything here."""
    made = Run(server.url)
    yield made
    made.close()


@pytest.fixture(scope="module")
def other(server):
    """A training run on the other base model, with a checkpoint."""
    made = Run(server.url, OTHER)
    made.path = made.sdk.save_state("elsewhere").result(PATIENCE).path
    yield made
    made.close()


# ---------------------------------------------------------------- operations


STEPS = {
    "negative learning rate": ({"adam_params": {"learning_rate": -1e-4}}, "learning_rate"),
    "text learning rate": ({"adam_params": {"learning_rate": "fast"}}, "learning_rate"),
    "learning rate beyond float32": ({"adam_params": {"learning_rate": 1e300}}, "learning_rate"),
    "beta1 of 1": ({"adam_params": {"beta1": 1.0}}, "beta1"),
    "negative beta2": ({"adam_params": {"beta2": -0.1}}, "beta2"),
    "negative eps": ({"adam_params": {"eps": -1e-8}}, "eps"),
    "negative weight decay": ({"adam_params": {"weight_decay": -0.1}}, "weight_decay"),
    "negative clipping": ({"adam_params": {"grad_clip_norm": -1.0}}, "grad_clip_norm"),
    "unknown option": ({"adam_params": {"momentum": 0.9}}, "momentum"),
    "no params": ({}, "adam_params"),
    "params that are a list": ({"adam_params": [1e-4]}, "adam_params"),
    "another optimizer": ({"optimizer_params": {"type": "dimuon", "learning_rate": 1.0}}, "adamw"),
    "another optimizer, as the SDK sends it": ({"optim_params": {"type": "dimuon", "learning_rate": 1.0}}, "dimuon"),
}


@pytest.mark.parametrize("name", STEPS)
def test_an_optimizer_step(run, name):
    params, says = STEPS[name]
    repeats = [run.seq()] * 2
    first, second = (refused(run.post, "optim_step", seq_id=seq_id, **params) for seq_id in repeats)
    assert first == second and first.status == 400 and says in first.detail
    run.trains_on()


@pytest.mark.parametrize(("field", "value"), [("learning_rate", math.nan), ("beta2", math.inf), ("eps", math.nan)])
def test_an_optimizer_step_with_numbers_that_json_has_not(run, field, value):
    step = refused(run.sdk.optim_step, types.AdamParams(**{field: value}))
    assert step.status == 400 and f"{field}: must be a finite number" in step.detail
    run.trains_on()


NAMES = ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a b", "x" * 129, "-rf", "ü", "a\0b", "a\n", "~", "..a"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name(run, name):
    for save in (run.sdk.save_state, run.sdk.save_weights_for_sampler):
        first, second = (refused(save, name) for _ in range(2))
        assert first == second and first.status == 400
        assert ("NUL" if "\0" in name else "name") in first.detail
    run.trains_on()


def test_a_time_to_live(run):
    for seconds in (0, -1, 59, 2**62):
        assert "ttl_seconds" in refused(run.sdk.save_state, "x", ttl_seconds=seconds).detail
    run.trains_on()


def test_a_checkpoint_that_cannot_be_loaded(run, other):
    missing = f"tinker://{run.id}/weights/nothing"
    shapes = run.service.create_lora_training_client(base_model=NANO, rank=2).result(PATIENCE)
    smaller = shapes.save_state("smaller").result(PATIENCE).path
    sampler_only = run.sdk.save_weights_for_sampler("no-optimizer").result(PATIENCE).path
    cases = [
        (missing, 404, missing),
        (f"tinker://{run.id}/weights/..", 404, "no checkpoint"),
        ("/etc/passwd", 400, "tinker://"),
        ("", 400, "tinker://"),
        ("tinker://x/weights/y/z", 400, "tinker://"),
        (other.path, 400, OTHER),
        (smaller, 400, "rank 2 and not 4"),
    ]
    for path, status, says in cases:
        first, second = (refused(run.sdk.load_state, path) for _ in range(2))
        assert first == second and first.status == status and says in first.detail, path
        if not path.startswith((other.path, smaller)):
            fresh = refused(run.service.create_training_client_from_state, path)
            assert fresh.status == status and says in fresh.detail, path
    assert "optimizer" in refused(run.sdk.load_state_with_optimizer, sampler_only).detail
    run.trains_on()
    other.trains_on()


# ---------------------------------------------------------------- what training runs are made of


@pytest.mark.parametrize(
    ("given", "status", "says"),
    [
        ({"base_model": "nobody/nothing"}, 404, OTHER),
        ({"base_model": ""}, 404, NANO),
        ({"rank": 0}, 400, "positive"),
        ({"rank": -8}, 400, "positive"),
        ({"rank": 17}, 400, "exceeds max LoRA rank 16"),
        ({"rank": 2**70}, 400, "exceeds max LoRA rank 16"),
        ({"optimizer": OptimizerConfigBase(type="lion")}, 400, "adamw, dimuon"),
        ({"optimizer": OptimizerConfigBase(type="dimuon", version=2)}, 400, "version 2 of dimuon"),
    ],
)
def test_a_training_run(run, given, status, says):
    create = run.service.create_lora_training_client
    first, second = (refused(create, **{"base_model": NANO, "rank": 4} | given) for _ in range(2))
    assert first == second and first.status == status and says in first.detail
    run.trains_on()


def test_a_training_run_without_a_trainable_part(run):
    parts = {"rank": 4, "train_mlp": False, "train_attn": False, "train_unembed": False}
    made = {"session_id": run.session, "model_seq_id": 99, "base_model": NANO}
    assert "nothing to train" in refused(run.post, "create_model", **made, lora_config=parts).detail
    assert "lora_config is required" in refused(run.post, "create_model", **made).detail
    run.trains_on()


# ---------------------------------------------------------------- samples


def sampling(**params):
    return types.SamplingParams(max_tokens=params.pop("max_tokens", 4), **params)


SAMPLES = {  # what is wrong: (prompt, sampling params, number of samples, what the sentence says)
    "no prompt": ([], sampling(), 1, "at least one token"),
    "an id outside": ([1, 2048], sampling(), 1, "0 to 2047"),
    "a negative id": ([-5], sampling(), 1, "-5"),
    "no room": ([1] * CONTEXT, sampling(), 1, "context window"),
    "too many tokens": ([1] * 200, sampling(max_tokens=57), 1, "200 + 57 > 256"),
    "no tokens": ([1], sampling(max_tokens=0), 1, "max_tokens"),
    "negative temperature": ([1], sampling(temperature=-0.5), 1, "temperature"),
    "top_p of 0": ([1], sampling(top_p=0.0), 1, "top_p"),
    "top_p above 1": ([1], sampling(top_p=1.5), 1, "top_p"),
    "top_k of 0": ([1], sampling(top_k=0), 1, "top_k"),
    "top_k of -2": ([1], sampling(top_k=-2), 1, "top_k"),
    "no samples": ([1], sampling(), 0, "num_samples"),
    "too many samples": ([1], sampling(), 10**6, "num_samples"),
    "an empty stop": ([1], sampling(stop=[""]), 1, "empty text"),
    "a stop outside": ([1], sampling(stop=[2048]), 1, "2048"),
    "too many stops": ([1], sampling(stop=["x"] * 1000), 1, "1000 entries"),
}


@pytest.fixture(scope="module")
def sampler(run):
    return run.service.create_sampling_client(base_model=NANO).result(PATIENCE)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample(run, sampler, name):
    prompt, params, count, says = SAMPLES[name]
    prompt = types.ModelInput.from_ints(prompt)
    first, second = (refused(sampler.sample, prompt, count, params) for _ in range(2))
    assert first == second and first.status == 400 and says in first.detail
    good = sampler.sample(types.ModelInput.from_ints([1, 2]), 1, sampling(stop=[])).result(PATIENCE)
    assert len(good.sequences[0].tokens) == 4
    run.trains_on()


def test_a_sampler(run, other):
    of_run = f"tinker://{run.id}/sampler_weights/nothing"
    create = run.service.create_sampling_client
    assert refused(create, model_path=of_run) == refused(create, model_path=of_run)
    assert refused(create, model_path=of_run).status == 404
    by_hand = {"session_id": run.session, "sampling_session_seq_id": 99}
    assert refused(run.post, "create_sampling_session", **by_hand, model_path="../../etc/passwd").status == 400
    assert refused(run.post, "create_sampling_session", **by_hand).status == 400
    assert refused(create, base_model="nobody/nothing").status == 404
    assert OTHER in refused(create, model_path=other.path, base_model=NANO).detail
    prompt = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}}
    assert refused(run.http.post, "asample", json=prompt | {"sampling_session_id": "x"}).status == 404
    assert "nothing to sample from" in refused(run.http.post, "asample", json=prompt).detail
    run.trains_on()


# ---------------------------------------------------------------- two base models


def test_ids_are_judged_by_the_vocabulary_of_their_own_model(run, other):
    last = [datum(1, OTHER_VOCABULARY - 1)]
    other.step(last)
    assert "0 to 2047" in refused(run.sdk.forward_backward, last, "cross_entropy").detail
    run.step_fails()
    beyond = [datum(1, OTHER_VOCABULARY)]
    assert f"0 to {OTHER_VOCABULARY - 1}" in refused(other.sdk.forward_backward, beyond, "cross_entropy").detail
    other.step_fails()
    for one in (run, other):
        one.trains_on()
