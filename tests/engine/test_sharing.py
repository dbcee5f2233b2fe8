"""Training and sampling share one engine by its policy, counted on a clock that only their work moves."""

from __future__ import annotations

import queue
import socket
import time
from types import SimpleNamespace

import numpy as np
import pytest

from tests.engine.examples import VOCAB
from tests.engine.sampler_requests import prompt_of, sample
from tinkercloud.codec import decode, encode
from tinkercloud.engine import messages, process
from tinkercloud.engine.messages import (
    LENGTH_BYTES,
    Answer,
    Ask,
    CycleDone,
    FromEngine,
    RunCycle,
    Stop,
    Working,
    frame_length,
)
from tinkercloud.engine.operations import CreateModel, Datum, ForwardBackward, LoraConfig, SaveWeights
from tinkercloud.engine.results import LossOutput, SampleOutput, SaveOutput
from tinkercloud.engine.torch.checkpoints import Draft

MICRO_BATCH, STEP = 10, 1
"""What they take on the clock."""

DATUMS = 6
"""Of a large forward_backward; each is a micro-batch."""


@pytest.fixture
def told(sampler_of, trainer_of, monkeypatch):
    """Run an engine on the messages to its end: (what happened, in order: "train" and "step"; what it answered).
    `happened` is what has until now."""
    sampler, trainer = sampler_of("qwen3"), trainer_of("qwen3", token_budget=32)
    happened: list[str] = []
    run, step = trainer.run, sampler.step

    def stepped():
        happened.append("step")
        return step()

    def trained(operations, turns):
        class Noted:
            wanted = property(lambda self: turns.wanted)

            def next(self):
                if isinstance(operations[0], ForwardBackward):
                    happened.append("train")
                turns.next()

        return run(operations, Noted())

    def clock() -> float:
        return MICRO_BATCH * happened.count("train") + STEP * happened.count("step")

    monkeypatch.setattr(sampler, "step", stepped)
    monkeypatch.setattr(trainer, "run", trained)
    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=clock, time=clock))

    def tell(*messages):
        inbox = queue.SimpleQueue()
        for message in (*messages, Stop()):
            inbox.put(message)
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**22)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**22)
        with ours, theirs:
            process.Engine(trainer, sampler, theirs, inbox).serve()
            theirs.shutdown(socket.SHUT_WR)
            with ours.makefile("rb") as answers:
                said = []
                while header := answers.read(LENGTH_BYTES):
                    said.append(decode(answers.read(frame_length(header)), FromEngine))
        while sampler.busy:
            step()
        return happened, said

    tell.happened = happened
    return tell


def training(number: int = 0) -> RunCycle:
    """A forward_backward of as many micro-batches as it has datums."""
    random = np.random.default_rng(number)
    data = tuple(
        Datum(tokens.astype(np.int32), {"target_tokens": tokens, "weights": np.ones(30, np.float32)})
        for tokens in random.integers(2, VOCAB, (DATUMS, 30))
    )
    return RunCycle(1 + number, (encode(ForwardBackward("m", data, "cross_entropy")),))


CREATE = RunCycle(0, (encode(CreateModel("m", LoraConfig(rank=4))),))


def asked(count: int, max_tokens: int) -> list[Ask]:
    requests = [sample(f"r{i}", prompt_of(i, 8), max_tokens=max_tokens, stop_tokens=()) for i in range(count)]
    return [Ask(i, encode(request)) for i, request in enumerate(requests)]


def test_a_large_batch_delays_a_token_by_one_micro_batch_at_most(told):
    happened, said = told(CREATE, *asked(1, 150), training())
    first, last = happened.index("train"), len(happened) - happened[::-1].index("train")
    between = "".join(event[0] for event in happened[first:last])
    assert between.count("t") == DATUMS and "tt" not in between, "tokens are drawn after each micro-batch"
    assert {len(steps) for steps in between.split("t")[1:-1]} == {MICRO_BATCH // STEP}, "for as long as it took"
    (_, done) = [message for message in said if isinstance(message, CycleDone)]
    assert isinstance(done.results[0], LossOutput)
    ends = [place for place, message in enumerate(said) if isinstance(message, CycleDone)]
    working = [message for message in said[ends[0] + 1 : ends[1]] if isinstance(message, Working)]
    assert len(working) >= DATUMS, "it is known not to be stuck"


def test_a_flood_of_samples_leaves_training_half_of_the_time(told):
    happened, said = told(CREATE, *asked(120, 100), training(0), training(1))
    ended = [message for message in said if isinstance(message, CycleDone)]
    assert len(ended) == 3 and all(isinstance(one.results[0], LossOutput) for one in ended[1:])
    first, last = happened.index("train"), len(happened) - happened[::-1].index("train")
    train, steps = happened[first:last].count("train"), happened[first:last].count("step")
    assert train == 2 * DATUMS and steps <= train * MICRO_BATCH // STEP
    assert all(isinstance(one.result, SampleOutput) for one in said if isinstance(one, Answer))


@pytest.mark.parametrize(("step", "steps_after_each"), [(4, [3, 2, 3, 2, 3]), (6, [2, 2, 1, 2, 2]), (25, [1] * 5)])
def test_a_turn_that_took_too_long_is_made_up_for(step, steps_after_each, told, monkeypatch):
    """Steps that are no fraction of a micro-batch; of longer ones there is always one."""
    monkeypatch.setattr(f"{__name__}.STEP", step)
    happened, _ = told(CREATE, *asked(1, 100), training())
    first, last = happened.index("train"), len(happened) - happened[::-1].index("train")
    turns = "".join(event[0] for event in happened[first:last]).split("t")
    assert [len(steps) for steps in turns[1:-1]] == steps_after_each


def test_samples_go_on_while_a_save_waits_for_the_disk(told, monkeypatch, tmp_path):
    publish = Draft.publish

    def publish_after_steps(draft):
        before, deadline = told.happened.count("step"), time.monotonic() + 20
        while told.happened.count("step") < before + 10 and time.monotonic() < deadline:
            time.sleep(0.001)
        told.happened.append("publish")
        return publish(draft)

    monkeypatch.setattr(Draft, "publish", publish_after_steps)
    save = RunCycle(1, (encode(SaveWeights("m", str(tmp_path / "saved"))),))
    happened, said = told(CREATE, *asked(1, 30), save)
    assert happened[: happened.index("publish")].count("step") > 10
    (saved,) = [message.results[0] for message in said if isinstance(message, CycleDone) and message.cycle_id == 1]
    assert isinstance(saved, SaveOutput)


def test_an_answer_that_cannot_be_sent_is_its_requests_failure(told, monkeypatch):
    monkeypatch.setattr(messages, "MAX_FRAME_BYTES", 5000)
    large = Ask(9, encode(sample("large", prompt_of(9, 8), max_tokens=40, topk_sample_logprobs=20, stop_tokens=())))
    _, said = told(CREATE, large, *asked(1, 30), training())
    answers = {message.ask_id: message.result for message in said if isinstance(message, Answer)}
    assert isinstance(answers[0], SampleOutput)
    assert answers[9].category == "user"
    assert "answer is too large" in answers[9].error and "at most 5,000 can be sent" in answers[9].error
