"""What a future resolved to, in the form that the client asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import Response

from tinkercloud.api.wire.answers import Json
from tinkercloud.api.wire.body import PROTOBUF
from tinkercloud.api.wire.protobuf import encode_loss, encode_sample
from tinkercloud.engine.operations import Matrix
from tinkercloud.engine.results import Failure, LossOutput, SampleOutput, StepOutput, TopLogprobs
from tinkercloud.ledger.records import (
    ExternalSaved,
    ModelCreated,
    ModelUnloaded,
    Outcome,
    SamplerSaved,
    WeightsLoaded,
    WeightsSaved,
)

MASK_LOGPROB = -99999.0
"""The SDK's log-probability of a position that has no distribution."""


def answer(outcome: Outcome, protobuf: bool) -> Response:
    """A result as protobuf, if the client takes it and the kind has such a form, else as JSON."""
    if protobuf and isinstance(outcome, LossOutput):
        return Response(encode_loss(outcome), media_type=PROTOBUF)
    if protobuf and isinstance(outcome, SampleOutput):
        return Response(encode_sample(outcome), media_type=PROTOBUF)
    return Json(as_json(outcome))


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The SDK's JSON of each result."""
    match outcome:
        case Failure(error=error, category=category):
            return {"error": error, "category": category}
        case LossOutput():
            return _loss_json(outcome)
        case SampleOutput():
            return _sample_json(outcome)
        case StepOutput(metrics=metrics):
            return {"type": "optim_step", "metrics": metrics}
        case ModelCreated(model_id=model_id):
            return {"type": "create_model", "model_id": model_id}
        case ModelUnloaded(model_id=model_id):
            return {"type": "unload_model", "model_id": model_id}
        case WeightsSaved(path=path):
            return {"type": "save_weights", "path": path}
        case ExternalSaved(path=path, size_bytes=size):
            return {"type": "save_weights_external", "path": path, "size_bytes": size}
        case WeightsLoaded(path=path, model_id=model_id):
            return {"type": "load_weights", "path": path, "model_id": model_id}
        case SamplerSaved(path=path, sampling_session_id=sampler_id):
            given = {"path": path, "sampling_session_id": sampler_id}
            return {"type": "save_weights_for_sampler"} | {key: value for key, value in given.items() if value}
    raise TypeError(f"{type(outcome).__name__} has no JSON form")


def _loss_json(output: LossOutput) -> dict[str, Any]:
    return {
        "type": "forward_backward",
        "loss_fn_output_type": output.output_type,
        "loss_fn_outputs": [{name: _tensor_json(array) for name, array in datum.items()} for datum in output.outputs],
        "metrics": output.metrics,
    }


def _tensor_json(array: np.ndarray) -> dict[str, Any]:
    dtype = "float32" if array.dtype.kind == "f" else "int64"
    return {"data": array.ravel().tolist(), "dtype": dtype, "shape": list(array.shape)}


def _sample_json(output: SampleOutput) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "type": "sample",
        "sequences": [
            {
                "stop_reason": sequence.stop_reason,
                "tokens": sequence.tokens.tolist(),
                "logprobs": sequence.logprobs.tolist(),
            }
            | ({"topk_logprobs": _top_json(sequence.top_logprobs)} if sequence.top_logprobs is not None else {})
            for sequence in output.sequences
        ],
        "prompt_cache_hit_tokens": output.prompt_cache_hit_tokens,
    }
    if output.prompt_logprobs is not None:
        answer["prompt_logprobs"] = [None if value != value else value for value in output.prompt_logprobs.tolist()]
    if output.prompt_top_logprobs is not None:
        answer["topk_prompt_logprobs"] = _top_json(output.prompt_top_logprobs)
    if output.target_prompt_logprobs is not None:
        answer["target_prompt_logprobs"] = _matrix_json(output.target_prompt_logprobs)
    if output.prompt_alt_tokens is not None:
        alternatives = output.prompt_alt_tokens
        answer["prompt_alt_tokens"] = {
            "tokens": _tensor_json(alternatives.token_ids),
            "logprobs": _tensor_json(alternatives.logprobs),
        }
    return answer


def _matrix_json(matrix: Matrix) -> dict[str, Any]:
    answer = _tensor_json(matrix.values) | {"shape": list(matrix.shape)}
    if matrix.row_ends is not None and matrix.columns is not None:
        answer["sparse_crow_indices"] = matrix.row_ends.tolist()
        answer["sparse_col_indices"] = matrix.columns.tolist()
    return answer


def _top_json(top: TopLogprobs) -> list[list[tuple[int, float]] | None]:
    rows = zip(top.token_ids.tolist(), top.logprobs.tolist(), strict=True)
    pairs = [[pair for pair in zip(ids, values, strict=True) if pair != (0, MASK_LOGPROB)] for ids, values in rows]
    return [row or None for row in pairs]
