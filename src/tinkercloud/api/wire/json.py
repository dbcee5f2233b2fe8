"""The forms of the JSON requests, permissive: a field that a newer SDK adds is logged once and ignored.

A field of an *option set* (how to sample, how to step, which adapter) is another matter: ignoring it would give numbers
that the sender did not ask for, so an unknown one with a value that means something is an error that names it.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from tinkercloud.api.wire.limits import Metadata, Name, Tags, Text, TextMetadata

log = logging.getLogger(__name__)

Seq = Annotated[int, Field(ge=0, lt=2**62)]
"""A number in a sequence, as the ledger can store it and count on from it."""

_logged: set[tuple[str, str]] = set()


class Wire(BaseModel):
    """A JSON object of a request."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="after")
    def _notice_unknown(self) -> Wire:
        for name, value in (self.model_extra or {}).items():
            self._unknown(name, value)
        return self

    def _unknown(self, name: str, value: Any) -> None:
        if name != "type" and (key := (type(self).__name__, name)) not in _logged and len(_logged) < 1000:
            _logged.add(key)
            log.info("ignored: %s has a field %.80r that this server does not know", *key)


class Options(Wire):
    """A JSON object whose every field changes the numbers."""

    def _unknown(self, name: str, value: Any) -> None:
        if name != "type" and value not in (None, False, 0, "", [], {}):
            known = ", ".join(sorted(type(self).model_fields))
            raise ValueError(f"this server has no option {name!r} (it is {value!r:.80}); there are {known}")
        super()._unknown(name, value)


# ---------------------------------------------------------------- the service


class ClientConfig(Wire):
    sdk_version: str = ""


class CreateSession(Wire):
    tags: Tags = []
    user_metadata: Metadata | None = None
    sdk_version: Name = ""
    project_id: Name | None = None
    display_name: Name | None = None


class SessionHeartbeat(Wire):
    session_id: str


class FinishReason(Wire):
    type: Literal["success", "errored", "interrupted"]


class FinishSession(Wire):
    reason: FinishReason
    detail: Text | None = None


class AssignProject(Wire):
    project_id: Name = Field(min_length=1)


class SearchOwner(Wire):
    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] | None = Field(default=None, max_length=10)
    """Of type user."""


class StatusQuery(Wire):
    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[Literal["success", "errored", "interrupted"]] | None = None


class SearchCursor(Wire):
    last_created_at: AwareDatetime
    last_session_id: str


class SearchSessions(Wire):
    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: str | None = Field(default=None, min_length=1)
    owner: SearchOwner = SearchOwner()
    statuses: list[StatusQuery] | None = Field(default=None, min_length=1)
    limit: int = Field(default=50, ge=1, le=200)
    cursor: SearchCursor | None = None


# ---------------------------------------------------------------- training


class Lora(Options):
    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(Options):
    type: str = "adamw"
    version: int | None = None
    """Dimuon's; adamw has none."""


class CreateModel(Wire):
    session_id: str
    model_seq_id: Seq
    base_model: str
    user_metadata: Metadata | None = None
    lora_config: Lora | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()


class ModelAddress(Wire):
    """get_info and unload_model."""

    model_id: str


class Address(BaseModel):
    """Whose operation a request is, read before the rest of it is judged."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model_id: str
    seq_id: Seq | None = None


class Chunk(Wire):
    """A piece of a prompt. Only encoded_text is served; the rest is declared to be refused by name."""

    type: str = "encoded_text"
    tokens: list[Any] = []
    data: Any = None
    dmel: Any = None
    format: str | None = None
    location: str | None = None
    expected_tokens: int | None = None


class ModelInput(Wire):
    chunks: list[Chunk]


class TensorData(Wire):
    data: list[Any]
    dtype: Literal["int64", "float32"]
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class SpanPlace(Wire):
    sequence_id: str
    offset: int = 0
    length: int


class Span(Wire):
    """Where a run of a datum's tokens came from: one of the two, as in protobuf (no SDK writes spans in JSON)."""

    prompt_tokens: SpanPlace | None = None
    sampled_tokens: SpanPlace | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Span:
        if (self.prompt_tokens is None) == (self.sampled_tokens is None):
            raise ValueError("a span has either prompt_tokens or sampled_tokens")
        return self


