"""Copies of a data directory: made beside a running server, and brought back.

A backup is a data directory itself, with its ledger in SQLite whatever the server's database is, so `tinkercloud fsck`
verifies one, and a server can be started on one. Files come before the record that names them and go after it. So the
files are taken first, then the database, then what has come between; and what went between although the database names
it, which takes two snapshots of one run within a moment, is a reason to begin again.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinkercloud.control.folders import KEPT_TREES
from tinkercloud.control.model_memory import FILE as MODELS_FILE
from tinkercloud.control.verify import lacking
from tinkercloud.ledger import database
from tinkercloud.ledger.backup import copy_database, copy_segments
from tinkercloud.ledger.files import link_files, sync
from tinkercloud.ledger.lock import FILE as LOCK_FILE

ATTEMPTS = 3

SEGMENTS = "segments"


class BackupError(Exception):
    """There is nothing to copy, or no place for it; the text says what would be right."""


def back_up(data_dir: Path, url: str | None, target: Path) -> None:
    """Copy a data directory to `target`, which must not be there. Raises BackupError and `UnusableDatabase`.

    Weights are hard links where the file system allows it: they take no space until the original goes. Checkpoints in a
    store stay there, and are not in the copy.
    """
    if not (data_dir / SEGMENTS).is_dir():
        raise BackupError(f"{data_dir} is no data directory of a server: give one with --data-dir")
    for _ in range(ATTEMPTS):
        with _appearing(target) as draft:
            _copy_files(data_dir, draft)
            now = time.time()
            with database.opening(source := database.address_in(data_dir, url)):
                copy_database(source, database.address_in(draft, None))
            _copy_files(data_dir, draft)
            (draft / LOCK_FILE).touch()
            os.utime(draft / LOCK_FILE, (now, now))  # until then clients could be heard of
            missing = lacking(draft)
            if not missing:
                return
            shutil.rmtree(draft)
    raise BackupError(f"{missing[0]} went while it was copied, {ATTEMPTS} times in a row; try again later")


def restore(backup: Path, data_dir: Path, url: str | None) -> None:
    """Make a data directory of a backup, with its ledger in the empty database at `url` or in SQLite.

    `data_dir` must not be there, or be empty. Raises BackupError, `NotEmpty` and `UnusableDatabase`.
    """
    if not (backup / database.DATABASE_FILE).is_file():
        raise BackupError(f"{backup} is no backup: it has no {database.DATABASE_FILE}")
    if data_dir.exists():
        if not data_dir.is_dir() or any(data_dir.iterdir()):
            raise BackupError(f"{data_dir} is not empty; restore to a new --data-dir")
        data_dir.rmdir()
    with _appearing(data_dir) as draft:
        _copy_files(backup, draft)
        address = database.address_in(draft, url)
        with database.opening(address):
            copy_database(database.address_in(backup, None), address)
        if (backup / LOCK_FILE).exists():
            shutil.copy2(backup / LOCK_FILE, draft / LOCK_FILE)  # its time, and what it says of it


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place if it is still there at the end, whole or not at all."""
    if target.exists():
        raise BackupError(f"{target} is there already; give another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.draft")
    draft.mkdir(mode=0o700)
    try:
        yield draft
        if draft.exists():
            sync(draft)
            draft.rename(target)
            sync(target.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _copy_files(source: Path, target: Path) -> None:
    """Everything but the database; what is there already stays, but for files that grow or change."""
    copy_segments(source / SEGMENTS, target / SEGMENTS)
    for tree in KEPT_TREES:
        for folder in source.glob(tree):
            place = target / folder.relative_to(source)
            if not place.exists() and not folder.name.startswith("."):
                _link(folder, place, target)
    if (source / MODELS_FILE).exists():
        shutil.copyfile(source / MODELS_FILE, target / MODELS_FILE)


def _link(folder: Path, place: Path, top: Path) -> None:
    try:
        link_files(folder, place, top)
    except FileNotFoundError:  # it has just been removed
        shutil.rmtree(place, ignore_errors=True)
