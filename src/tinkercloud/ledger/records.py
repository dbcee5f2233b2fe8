"""The ledger's records as the rest of the server sees them: plain, immutable, without SQL.

Times are seconds since the epoch (float, UTC).
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from tinkercloud.engine.operations import LoraConfig, OptimizerFamily
from tinkercloud.engine.results import Failure, LossOutput, SampleOutput, StepOutput


class SessionRecord(Struct, frozen=True):
    session_id: str
    owner: str
    created_at: float
    last_heartbeat: float
    state: Literal["active", "parked", "finished"]
    """parked: no heartbeat for a while; its models' state is on disk and comes back with the next request."""
    sdk_version: str = ""
    tags: tuple[str, ...] = ()
    user_metadata: dict[str, Any] = {}
    display_name: str | None = None
    project_id: str | None = None
    finish_reason: str | None = None
    """As the client gave it: success, errored or interrupted."""
    finish_detail: str | None = None
    """What the client said beside it."""


class ModelRecord(Struct, frozen=True):
    """A training run: one adapter and its log of operations."""

    model_id: str
    session_id: str
    model_seq_id: int
    owner: str
    base_model: str
    lora: LoraConfig
    created_at: float
    last_request_at: float
    state: Literal["live", "unloaded"]
    applied_seq: int
    """The newest seq_id whose operation has ended; -1 before the first."""
    user_metadata: dict[str, Any] = {}
    optimizer: OptimizerFamily = "adamw"
    base_fingerprint: str = ""
    """Of the weights that `base_model` stood for (`BaseModelInfo.fingerprint`); "" is not known."""


class SamplerRecord(Struct, frozen=True):
    """A sampling session: weights that samples are drawn from, and that never change unless it `follows` a run."""

    sampler_id: str
    session_id: str
    owner: str
    base_model: str
    model_path: str | None
    """The tinker:// path that it was made from; None for a base model or an ephemeral save."""
    folder: str
    """The weights' folder, relative to the data directory; "" for the base model's own."""
    created_at: float
    clients: int = 1
    """How many clients have joined; the next one gets this number as its counter."""
    follows: str | None = None
    """The training run whose inflight samplers all sample from the newest weights that were saved for one of them."""
    version: int = 0
    """seq_id of the save that an inflight sampler was made by: the newest has the highest."""
    base_fingerprint: str = ""
    """As of a `ModelRecord`."""


class CheckpointRecord(Struct, frozen=True):
    path: str
    """tinker://<model_id>/<weights|sampler_weights|external_weights>/<name>"""
    model_id: str
    kind: Literal["training", "sampler", "external"]
    name: str
    owner: str
    base_model: str
    lora: LoraConfig
    folder: str
    """Relative to the data directory."""
    size_bytes: int
    created_at: float
    expires_at: float | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    optimizer: OptimizerFamily = "adamw"
    """Of the run that it was saved from."""
    base_fingerprint: str = ""
    """As of a `ModelRecord`."""


class SnapshotRecord(Struct, frozen=True):
    """A model's whole state (adapter, moments, accumulated gradients) after one operation of its log."""

    model_id: str
    seq_id: int
    folder: str
    """Relative to the data directory."""
    created_at: float


UsageKind = Literal["train", "prefill", "cached", "sample"]
"""train: of forward and backward passes; prefill: of prompts; cached: of prompts, remembered from earlier ones;
sample: drawn."""


class Usage(Struct, frozen=True):
    """Tokens that were computed for an owner in one hour (UTC)."""

    owner: str
    hour: int
    """When it began; a multiple of 3600."""
    session_id: str
    model_id: str
    """The training run or sampler."""
    kind: UsageKind
    base_model: str
    tokens: int


class KeyRecord(Struct, frozen=True):
    """An API key; what the key itself is, only its user knows."""

    key_id: int
    digest: str
    hint: str
    """The key's first characters."""
    owner: str
    """The user whose everything is that is made with it."""
    name: str
    is_operator: bool
    """Whether it may administer the server."""
    created_at: float
    project_id: str | None = None
    """The only project that it may make sessions in."""
    expires_at: float | None = None
    revoked_at: float | None = None
    max_models: int | None = None
    """Training runs that its owner may have in sessions that are alive."""
    max_storage_bytes: int | None = None
    """Bytes of its owner's checkpoints."""
    max_daily_tokens: int | None = None
    """Tokens, of every kind, that its owner may use in a day (UTC)."""


AuditResource = Literal["checkpoints", "projects", "teams", "organizations"]
"""What the SDK's `get_audit_log` tells events apart by; keys and what else is the server's are the organization's."""


class AuditRecord(Struct, frozen=True):
    """Something that somebody did."""

    at: float
    actor: str
    """The user, or the operating system's, of a command on the server's machine."""
    key_id: int | None
    event: str
    """`<resource>_<action>`, as in the SDK's `AuditLogEntry`."""
    resource: AuditResource
    details: dict[str, Any] = {}


CatalogRecord = SessionRecord | ModelRecord | SamplerRecord | CheckpointRecord | SnapshotRecord


class Entry(Struct, frozen=True):
    """One accepted (or refused) operation."""

    request_id: str
    stream: str
    """The model or sampler whose log this is."""
    seq_id: int
    kind: str
    """The wire's name for the operation: create_model, forward_backward, optim_step, save_weights, sample, ..."""
    state: Literal["accepted", "refused", "done", "failed"]
    """refused: rejected on arrival, uses up its seq_id; failed: accepted, then ended with a `Failure`."""
    num_tokens: int
    created_at: float
    repeated: bool = False
    """This submission was a repeat; the entry is the first one's."""
    completion: int = 0
    """Position in the order of completion over the whole ledger; 0 until it has ended."""
    result_bytes: int = 0
    """Size of the stored outcome; 0 until it has ended."""
    expired: bool = False
    """Its payload and outcome are past their retention and gone."""
    cleared_gradients: bool = False
    """It failed and the model's accumulated gradients were cleared with it; a replay must clear them here too."""
    build: str | None = None
    """What computed its outcome (`BaseModelInfo.build`), where that is known."""
    details: dict[str, Any] = {}
    """Small facts that its acceptance fixed, as `append` got them."""


# ---------------------------------------------------------------- outcomes: what a future resolves to


class ModelCreated(Struct, frozen=True, tag="model_created"):
    model_id: str


class WeightsSaved(Struct, frozen=True, tag="weights_saved"):
    path: str


class SamplerSaved(Struct, frozen=True, tag="sampler_saved"):
    """Either a named sampler checkpoint's path or an ephemeral sampler's id."""

    path: str | None = None
    sampling_session_id: str | None = None


class ExternalSaved(Struct, frozen=True, tag="external_saved"):
    path: str
    size_bytes: int


class WeightsLoaded(Struct, frozen=True, tag="weights_loaded"):
    path: str
    model_id: str


class ModelUnloaded(Struct, frozen=True, tag="model_unloaded"):
    model_id: str


Outcome = (
    LossOutput
    | StepOutput
    | SampleOutput
    | ModelCreated
    | WeightsSaved
    | SamplerSaved
    | ExternalSaved
    | WeightsLoaded
    | ModelUnloaded
    | Failure
)