class Datum(Wire):
    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData]
    model_input_spans: list[Span] | None = None
    loss_fn_input_spans: list[Span] | None = None


class ForwardBackwardInput(Wire):
    data: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None = None


class ForwardBackward(Wire):
    model_id: str
    seq_id: Seq | None = None
    forward_backward_input: ForwardBackwardInput
    forward_only: bool = False


class Forward(Wire):
    model_id: str
    seq_id: Seq | None = None
    forward_input: ForwardBackwardInput


class CustomLossGraph(Wire):
    format: Literal[1] = 1
    nodes: list[dict[str, Any]]


class CreateCustomLoss(Wire):
    session_id: str
    custom_loss_seq_id: Seq
    """Not needed: the same loss has the same id, whichever it was."""
    name: str
    inputs: list[dict[str, Any]]
    graph: CustomLossGraph


Decay = Annotated[float, Field(ge=0, lt=1)]
Size = Annotated[float, Field(ge=0, le=3.4028234663852886e38)]
"""Not negative, and a float32."""


class Adam(Options):
    type: Literal["adamw"] = "adamw"
    learning_rate: Size = 1e-4
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: Size = 1e-12
    weight_decay: Size = 0.0
    grad_clip_norm: Size = 0.0


class Dimuon(Options):
    model_config = ConfigDict(extra="forbid")

    type: Literal["dimuon"] = "dimuon"
    learning_rate: Size
    beta1: Decay = 0.9
    grad_clip_norm: float = 0.0
    """0 and below is off."""


AnyParams = Annotated[Adam | Dimuon, Field(discriminator="type")]


class OptimStep(Wire):
    model_id: str
    seq_id: Seq | None = None
    adam_params: Adam | None = None
    optim_params: Adam | None = None
    optimizer_params: AnyParams | None = None
    """By its `type`; adam_params has none."""


# ---------------------------------------------------------------- weights


class SaveWeights(Wire):
    model_id: str
    path: str | None = None
    seq_id: Seq | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: TextMetadata | None = None


class SaveWeightsForSampler(Wire):
    model_id: str
    path: str | None = None
    sampling_session_seq_id: Seq | None = None
    kind: str = "snapshot"
    seq_id: Seq | None = None
    ttl_seconds: int | None = None
    user_metadata: TextMetadata | None = None


class SaveWeightsExternal(Wire):
    model_id: str
    path: str
    seq_id: Seq | None = None
    ttl_seconds: int | None = None
    age_encryption_recipients: list[str] | None = None


class LoadWeights(Wire):
    model_id: str | None = None
    seq_id: Seq | None = None
    session_id: str | None = None
    model_seq_id: Seq | None = None
    base_model: str | None = None
    user_metadata: Metadata | None = None
    path: str
    optimizer: bool = False
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: str | None = None


class WeightsInfo(Wire):
    tinker_path: str


class CopyWeights(Wire):
    source_path: str
    ttl_seconds: int | None = None
    destination_project_id: Name | None = Field(default=None, min_length=1)
    session_id: str | None = None
    model_seq_id: Seq | None = None
    weights_access_token: str | None = None


class SetTtl(Wire):
    ttl_seconds: int | None


# ---------------------------------------------------------------- sampling


class CreateSamplingSession(Wire):
    session_id: str
    sampling_session_seq_id: Seq
    base_model: str | None = None
    model_path: str | None = None


class JoinSamplingSession(Wire):
    sampling_session_id: str


class SamplingParams(Options):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Sample(Options):
    num_samples: int = 1
    prompt: ModelInput
    sampling_params: SamplingParams = SamplingParams()
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: str | None = None
    seq_id: Seq | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None


# ---------------------------------------------------------------- futures


class RetrieveFuture(Wire):
    request_id: str
    allow_metadata_only: bool = False


class SamplingSessionTarget(Wire):
    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: Seq = 0


class RetrieveFutures(Wire):
    target: SamplingSessionTarget
    prev_cursor: Seq = 0
    timeout: float | None = None
    retrieved_request_ids: list[str] = []


class CancelFuture(Wire):
    request_id: str


# ---------------------------------------------------------------- administration


class AddModel(Wire):
    """One base model as the configuration has it; any of its settings may be given too."""

    name: str
    source: str = ""
    lazy: bool = False


class ImportCheckpoint(Wire):
    folder: str
    name: str
    base_model: str | None = None
