"""Checkpoints outside of the data directory, in any file system that fsspec knows: S3, GCS, another disk.

<url>/<run>/<weights|sampler_weights|external_weights>/<name>/<seq_id>/<file>
                                                                      /manifest.json   sizes and SHA-256 of the files
<url>/owner.json                                                      the data directory that has the store

The manifest is written last and removed first: a checkpoint without one is not there, whatever files are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinkercloud.errors import InvalidRequest, NotFound, Unavailable
from tinkercloud.ledger.files import sync

MANIFEST = "manifest.json"
OWNER = "owner.json"
BLOCK_BYTES = 2**20

EXTRAS = {"s3": "pip install 'tinkercloud[s3]'", "s3a": "pip install 'tinkercloud[s3]'"}
"""How to get what a protocol needs, where we have an extra for it."""


class StoreUnavailable(Unavailable):
    """The store cannot be reached, or refuses; it may not for long."""


class UnusableStore(Exception):
    """`checkpoints_url` can never be used as it is; the text says why and what would be right."""


class CheckpointStore:
    """One store. Every method blocks; keys are `<run>/<segment>/<name>/<seq_id>`.

    Raises StoreUnavailable where the store does not answer or refuses.
    """

    def __init__(self, url: str, owner: str):
        """`owner`: the id of the data directory whose store it is. UnusableStore."""
        import fsspec

        self.url = url.rstrip("/")
        self._owner = owner
        self._is_claimed = False
        try:
            # Listings are never kept: others may write, and what is here is asked for.
            self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            protocol = fsspec.utils.get_protocol(url)
            mend = EXTRAS.get(protocol, f"pip install it ({error})")
            raise UnusableStore(f"checkpoints_url {url} needs a Python package that is missing: {mend}") from None
        except (ValueError, TypeError) as error:
            raise UnusableStore(
                f"checkpoints_url {url} cannot be used: {error}; write s3://BUCKET/PREFIX, or the URL of another file "
                "system that fsspec knows"
            ) from None
        self._root = root.rstrip("/")
        self._is_local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))

    # ------------------------------------------------------------ writing

    def put(self, folder: Path, key: str) -> None:
        """Publish a folder's files: all of them, then the manifest, which makes them a checkpoint. Durable when it
        returns; in the place of whatever is there under the key. OSError if the folder cannot be read."""
        files = sorted(file for file in folder.iterdir())
        manifest = {file.name: {"size": file.stat().st_size, "sha256": _digest_of(file)} for file in files}
        with self._reached():
            self._claim()
            self._delete(f"{key}/{MANIFEST}")
            if self._is_local:
                self._fs.makedirs(self._path(key), exist_ok=True)
            for file in files:
                self._fs.put_file(str(file), self._path(f"{key}/{file.name}"))
            if self._is_local:
                self._sync(key, [file.name for file in files])
            self._fs.pipe_file(self._path(f"{key}/{MANIFEST}"), json.dumps({"files": manifest}, indent=2).encode())
            if self._is_local:
                self._sync(key, [MANIFEST])

    def remove(self, key: str) -> None:
        """Remove a checkpoint, or what is there of one; no error if there is nothing."""
        with self._reached():
            self._claim()
            self._delete(f"{key}/{MANIFEST}")
            if self._fs.exists(self._path(key)):
                self._fs.rm(self._path(key), recursive=True)

    # ------------------------------------------------------------ reading

    def get(self, key: str, target: Path) -> None:
        """Copy a checkpoint's files to the folder `target`, which appears whole or not at all, and only if they are
        what was written. NotFound if there is no such checkpoint, InvalidRequest if it is damaged."""
        files = self._manifest(key)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.draft")
        draft.mkdir(parents=True)
        try:
            for name, expected in files.items():
                with self._reached(f"{key}/{name}"):
                    self._fs.get_file(self._path(f"{key}/{name}"), str(draft / name))
                if (draft / name).stat().st_size != expected["size"] or _digest_of(draft / name) != expected["sha256"]:
                    raise InvalidRequest(
                        f"{name} of the checkpoint at {self.url}/{key} is not what was written there (its SHA-256 "
                        "differs); load another checkpoint"
                    )
            if not target.exists():
                draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def damage(self, key: str) -> str | None:
        """What is wrong with a checkpoint, of which every byte is read; None if it is what was written."""
        try:
            files = self._manifest(key)
        except NotFound:
            return f"it is missing at {self.url}"
        except InvalidRequest as error:
            return str(error)
        for name, expected in files.items():
            try:
                with self._reached(), self._fs.open(self._path(f"{key}/{name}"), "rb") as stream:
                    digest = hashlib.sha256()
                    while block := stream.read(BLOCK_BYTES):
                        digest.update(block)
            except NotFound:
                return f"{name} is missing at {self.url}"
            if digest.hexdigest() != expected["sha256"]:
                return f"{name} is damaged at {self.url} (its SHA-256 differs)"
        return None

    def keys(self) -> set[str]:
        """Of all that is there, checkpoints or parts of one."""
        with self._reached():
            if not self._fs.exists(self._root):
                return set()
            paths = self._fs.find(self._root)
        below = (path[len(self._root) + 1 :].split("/") for path in paths)
        return {"/".join(parts[:4]) for parts in below if len(parts) > 4}

    # ------------------------------------------------------------ whose it is

    def claim(self) -> None:
        """Take the store for this data directory. UnusableStore if it is another's."""
        with self._reached():
            self._claim()

    def check(self) -> str | None:
        """Write, read and remove a small object; what went wrong, None if nothing did."""
        probe = self._path(f".probe-{uuid.uuid4().hex[:8]}")
        try:
            with self._reached():
                if self._is_local:
                    self._fs.makedirs(self._root, exist_ok=True)
                self._fs.pipe_file(probe, b"probe")
                if self._fs.cat_file(probe) != b"probe":
                    return "what is written there is not what is read again"
                self._fs.rm_file(probe)
        except (StoreUnavailable, NotFound) as error:
            return str(error)
        return None

    def _claim(self) -> None:
        if self._is_claimed:
            return
        path = self._path(OWNER)
        if not self._fs.exists(path):
            if self._is_local:
                self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(path, json.dumps({"data_directory": self._owner}).encode())
        owner = json.loads(self._fs.cat_file(path)).get("data_directory")
        if owner != self._owner:
            raise UnusableStore(
                f"{self.url} holds the checkpoints of another data directory ({owner}), whose files would be removed "
                f"as left over; give this server another checkpoints_url, or remove {self.url}/{OWNER} if that data "
                "directory is gone for good and this one was restored from its backup"
            )
        self._is_claimed = True

    # ------------------------------------------------------------ inside

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _manifest(self, key: str) -> dict[str, dict[str, Any]]:
        with self._reached(key):
            content = self._fs.cat_file(self._path(f"{key}/{MANIFEST}"))
        try:
            files = json.loads(content)["files"]
            return {name: {"size": int(of["size"]), "sha256": str(of["sha256"])} for name, of in files.items()}
        except (ValueError, LookupError, TypeError, AttributeError):
            raise InvalidRequest(
                f"the manifest of the checkpoint at {self.url}/{key} is damaged; load another checkpoint"
            ) from None

    def _delete(self, key: str) -> None:
        if self._fs.exists(self._path(key)):
            self._fs.rm_file(self._path(key))

    def _sync(self, key: str, names: list[str]) -> None:
        """A disk has what was written to it when it says so; an object store, when it has answered."""
        folder = Path(self._path(key))
        for name in names:
            sync(folder / name)
        for each in (folder, *folder.parents):
            sync(each)
            if each == Path(self._root):
                return

    @contextmanager
    def _reached(self, key: str = "") -> Iterator[None]:
        """NotFound for what is not there, StoreUnavailable for whatever else goes wrong: what a client of a store
        raises is as various as stores are."""
        try:
            yield
        except (NotFound, UnusableStore):
            raise
        except FileNotFoundError:
            raise NotFound(
                f"there is nothing at {self.url}{key and f'/{key}'}: it was removed there, or never whole"
            ) from None
        except Exception as error:
            raise StoreUnavailable(f"{self.url} cannot be used now: {' '.join(str(error).split())}") from error


def id_of(data_dir: Path) -> str:
    """The id by which a store knows whose it is, made at the first call. Backups do not have it: what was restored
    beside a server that lives must not take its store. OSError."""
    file = data_dir / "store_id"
    if not file.exists():
        draft = file.with_suffix(".draft")
        draft.write_text(uuid.uuid4().hex, encoding="ascii")
        sync(draft)
        os.replace(draft, file)
        sync(data_dir)
    return file.read_text(encoding="ascii").strip()


def _digest_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
