"""What a batch must be: each refusal names the datum and what is wrong; what is accepted is placed where it belongs."""

import numpy as np
import pytest

from tinkercloud.api.datums import operation_from
from tinkercloud.api.wire.arrays import Batch
from tinkercloud.engine.base_model import BaseModelInfo
from tinkercloud.engine.losses import LOSSES
from tinkercloud.engine.operations import Datum
from tinkercloud.errors import InvalidRequest

INFO = BaseModelInfo(
    name="me/model",
    folder="/models/model",
    architecture="Qwen3ForCausalLM",
    vocab_size=100,
    max_context=8,
    max_rank=16,
    lora_alpha=24.0,
    eos_tokens=(2, 3),
    num_parameters=1,
    device="cpu",
    dtype="float32",
)


def datum(tokens=(1, 2, 3), **inputs) -> Datum:
    given = {"target_tokens": np.array([2, 3, 4]), "weights": np.ones(3, np.float32), **inputs}
    arrays = {name: np.asarray(value) for name, value in given.items() if value is not None}
    return Datum(tokens=np.array(tokens, np.int32), inputs=arrays)


def accepted(*data: Datum, loss_fn="cross_entropy", config=None, align=False):
    return operation_from(Batch(loss_fn, config or {}, list(data), [None] * len(data)), "m", False, INFO, align)


def test_a_sound_batch_is_accepted():
    operation = accepted(datum(), datum(target_tokens=np.array([2, 3, 4], np.int32)))
    assert operation.model_id == "m" and operation.num_tokens == 6 and not operation.forward_only
    assert all(d.inputs["target_tokens"].dtype == np.int64 for d in operation.data)
    policy = {"weights": None, "logprobs": np.zeros(3, np.float32), "advantages": np.ones(3, np.float32)}
    assert accepted(datum(**policy), loss_fn="ppo", config={"clip_low_threshold": 0.5}).loss_fn == "ppo"


def test_several_weighted_targets_a_position_are_accepted():
    many = datum(target_tokens=np.ones((3, 2), np.int64), weights=np.ones((3, 2), np.float32))
    assert accepted(many).data[0].inputs["weights"].shape == (3, 2)


F = np.float32


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (datum(tokens=()), "model_input has 0 tokens and target_tokens 3"),
        (
            datum(tokens=(), target_tokens=np.empty(0, int), weights=np.empty(0, F)),
            "the model input is empty; send at least one token",
        ),
        (datum(tokens=(1, 2, 100)), "model input has token id 100; ids of this model are 0 to 99"),
        (datum(tokens=(1, 2, -1)), "model input has token id -1"),
        (datum(target_tokens=[2, 3, 100]), "target_tokens has token id 100"),
        (datum(target_tokens=[2, 3, -100]), "target_tokens has token id -100"),
        (datum(target_tokens=[2, 3], weights=np.ones(2, F)), "3 tokens and target_tokens 2; they must be equally many"),
        (datum(target_tokens=[2.0, 3.0, 4.0]), "target_tokens: dtype is float64; it must be int64"),
        (datum(target_tokens=np.ones((3, 1, 1), int)), r"target_tokens of cross_entropy must be integers \[N\]"),
        (datum(target_tokens=np.ones((3, 0), int), weights=np.ones((3, 0), F)), "shape"),
        (datum(target_tokens=None), "cross_entropy needs target_tokens"),
        (datum(weights=None), "cross_entropy needs weights"),
        (datum(weights=np.ones(3, int)), "weights: dtype is int64; it must be float32"),
        (datum(weights=np.ones(2, F)), "weights must be numbers of the shape of target_tokens"),
        (datum(weights=np.ones((3, 1), F)), "weights must be numbers of the shape of target_tokens"),
        (datum(weights=np.array([1, np.nan, 1], F)), "weights has NaN or infinite"),
        (datum(weights=np.array([1, np.inf, 1], F)), "weights has NaN or infinite"),
        (datum(mask=np.ones(3, F)), "cross_entropy does not read mask; its loss_fn_inputs are target_tokens, weights"),
        (
            datum(range(9), target_tokens=np.ones(9, int), weights=np.ones(9, F)),
            "the model input has 9 tokens, and .*'s context window is 8;",
        ),
    ],
)
@pytest.mark.parametrize("align", [False, True])
def test_a_wrong_datum_is_named(wrong, says, align):
    if align and "equally many" in says:
        assert accepted(wrong, align=True)
        return
    with pytest.raises(InvalidRequest, match=f"datum 1[:,].*{says}"):
        accepted(datum(), wrong, align=align)


