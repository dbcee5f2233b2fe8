"""A decoded batch as the operation that an engine runs, judged against the base model and the loss before anything is
accepted.

Each refusal says which datum, what was wrong and what would be right.
"""

from __future__ import annotations

import numpy as np

from tinkercloud.api.wire.arrays import Batch
from tinkercloud.engine.losses import Loss, loss_named
from tinkercloud.engine.types import BaseModelInfo, Datum, ForwardBackward, OperationError
from tinkercloud.engine.validation import check_forward_backward
from tinkercloud.errors import InvalidRequest

TARGETS = "target_tokens"


def operation_from(
    batch: Batch, model_id: str, forward_only: bool, info: BaseModelInfo, align_targets: bool
) -> ForwardBackward:
    """The operation. Raises InvalidRequest.

    `align_targets`: place targets of another length than the input, as `tinker_gmi`'s users write them.
    """
    try:
        loss = loss_named(batch.loss_fn)
        operation = ForwardBackward(
            model_id=model_id,
            data=tuple(_datum(datum, loss, align_targets, f"datum {i}") for i, datum in enumerate(batch.data)),
            loss_fn=batch.loss_fn,
            loss_fn_config=batch.loss_fn_config,
            forward_only=forward_only,
        )
        check_forward_backward(operation, info)
    except OperationError as error:
        raise InvalidRequest(str(error)) from None
    return operation


def _datum(datum: Datum, loss: Loss, align_targets: bool, where: str) -> Datum:
    """The datum with exactly the loss's inputs, in their dtypes, and targets that fit the tokens."""
    names = [wanted.name for wanted in loss.inputs]
    if missing := [name for name in names if name not in datum.inputs]:
        raise InvalidRequest(f"{where}: {loss.name} needs {', '.join(missing)} in loss_fn_inputs")
    if extra := [name for name in datum.inputs if name not in names]:
        raise InvalidRequest(
            f"{where}: {loss.name} does not read {', '.join(extra)}; its loss_fn_inputs are {', '.join(names)}"
        )
    inputs = {}
    for wanted in loss.inputs:
        values = datum.inputs[wanted.name]
        if values.dtype.kind != np.dtype(wanted.dtype).kind:
            raise InvalidRequest(f"{where}, {wanted.name}: dtype is {values.dtype.name}; it must be {wanted.dtype}")
        inputs[wanted.name] = values.astype(wanted.dtype, copy=False)
    targets = inputs[TARGETS]
    if len(targets) == len(datum.tokens):
        return Datum(tokens=datum.tokens, inputs=inputs)
    if align_targets and len(datum.tokens) and len(targets) and targets.ndim == 1:
        return Datum(tokens=_tokens_before(datum.tokens, targets), inputs=inputs)
    raise InvalidRequest(
        f"{where}: model_input has {len(datum.tokens)} tokens and target_tokens {len(targets)}; they must be equally "
        "many, since position i predicts target i"
    )


def _tokens_before(tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The input that makes each target the next token at one of the *last* positions: the targets are the input's last
    tokens, or else they continue it."""
    if len(targets) < len(tokens) and np.array_equal(tokens[-len(targets) :], targets):
        return tokens[:-1]
    return np.concatenate([tokens, targets[:-1].astype(np.int32)])
