"""What must hold of a forward_backward before it is run. Needs numpy only, so that whoever accepts one can ask too."""

from __future__ import annotations

import numpy as np

from tinkercloud.engine.losses import Loss, loss_config, loss_named
from tinkercloud.engine.types import BaseModelInfo, Datum, ForwardBackward, OperationError


def check_forward_backward(operation: ForwardBackward, info: BaseModelInfo) -> None:
    """OperationError says which datum is wrong and how, counting from 0."""
    loss = loss_named(operation.loss_fn)
    loss_config(loss, operation.loss_fn_config)
    if not operation.data:
        raise OperationError("data is empty; send at least one datum")
    for index, datum in enumerate(operation.data):
        problem = _problem_of(datum, loss, info)
        if problem:
            raise OperationError(f"datum {index}: {problem}")


def _problem_of(datum: Datum, loss: Loss, info: BaseModelInfo) -> str | None:
    tokens = datum.tokens
    if tokens.ndim != 1 or not 1 <= len(tokens) <= info.max_context:
        return f"the model input must have 1 to {info.max_context} tokens, not shape {list(tokens.shape)}"
    if problem := _range_problem("model input", tokens, info.vocab_size):
        return problem
    names = [wanted.name for wanted in loss.inputs]
    missing = [name for name in names if name not in datum.inputs]
    if missing:
        return f"{loss.name} needs {', '.join(names)}; missing: {', '.join(missing)}"
    targets = datum.inputs["target_tokens"]
    if targets.ndim not in ((1, 2) if loss.several_targets else (1,)) or targets.dtype.kind not in "iu":
        shapes = "[N] or [N, K]" if loss.several_targets else "[N]"
        return f"target_tokens of {loss.name} must be integers {shapes}, not {targets.dtype} {list(targets.shape)}"
    if not 1 <= len(targets) <= len(tokens) or targets.size == 0:
        return f"target_tokens has shape {list(targets.shape)} for {len(tokens)} input tokens"
    if problem := _range_problem("target_tokens", targets, info.vocab_size):
        return problem
    for name in names[1:]:
        values = datum.inputs[name]
        if values.shape != targets.shape or values.dtype.kind not in "fiu":
            return (
                f"{name} must be numbers of the shape of target_tokens, {list(targets.shape)}, "
                f"not {values.dtype} {list(values.shape)}"
            )
        if not np.isfinite(values).all():
            return f"{name} has NaN or infinite entries"
    return None


def _range_problem(name: str, tokens: np.ndarray, vocab_size: int) -> str | None:
    low, high = int(tokens.min()), int(tokens.max())
    if low >= 0 and high < vocab_size:
        return None
    return f"{name} has token id {low if low < 0 else high}; ids of this model are 0 to {vocab_size - 1}"