@pytest.mark.parametrize(
    ("loss_fn", "config", "says"),
    [
        ("crossentropy", {}, "unknown loss_fn 'crossentropy'; this server has cross_entropy"),
        ("custom", {}, "must be {'loss_id': ...} with an id from create_custom_loss"),
        ("cross_entropy", {"beta": 1.0}, "no 'beta'"),
        ("ppo", {"clip_low": 0.8}, "no 'clip_low'; it takes clip_low_threshold, clip_high_threshold"),
        ("ppo", {"clip_low_threshold": "low"}, "must be a finite number"),
        ("ppo", {"clip_low_threshold": float("nan")}, "must be a finite number"),
    ],
)
def test_a_wrong_loss_is_named(loss_fn, config, says):
    given = datum()
    if loss_fn == "ppo":
        given = datum(weights=None, logprobs=np.zeros(3, F), advantages=np.zeros(3, F))
    with pytest.raises(InvalidRequest, match=says):
        accepted(given, loss_fn=loss_fn, config=config)


@pytest.mark.parametrize(
    "loss_fn", [name for name, loss in LOSSES.items() if loss.counts not in ("weights", "sampled")]
)
def test_each_input_of_a_loss_is_required_and_no_other_is_read(loss_fn):
    values = {wanted.name: np.ones(3, F) for wanted in LOSSES[loss_fn].inputs[1:]}
    whole = datum(weights=None, **values)
    assert accepted(whole, loss_fn=loss_fn).loss_fn == loss_fn
    for name in values:
        with pytest.raises(InvalidRequest, match=f"datum 0: {loss_fn} needs {name} in loss_fn_inputs"):
            accepted(datum(weights=None, **(values | {name: None})), loss_fn=loss_fn)
    with pytest.raises(InvalidRequest, match=f"{loss_fn} does not read weights"):
        accepted(datum(**values), loss_fn=loss_fn)
    several = {name: np.ones((3, 2), F) for name in values}
    with pytest.raises(InvalidRequest, match=rf"target_tokens of {loss_fn} must be integers \[N\]"):
        accepted(datum(weights=None, target_tokens=np.ones((3, 2), int), **several), loss_fn=loss_fn)


def test_no_data_is_refused():
    with pytest.raises(InvalidRequest, match="data is empty"):
        accepted()


# ---------------------------------------------------------------- targets of another length, for tinker_gmi


def placed(tokens, targets) -> tuple[list[int], list[int]]:
    """(the engine's input, the context that it predicts each target from) for targets of another length."""
    given = datum(tokens, target_tokens=np.array(targets), weights=np.ones(len(targets), F))
    (made,) = accepted(given, align=True).data
    first = made.num_tokens - len(targets)
    return made.tokens.tolist(), [made.tokens[: first + j + 1].tolist() for j in range(len(targets))]


def test_targets_that_the_input_ends_with_are_its_last_tokens():
    tokens, contexts = placed([1, 2, 3, 4], [3, 4])
    assert tokens == [1, 2, 3]
    assert contexts == [[1, 2], [1, 2, 3]]


def test_other_targets_continue_the_input():
    tokens, contexts = placed([1, 2], [5, 6, 7])
    assert tokens == [1, 2, 5, 6]
    assert contexts == [[1, 2], [1, 2, 5], [1, 2, 5, 6]]
    assert placed([1, 2, 3], [9])[1] == [[1, 2, 3]]


def test_equal_lengths_are_always_position_wise():
    assert placed([1, 2, 3], [1, 2, 3]) == ([1, 2, 3], [[1], [1, 2], [1, 2, 3]])


def test_the_context_holds_for_what_the_input_becomes():
    with pytest.raises(InvalidRequest, match="the model input has 9 tokens, and me/model's context window is 8"):
        placed([1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
