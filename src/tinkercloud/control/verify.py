"""What is wrong in a data directory that no server has open, and what becomes of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from sqlalchemy import Connection

from tinkercloud.control.checkpoint_store import MANIFEST, CheckpointStore, StoreUnavailable, is_whole
from tinkercloud.control.folders import is_stored, key_of
from tinkercloud.control.inflight import newest_of
from tinkercloud.control.storage import named_folders, unnamed_folders
from tinkercloud.engine.checksums import damage
from tinkercloud.ledger import catalog, entries
from tinkercloud.ledger.records import (
    CatalogRecord,
    CheckpointRecord,
    SamplerRecord,
    SessionRecord,
    SnapshotRecord,
)
from tinkercloud.ledger.verify import damaged_blobs, database_damage, opened, used_segments

R = TypeVar("R", bound=CatalogRecord)

BACKUP = "restore it from a backup"


class Problem(NamedTuple):
    """One thing that is not as it was written."""

    what: str
    mend: str
    lost: bool = True
    """Whether something is gone that no server brings back by itself."""
    unseen: bool = False
    """Whether it was not looked at, so that nobody knows."""


def problems(data_dir: Path, url: str | None = None, store: CheckpointStore | None = None) -> list[Problem]:
    """Read everything in a data directory, and what its checkpoints are in a store, changing nothing. Raises `NoLedger`
    and `DataDirInUse`."""
    with opened(data_dir, url) as connection:
        return [
            *(Problem(f"ledger.db: {line}", BACKUP) for line in database_damage(connection)),
            *_blobs(connection, data_dir),
            *_snapshots(connection, data_dir),
            *_weights(connection, data_dir, store),
            *_left_over(connection, data_dir),
        ]


def _blobs(connection: Connection, data_dir: Path) -> Iterator[Problem]:
    for blob in damaged_blobs(connection, data_dir):
        if blob.replayed:
            mend = f"{BACKUP}; without it training run {blob.stream} may stop at its next recovery"
        else:
            mend = f"{BACKUP}; no run needs it, only whoever asks for this result"
        yield Problem(f"operation {blob.request_id}, {blob.what}", mend)


def _snapshots(connection: Connection, data_dir: Path) -> Iterator[Problem]:
    by_run: defaultdict[str, list[tuple[SnapshotRecord, str | None]]] = defaultdict(list)
    for snapshot in _all(connection, SnapshotRecord):
        by_run[snapshot.model_id].append((snapshot, damage(data_dir / snapshot.folder)))
    for model_id, snapshots in by_run.items():
        sound = any(wrong is None for _, wrong in snapshots)
        for snapshot, wrong in snapshots:
            if wrong is not None and sound:
                yield Problem(
                    f"{snapshot.folder}: {wrong}",
                    "nothing to do: the run's other snapshot and its log replace it",
                    False,
                )
            elif wrong is not None:
                mend = f"{BACKUP}, or go on from a checkpoint of {model_id}: no other snapshot of it can be read"
                yield Problem(f"{snapshot.folder}: {wrong}", mend)


def _weights(connection: Connection, data_dir: Path, store: CheckpointStore | None) -> Iterator[Problem]:
    """Checkpoints, samplers and pins."""
    folders = {checkpoint.folder: checkpoint.path for checkpoint in _all(connection, CheckpointRecord)}
    pending = set(entries.pending_streams(connection))
    for sampler in newest_of(_all(connection, SamplerRecord)):
        if sampler.model_path is None and not (data_dir / sampler.folder).is_dir():
            continue  # dropped to stay within ephemeral_sampler_bytes, as its clients are told
        session = catalog.get(connection, SessionRecord, (sampler.session_id,))
        is_live = session is not None and session.state != "finished"
        if sampler.folder and (is_live or sampler.sampler_id in pending):
            folders.setdefault(sampler.folder, f"sampler {sampler.sampler_id}")
    for load in entries.replayable(connection, "load_weights", None):
        if pin := load.details.get("pin"):
            folders[pin] = f"what operation {load.request_id} loads"
    for folder, name in folders.items():
        if is_stored(folder):
            yield from _stored(data_dir, folder, name, store)
        elif (wrong := damage(data_dir / folder)) is not None:
            yield Problem(f"{folder} ({name}): {wrong}", BACKUP)


def _stored(data_dir: Path, folder: str, name: str, store: CheckpointStore | None) -> Iterator[Problem]:
    """Of one checkpoint in a store. Its copy here is one: what the disk did to that, a new one mends."""
    copy = damage(data_dir / folder) if (data_dir / folder).is_dir() else "it is missing"
    if store is None:
        mend = "give --checkpoints-url, as the server has it"
        yield Problem(f"{key_of(folder)} ({name}): it lies in a store, which was not looked at", mend, False, True)
        return
    try:
        wrong = store.damage(key_of(folder))
    except StoreUnavailable as error:
        wrong = str(error)
    if wrong is not None:
        mend = (
            f"copy the files of {folder} there again, {MANIFEST} as the last, or restore it as the store can"
            if copy is None and (data_dir / folder / MANIFEST).is_file() and is_whole(data_dir / folder)
            else "restore it as the store can"
        )
        yield Problem(f"{key_of(folder)} ({name}): {wrong}", mend)
    elif copy not in (None, "it is missing"):
        yield Problem(f"{folder} ({name}): {copy}", f"remove {folder}: the store has it as it was", False)


def lacking(data_dir: Path) -> list[str]:
    """The files and folders that the ledger names and that are not there. Raises `NoLedger` and `DataDirInUse`."""
    with opened(data_dir) as connection:
        samplers = _all(connection, SamplerRecord)
        # Those of ephemeral samplers may go before their records.
        folders = _named(connection) - {sampler.folder for sampler in samplers if sampler.model_path is None}
        missing = [folder for folder in sorted(folders) if not (is_stored(folder) or (data_dir / folder).is_dir())]
        files = used_segments(connection, data_dir)
        return missing + [str(file.relative_to(data_dir)) for file in files if not file.is_file()]


def _named(connection: Connection) -> set[str]:
    return named_folders(
        _all(connection, SessionRecord),
        _all(connection, CheckpointRecord),
        _all(connection, SnapshotRecord),
        _all(connection, SamplerRecord),
        entries.replayable(connection, "load_weights", None),
        entries.pending_streams(connection),
    )


def _left_over(connection: Connection, data_dir: Path) -> Iterator[Problem]:
    sessions, named = _all(connection, SessionRecord), _named(connection)
    ours, others = unnamed_folders(data_dir, named, sessions)
    for folder in ours:
        yield Problem(f"{folder}: nothing names it", "nothing to do: the server removes it at its next start", False)
    for folder in others:
        mend = "remove it, unless another ledger's server uses this directory"
        yield Problem(f"{folder}: it is of no session of this ledger", mend, False)


def _all(connection: Connection, kind: type[R]) -> list[R]:
    return catalog.find(connection, kind, {}, None, 0)
