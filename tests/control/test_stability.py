"""Joining datums with what was recorded of their tokens, and finding the records."""

import numpy as np
import pytest
from msgspec.structs import replace

from tests.control.conftest import NANO, Client
from tinkercloud.control.stability import Provenance, SequenceRecord, Span, joined
from tinkercloud.engine.operations import Datum, Sample, SamplingParams
from tinkercloud.engine.results import SampledSequence
from tinkercloud.errors import InvalidRequest

F = np.float32


def record(prompt: list[int], tokens: list[int], shift: float, raw: bool = False) -> SequenceRecord:
    drawing = np.array([-shift - i for i in range(len(tokens))], F)
    policy = drawing - F(0.5)
    sequence = SampledSequence(np.array(tokens, np.int32), drawing, "stop", policy_logprobs=policy)
    if raw:
        sequence = replace(sequence, logprobs=policy, drawing_logprobs=drawing)
    return SequenceRecord(np.array(prompt, np.int32), sequence)


RECORDS = {"a": record([1, 2, 3], [4, 5], 1), "b": record([1, 2, 3, 4, 5, 6], [7, 8], 10, raw=True)}
"""Two turns of a conversation: the second one's prompt holds the first, and one token more. It was answered with raw
log-probabilities."""


def prompt(name: str, offset: int, length: int) -> Span:
    return Span(name, offset, length, sampled=False)


def sampled(name: str, offset: int, length: int) -> Span:
    return Span(name, offset, length, sampled=True)


INPUT = (prompt("a", 0, 3), sampled("a", 0, 2), prompt("b", 5, 1), sampled("b", 0, 1))
ROWS = (prompt("a", 1, 2), sampled("a", 0, 2), prompt("b", 5, 1), sampled("b", 0, 0), sampled("b", 0, 2))
ADVANTAGES = [0, 0, 1, 1, 0, 2, 0]


def join(model_input=INPUT, targets=ROWS, tokens=(1, 2, 3, 4, 5, 6, 7), labels=(2, 3, 4, 5, 6, 7, 8), advantages=None):
    inputs = {
        "target_tokens": np.array(labels, np.int64),
        "advantages": np.array(ADVANTAGES if advantages is None else advantages, F),
    }
    return joined(Datum(np.array(tokens, np.int32), inputs), Provenance(tuple(model_input), tuple(targets)), RECORDS)


def test_each_sampled_target_gets_what_was_recorded_of_it():
    inputs = join().inputs
    assert inputs["sampled"].tolist() == [0, 0, 1, 1, 0, 1, 1]
    assert inputs["logprobs"].tolist() == [0, 0, -1, -2, 0, -10, -11]
    assert inputs["policy_logprobs"].tolist() == [0, 0, -1.5, -2.5, 0, -10.5, -11.5]
    assert all(values.dtype == F for name, values in inputs.items() if name != "target_tokens")
    assert inputs["advantages"].tolist() == ADVANTAGES


def test_a_part_of_a_sequence_can_be_trained_on():
    inputs = join([sampled("b", 0, 1)], [sampled("b", 1, 1)], [7], [8], [1]).inputs
    assert (inputs["logprobs"].tolist(), inputs["sampled"].tolist()) == ([-11], [1])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"targets": ROWS[:-1]}, "spans of target_tokens cover 5 positions; they must tile all 7"),
        ({"model_input": (*INPUT, sampled("b", 1, 1))}, "spans of model_input cover 8 positions; they must tile all 7"),
        ({"model_input": ()}, "spans of model_input cover 0 positions"),
        ({"labels": (2, 3, 4, 9, 6, 7, 8)}, "target_tokens has token 9 at position 3, where sequence a has 5"),
        ({"tokens": (1, 9, 3, 4, 5, 6, 7)}, "model_input has token 9 at position 1, where the prompt of a has 2"),
        ({"targets": (*ROWS[:-1], sampled("b", 1, 2))}, "takes tokens 1 to 2 of sequence b, which has 2"),
        ({"targets": (prompt("a", 2, 2), *ROWS[1:])}, "takes tokens 2 to 3 of the prompt of a, which has 3"),
        ({"targets": (prompt("a", -1, 2), *ROWS[1:])}, "offset -1 and length 2; neither can be negative"),
        ({"targets": (sampled("a", 0, -2), sampled("a", 0, 9))}, "offset 0 and length -2"),
        ({"targets": (sampled("a", 2**62, 7),)}, "of sequence a, which has 2"),
        ({"advantages": [0, 1, 1, 1, 0, 2, 0]}, "advantages has 1 at position 1, where the spans of .* say prompt"),
        ({"advantages": [1]}, r"advantages must have the shape \[7\], not \[1\]"),
        ({"labels": [[2]] * 7}, r"target_tokens must have the shape \[7\], not \[7, 1\]"),
    ],
)
def test_spans_that_do_not_fit_are_named(wrong, says):
    with pytest.raises(InvalidRequest, match=says):
        join(**wrong)


def test_a_datum_without_spans_is_told_what_to_do():
    datum = Datum(np.array([1], np.int32), {"target_tokens": np.array([2]), "advantages": np.ones(1, F)})
    with pytest.raises(InvalidRequest, match=r"use Datum\.with_provenance"):
        joined(datum, None, RECORDS)


async def draw(service, client: Client, record: bool) -> str:
    """The request id of a sample from the base model."""
    sampler = await service.samplers.create(client.session, 0, NANO, None)
    operation = Sample(
        "", sampler.sampler_id, np.array([5, 6], np.int32), SamplingParams(max_tokens=3, seed=1), num_samples=2,
        record_stability_info=record,
    )  # fmt: skip
    entry = await service.samplers.sample(sampler, None, operation)
    await client.result(entry)
    return entry.request_id


def test_a_record_is_found_by_its_session_only_and_until_it_expires(serving, run):
    async def story():
        async with serving() as service:
            client, other = await Client.create(service), await Client.create(service)
            recorded, plain = [await draw(service, client, record) for record in (True, False)]
            found = await service.stability.recall(client.model, {f"{recorded}:0", f"{recorded}:1"})
            assert [len(found[f"{recorded}:{n}"].sequence.policy_logprobs) for n in (0, 1)] == [3, 3]
            assert found[f"{recorded}:1"].prompt.tolist() == [5, 6]
            unknown = [f"{recorded}:2", f"{recorded}:-1", f"{recorded}:00", f"{recorded}", "", ":", "x:0", "\0:0"]
            for name in [*unknown, f"{client.model.model_id}:0:0"]:
                with pytest.raises(InvalidRequest, match="there is no sequence"):
                    await service.stability.recall(client.model, {name})
            for model in (other.model, replace(client.model, owner="another")):
                with pytest.raises(InvalidRequest, match=r"there is no sequence .* drawn in the same session"):
                    await service.stability.recall(model, {f"{recorded}:0"})
            with pytest.raises(InvalidRequest, match="sampled without record_stability_info=True"):
                await service.stability.recall(client.model, {f"{plain}:0"})
            await service._ledger.keep([recorded], 1e-6)
            with pytest.raises(InvalidRequest, match="or not trained on for 86400 s, after which records expire"):
                await service.stability.recall(client.model, {f"{recorded}:0"})

    run(story)
