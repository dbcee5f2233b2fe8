"""What must hold of a forward_backward before it is run. Needs numpy only, so that whoever accepts one can ask too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from tinkercloud.engine.base_model import BaseModelInfo
from tinkercloud.engine.custom_loss import CUSTOM, CustomLoss, custom_loss_named
from tinkercloud.engine.losses import Loss, loss_config, loss_named
from tinkercloud.engine.operations import Datum, ForwardBackward, OperationError

TARGETS = "target_tokens"


def check_forward_backward(operation: ForwardBackward, info: BaseModelInfo) -> None:
    """OperationError says which datum is wrong and how, counting from 0."""
    problem_of_inputs: Callable[[Datum], str | None]
    if operation.loss_fn == CUSTOM:
        custom = custom_loss_named(operation.loss_fn_config)
        names = custom.reads
        several, problem_of_inputs = True, partial(_problem_of_custom_inputs, custom)
    else:
        loss = loss_named(operation.loss_fn)
        loss_config(loss, operation.loss_fn_config)
        names = [wanted.name for wanted in loss.inputs]
        several, problem_of_inputs = loss.several_targets, partial(_problem_of_inputs, loss)
    if not operation.data:
        raise OperationError("data is empty; send at least one datum")
    for index, datum in enumerate(operation.data):
        problem = _problem_of(datum, operation.loss_fn, names, several, info) or problem_of_inputs(datum)
        if problem:
            raise OperationError(f"datum {index}: {problem}")


def check_memory(operation: ForwardBackward, info: BaseModelInfo) -> None:
    """OperationError, with the numbers, names a datum that would not fit into memory.

    To be asked when an operation is accepted, not when it is run again: the limit may be another by then.
    """
    memory = info.activations
    if memory is None:
        return
    backward = not operation.forward_only
    what, anyway = ("backward", " even if layers are run again") if backward else ("forward", "")
    for index, datum in enumerate(operation.data):
        needed = memory.needed(datum.num_tokens, backward=backward)
        if needed > memory.budget:
            raise OperationError(
                f"datum {index}: the {what} pass of {datum.num_tokens} tokens needs {needed:,} bytes on {info.name}"
                f"{anyway}, and the server gives it {memory.budget:,} (activation_bytes); at most "
                f"{memory.budget * datum.num_tokens // needed} tokens fit"
            )


def _problem_of(datum: Datum, loss: str, names: list[str], several: bool, info: BaseModelInfo) -> str | None:
    """Of its tokens and targets."""
    tokens = datum.tokens
    if tokens.ndim != 1:
        return f"the model input must be a row of tokens, not of shape {list(tokens.shape)}"
    if not len(tokens):
        return "the model input is empty; send at least one token"
    if len(tokens) > info.max_context:
        return (
            f"the model input has {len(tokens)} tokens, and {info.name}'s context window is {info.max_context}; "
            "send a shorter one"
        )
    if problem := _range_problem("model input", tokens, info.vocab_size):
        return problem
    missing = [name for name in names if name not in datum.inputs]
    if missing:
        return f"{loss} needs {', '.join(names)}; missing: {', '.join(missing)}"
    targets = datum.inputs[TARGETS]
    if targets.ndim not in ((1, 2) if several else (1,)) or targets.dtype.kind not in "iu":
        shapes = "[N] or [N, K]" if several else "[N]"
        return f"target_tokens of {loss} must be integers {shapes}, not {targets.dtype} {list(targets.shape)}"
    if not 1 <= len(targets) <= len(tokens) or targets.size == 0:
        return f"target_tokens has shape {list(targets.shape)} for {len(tokens)} input tokens"
    return _range_problem(TARGETS, targets, info.vocab_size)


def _problem_of_inputs(loss: Loss, datum: Datum) -> str | None:
    targets = datum.inputs[TARGETS]
    for wanted in loss.inputs[1:]:
        values = datum.inputs[wanted.name]
        if values.shape != targets.shape or values.dtype.kind not in "fiu":
            return (
                f"{wanted.name} must be numbers of the shape of target_tokens, {list(targets.shape)}, "
                f"not {values.dtype} {list(values.shape)}"
            )
        if not np.isfinite(values).all():
            return f"{wanted.name} has NaN or infinite entries"
    return None


def _problem_of_custom_inputs(loss: CustomLoss, datum: Datum) -> str | None:
    for wanted in loss.inputs:
        values = datum.inputs[TARGETS if wanted.name == "logprobs" else wanted.name]
        if values.ndim != wanted.rank:
            return f"{wanted.name} has rank {values.ndim}; custom loss {loss.name!r} declares {wanted.rank}"
        if not np.isfinite(values).all():
            return f"{wanted.name} has NaN or infinite entries"
    return None


def _range_problem(name: str, tokens: np.ndarray, vocab_size: int) -> str | None:
    low, high = int(tokens.min()), int(tokens.max())
    if low >= 0 and high < vocab_size:
        return None
    return f"{name} has token id {low if low < 0 else high}; ids of this model are 0 to {vocab_size - 1}"
