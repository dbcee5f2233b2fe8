"""From what an engine returned to what a future resolves to, and the records that come into being with it."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from msgspec import Struct

from tinkercloud.control.folders import CheckpointKind, checkpoint_path, sampler_folder
from tinkercloud.engine.results import Failure, LoadOutput, Result, SaveOutput
from tinkercloud.ledger.records import (
    CheckpointRecord,
    Entry,
    ExternalSaved,
    ModelCreated,
    ModelRecord,
    ModelUnloaded,
    Outcome,
    SamplerRecord,
    SamplerSaved,
    WeightsLoaded,
    WeightsSaved,
)


class StorageLimit(Struct, frozen=True):
    """What the key of a save allows its user to store, looked at again when it is written: many may be accepted before
    the first one is."""

    max_bytes: int
    key_hint: str


class SaveDetails(Struct, frozen=True, tag=True):
    """What an entry that saves a named checkpoint remembers beside its payload."""

    name: str
    kind: CheckpointKind
    overwrite: bool = False
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None
    limit: StorageLimit | None = None


class SamplerDetails(Struct, frozen=True, tag=True):
    """What an entry that makes an ephemeral sampler remembers."""

    sampler_id: str
    inflight: bool = False
    """Whether it shares the run's newest weights, instead of keeping its own."""


class LoadDetails(Struct, frozen=True, tag=True):
    """What an entry of kind load_weights remembers."""

    path: str
    pin: str = ""
    """The folder that it loads from, which is held for it."""


Details = SaveDetails | SamplerDetails | LoadDetails


def remember(details: Details) -> dict[str, Any]:
    """The form in which an entry keeps its details."""
    return msgspec.to_builtins(details)


def details_of(entry: Entry) -> Details | None:
    """The details that an entry was accepted with, None if its kind has none."""
    return msgspec.convert(entry.details, Details) if entry.details else None


def conclude(entry: Entry, model: ModelRecord, result: Result) -> tuple[Outcome, list]:
    """(the future's value, records to store together with it) for an operation of a training model."""
    now = time.time()
    match entry.kind, result, details_of(entry):
        case _, Failure(), _:
            return result, []
        case "create_model", _, _:
            return ModelCreated(model.model_id), []
        case _, SaveOutput(), SaveDetails() as details:  # in the folder that was chosen when it was accepted
            checkpoint = CheckpointRecord(
                path=checkpoint_path(model.model_id, details.kind, details.name),
                model_id=model.model_id,
                kind=details.kind,
                name=details.name,
                owner=model.owner,
                base_model=model.base_model,
                lora=model.lora,
                folder=result.folder,
                size_bytes=result.size_bytes,
                created_at=now,
                expires_at=None if details.ttl_seconds is None else now + details.ttl_seconds,
                user_metadata=details.user_metadata,
                optimizer=model.optimizer,
                base_fingerprint=model.base_fingerprint,
            )
            return _saved(checkpoint), [checkpoint]
        case "save_weights_for_sampler", SaveOutput(), SamplerDetails() as details:
            sampler = SamplerRecord(
                sampler_id=details.sampler_id,
                session_id=model.session_id,
                owner=model.owner,
                base_model=model.base_model,
                model_path=None,
                folder=sampler_folder(details.sampler_id),
                created_at=now,
                follows=model.model_id if details.inflight else None,
                version=entry.seq_id,
                base_fingerprint=model.base_fingerprint,
            )
            return SamplerSaved(sampling_session_id=details.sampler_id), [sampler]
        case "load_weights", LoadOutput(), LoadDetails() as details:
            return WeightsLoaded(path=details.path, model_id=model.model_id), []
        case "unload_model", _, _:
            return ModelUnloaded(model.model_id), []
        case _:
            return result, []


def _saved(checkpoint: CheckpointRecord) -> Outcome:
    match checkpoint.kind:
        case "training":
            return WeightsSaved(checkpoint.path)
        case "sampler":
            return SamplerSaved(checkpoint.path)
        case _:
            return ExternalSaved(checkpoint.path, checkpoint.size_bytes)
