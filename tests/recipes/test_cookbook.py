"""Recipes of the public cookbook, unmodified, with the official SDK: what they report is what they should."""

import json
import math
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

RENDERER = "renderer_name=qwen3_instruct"
FRESH = "behavior_if_log_dir_exists=delete"
LEARNING = ("batch_size=16", "learning_rate=3e-3", "max_length=128")
LOOP = (*LEARNING, "save_every=3", "max_steps=6")
RECIPES = {
    "math_rl.train": (
        *(RENDERER, "env=arithmetic", "group_size=8", "groups_per_batch=32", "learning_rate=1e-3", "max_tokens=5"),
        *("max_steps=8", "save_every=0", "eval_every=0", "loss_fn=importance_sampling", FRESH),
    ),
    "chat_sl.train": (
        *(RENDERER, "dataset=conversations.jsonl", *LEARNING, "num_epochs=3", "save_every=6", "eval_every=0", FRESH),
    ),
    "sl_loop": LOOP,
    "preference.dpo.train": (
        *(RENDERER, "dataset=hhh", "learning_rate=1e-3", "batch_size=16", "max_length=128", "max_steps=5", FRESH),
    ),
}
"""Modules of `tinker_cookbook.recipes`, with their options."""


@pytest.fixture(scope="module")
def begun(recipe, home) -> dict[str, Future[list[dict]]]:
    """All recipes, two at a time on one server, as two people would run them; the rows of their metrics."""
    pool = ThreadPoolExecutor(2)
    yield {name: pool.submit(recipe, name, home / "logs" / name, *options) for name, options in RECIPES.items()}
    pool.shutdown(cancel_futures=True)


def series(rows: list[dict], key: str) -> list[float]:
    """A metric over the steps that have it."""
    found = [row[key] for row in rows if key in row]
    assert found, f"no {key!r} in {sorted(rows[-1])}"
    return found


def test_supervised_training_lowers_the_nll(begun):
    nll = series(begun["chat_sl.train"].result(), "train_mean_nll")
    assert len(nll) == 12
    assert nll[-1] < nll[0] / 2, nll


def test_preference_training_starts_at_even_odds(begun):
    loss = series(begun["preference.dpo.train"].result(), "dpo_loss")
    assert loss[0] == pytest.approx(math.log(2), abs=1e-4)
    assert loss[-1] < 0.5, loss


def test_a_resumed_loop_repeats_its_steps(begun, recipe, home):
    whole = series(begun["sl_loop"].result(), "train_mean_nll")
    assert len(whole) == 6

    log = home / "logs" / "sl_loop"
    checkpoints = log / "checkpoints.jsonl"
    kept = [line for line in checkpoints.read_text().splitlines() if json.loads(line)["name"] != "final"]
    assert [json.loads(line)["batch"] for line in kept] == [3]
    checkpoints.write_text("\n".join(kept) + "\n")  # as if it had been stopped behind this one
    repeated = series(recipe("sl_loop", log, *LOOP), "train_mean_nll")[6:]
    assert repeated == pytest.approx(whole[3:], abs=1e-6)
    assert whole[3] != pytest.approx(whole[0], abs=1e-2), "training must show, or the comparison proves nothing"


def test_reinforcement_learning_raises_the_reward(begun):
    """A tenth of the model's answers do not end within five tokens; a few steps teach it that much for certain."""
    rows = begun["math_rl.train"].result()
    ended, correct = series(rows, "env/all/format"), series(rows, "env/all/correct")
    assert sum(ended[-3:]) / 3 > ended[0] + 0.025, ended
    assert min(correct) > 0.3, f"it learns to end its answers, not to end them early: {correct}"
    assert max(map(abs, series(rows, "optim/kl_sample_train_v1"))) < 1e-6
    # Half the mean square of (sampled - trained log-probability): 5e-11 is a difference of 1e-5.
    assert max(series(rows, "optim/kl_sample_train_v2")) < 5e-11
