"""A decoded batch as the operation that an engine runs, judged against the base model and the loss before anything is
accepted.

Each refusal says which datum, what was wrong and what would be right.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import numpy as np

from tinkercloud.api.wire.arrays import Batch
from tinkercloud.control.stability import Records, joined
from tinkercloud.engine.base_model import BaseModelInfo
from tinkercloud.engine.custom_loss import CUSTOM, custom_loss_named, session_of
from tinkercloud.engine.losses import LOSSES, Loss, loss_named
from tinkercloud.engine.operations import Datum, ForwardBackward, OperationError
from tinkercloud.engine.validation import TARGETS, check_forward_backward, check_memory
from tinkercloud.errors import InvalidRequest

InputsOf = Callable[[int, Datum], dict[str, np.ndarray]]
"""(its place in the batch, a datum as it came) -> the inputs that its loss reads."""


def sequences_named(batch: Batch) -> set[str]:
    """Ids of the sampled sequences whose records the batch's loss needs."""
    loss = LOSSES.get(batch.loss_fn)
    if loss is None or not loss.needs_records:
        return set()
    return {name for provenance in batch.provenance if provenance for name in provenance.sequence_ids}


def operation_from(
    batch: Batch,
    model_id: str,
    forward_only: bool,
    info: BaseModelInfo,
    align_targets: bool,
    session_id: str = "",
    records: Records = MappingProxyType({}),
) -> ForwardBackward:
    """The operation. Raises InvalidRequest.

    `align_targets`: place targets of another length than the input, as `tinker_gmi`'s users write them.
    `session_id`: the training run's; custom losses of other sessions are refused.
    `records`: of the sequences that are named.
    """
    try:
        if batch.loss_fn == CUSTOM:
            inputs_of = _custom_inputs(batch, session_id)
        else:
            inputs_of = _inputs(loss_named(batch.loss_fn), batch, records)
        operation = ForwardBackward(
            model_id=model_id,
            data=tuple(_datum(i, datum, inputs_of, align_targets) for i, datum in enumerate(batch.data)),
            loss_fn=batch.loss_fn,
            loss_fn_config=batch.loss_fn_config,
            forward_only=forward_only,
        )
        check_forward_backward(operation, info)
        check_memory(operation, info)
    except OperationError as error:
        raise InvalidRequest(str(error)) from None
    return operation


def _inputs(loss: Loss, batch: Batch, records: Records) -> InputsOf:
    def inputs_of(index: int, datum: Datum) -> dict[str, np.ndarray]:
        where = f"datum {index}"
        _need(loss.name, loss.required, datum, where)
        if extra := [name for name in datum.inputs if name not in loss.allowed]:
            raise InvalidRequest(
                f"{where}: {loss.name} does not read {', '.join(extra)}; its loss_fn_inputs are "
                f"{', '.join(loss.required)}"
            )
        sent = [wanted for wanted in loss.inputs if wanted.origin == "client"]
        inputs = {wanted.name: _typed(datum, wanted.name, wanted.dtype, where) for wanted in sent}
        if not loss.needs_records:
            return inputs
        try:
            return joined(Datum(datum.tokens, inputs), batch.provenance[index], records).inputs
        except InvalidRequest as error:
            raise InvalidRequest(f"{where}: {error}") from None

    return inputs_of


def _custom_inputs(batch: Batch, session_id: str) -> InputsOf:
    """Inputs that a custom loss does not read are left out: the client that runs it itself does the same."""
    loss = custom_loss_named(batch.loss_fn_config)
    if session_of(str(batch.loss_fn_config["loss_id"])) != session_id:
        raise InvalidRequest(f"custom loss {loss.name!r} is another session's; create it in the one that uses it")

    def inputs_of(index: int, datum: Datum) -> dict[str, np.ndarray]:
        where = f"datum {index}"
        _need(CUSTOM, loss.reads, datum, where)
        inputs = {name: datum.inputs[name] for name in loss.reads}
        return inputs | {TARGETS: _typed(datum, TARGETS, "int64", where)}

    return inputs_of


def _need(loss: str, names: list[str], datum: Datum, where: str) -> None:
    if missing := [name for name in names if name not in datum.inputs]:
        raise InvalidRequest(f"{where}: {loss} needs {', '.join(missing)} in loss_fn_inputs")


def _typed(datum: Datum, name: str, dtype: str, where: str) -> np.ndarray:
    values = datum.inputs[name]
    if values.dtype.kind != np.dtype(dtype).kind:
        raise InvalidRequest(f"{where}, {name}: dtype is {values.dtype.name}; it must be {dtype}")
    return values.astype(dtype, copy=False)


def _datum(index: int, datum: Datum, inputs_of: InputsOf, align_targets: bool) -> Datum:
    """The datum with exactly the loss's inputs, in their dtypes, and targets that fit the tokens."""
    inputs = inputs_of(index, datum)
    targets = inputs[TARGETS]
    if len(targets) == len(datum.tokens):
        return Datum(tokens=datum.tokens, inputs=inputs)
    if align_targets and len(datum.tokens) and len(targets) and targets.ndim == 1:
        return Datum(tokens=_tokens_before(datum.tokens, targets), inputs=inputs)
    raise InvalidRequest(
        f"datum {index}: model_input has {len(datum.tokens)} tokens and target_tokens {len(targets)}; they must be "
        "equally many, since position i predicts target i"
    )


def _tokens_before(tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The input that makes each target the next token at one of the *last* positions: the targets are the input's last
    tokens, or else they continue it."""
    if len(targets) < len(tokens) and np.array_equal(tokens[-len(targets) :], targets):
        return tokens[:-1]
    return np.concatenate([tokens, targets[:-1].astype(np.int32)])
