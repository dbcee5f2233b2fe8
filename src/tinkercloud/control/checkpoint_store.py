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
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinkercloud.control.store_owner import StoreOwner, without_userinfo
from tinkercloud.errors import InvalidRequest, NotFound, Unavailable
from tinkercloud.ledger.files import sync

MANIFEST = "manifest.json"
OWNER = "owner.json"
BLOCK_BYTES = 2**20

EXTRAS = dict.fromkeys(("s3", "s3a"), "pip install -e '.[s3]' in tinkercloud's clone")
"""How to get what a protocol needs, where we have an extra for it."""


class StoreUnavailable(Unavailable):
    """The store cannot be reached, or refuses; it may not for long."""


class UnusableStore(Exception):
    """`checkpoints_url` can never be used as it is; the text says why and what would be right."""


class CheckpointStore:
    """One store. Every method blocks; keys are `<run>/<segment>/<name>/<seq_id>`.

    Raises StoreUnavailable where the store does not answer or refuses.
    """

    def __init__(self, url: str, owner: StoreOwner | None = None):
        """`owner`: the data directory whose store it is, or is to be; without one it is only read. UnusableStore."""
        import fsspec

        self.url = without_userinfo(url.rstrip("/"))
        """For messages; it is no secret."""
        self._owner = owner
        self._claiming = threading.Lock()
        try:
            # Listings are never kept: others may write, and what is here is asked for.
            self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            protocol = fsspec.utils.get_protocol(url)
            mend = EXTRAS.get(protocol, f"pip install it ({error})")
            raise UnusableStore(f"checkpoints_url {self.url} needs a Python package that is missing: {mend}") from None
        except (ValueError, TypeError, OSError) as error:
            raise UnusableStore(
                f"checkpoints_url {self.url} cannot be used: {without_userinfo(str(error))}; write s3://BUCKET/PREFIX, "
                "or the URL of another file system that fsspec knows"
            ) from None
        self._root = root.rstrip("/")
        self._is_local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))

    # ------------------------------------------------------------ writing

    def put(self, folder: Path, key: str, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Publish a folder's files: all of them, then the manifest, which makes them a checkpoint. Durable when it
        returns; in the place of whatever is there under the key. The folder gets the manifest too.

        Asks between two files whether it `is_stopped`; then, StoreUnavailable, there is no checkpoint under the key.
        OSError if the folder cannot be read or written.
        """
        files = sorted(file for file in folder.iterdir() if file.name != MANIFEST)
        manifest = {file.name: {"size": file.stat().st_size, "sha256": _digest_of(file)} for file in files}
        (folder / MANIFEST).write_text(json.dumps({"files": manifest}, indent=2), encoding="utf-8")
        with self._reached():
            self._go_on(is_stopped)
            self._claim()
            self._delete(f"{key}/{MANIFEST}")
            if self._is_local:
                self._fs.makedirs(self._path(key), exist_ok=True)
            for file in files:
                self._go_on(is_stopped)
                self._fs.put_file(str(file), self._path(f"{key}/{file.name}"))
            if self._is_local:
                self._sync(key, [file.name for file in files])
                self._claim()  # the disk was not taken away meanwhile
            self._go_on(is_stopped)
            self._fs.put_file(str(folder / MANIFEST), self._path(f"{key}/{MANIFEST}"))
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
        what was written; with the manifest. NotFound if there is no such checkpoint, InvalidRequest if it is damaged,
        OSError if there is no room."""
        content, files = self._manifest(key)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.draft")
        draft.mkdir(parents=True)
        try:
            for name, expected in files.items():
                with self._found(f"{key}/{name}"):
                    self._fs.get_file(self._path(f"{key}/{name}"), str(draft / name))
                if (draft / name).stat().st_size != expected["size"] or _digest_of(draft / name) != expected["sha256"]:
                    raise InvalidRequest(
                        f"{name} of the checkpoint at {self.url}/{key} is not what was written there (its SHA-256 "
                        "differs); load another checkpoint"
                    )
            (draft / MANIFEST).write_bytes(content)
            for path in (*draft.iterdir(), draft):
                sync(path)
            if not target.exists():
                draft.rename(target)
                sync(target.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def damage(self, key: str) -> str | None:
        """What is wrong with a checkpoint, of which every byte is read; None if it is what was written."""
        try:
            _, files = self._manifest(key)
        except NotFound:
            return f"it is missing at {self.url}"
        except InvalidRequest as error:
            return str(error)
        for name, expected in files.items():
            try:
                with self._found(key), self._fs.open(self._path(f"{key}/{name}"), "rb") as stream:
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
        """Take the store for this data directory. UnusableStore if it is another's; StoreUnavailable if it was this
        one's and does not know it any more, as the empty folder does where a disk is not mounted."""
        with self._reached():
            self._claim()

    def check(self) -> str | None:
        """Write, read and remove a small object; what went wrong, None if nothing did."""
        probe = self._path(f".probe-{uuid.uuid4().hex[:8]}")
        try:
            with self._reached():
                if self._owner is not None and self._owner.has_claimed(self.url):
                    self._claim()
                if self._is_local:
                    self._fs.makedirs(self._root, exist_ok=True)
                self._fs.pipe_file(probe, b"probe")
                if self._fs.cat_file(probe) != b"probe":
                    return "what is written there is not what is read again"
                self._fs.rm_file(probe)
        except (StoreUnavailable, UnusableStore, NotFound) as error:
            return str(error)
        return None

    def _claim(self) -> None:
        assert self._owner is not None, "it is only read"
        known, found = self._owner.has_claimed(self.url), self._found_owner()
        if found is None and not known:
            with self._claiming:
                if (found := self._found_owner()) is None:
                    self._write_owner()
                    found = self._found_owner()
        if found == self._owner.id:
            self._owner.remember(self.url)
        elif known:
            raise StoreUnavailable(self._not_there(found))
        else:
            raise UnusableStore(
                f"{self.url} holds the checkpoints of another data directory ({found}), whose files would be "
                "removed as left over; give this server another checkpoints_url, or remove "
                f"{self.url}/{OWNER} if that data directory is gone for good and this one was restored from its "
                "backup"
            )

    def _found_owner(self) -> str | None:
        """The id in owner.json; None if there is none."""
        try:
            return str(json.loads(self._fs.cat_file(self._path(OWNER)))["data_directory"])
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError):
            raise UnusableStore(
                f"{self.url}/{OWNER} is damaged; it should hold {self._owner_text()}, if the store is this server's"
            ) from None

    def _write_owner(self) -> None:
        text = self._owner_text().encode()
        if not self._is_local:
            self._fs.pipe_file(self._path(OWNER), text)
            return
        self._fs.makedirs(self._root, exist_ok=True)
        draft = Path(self._path(f".{OWNER}.draft"))
        draft.write_bytes(text)
        sync(draft)
        os.replace(draft, self._path(OWNER))
        sync(Path(self._root))
        sync(Path(self._root).parent)

    def _owner_text(self) -> str:
        return json.dumps({"data_directory": self._owner.id if self._owner else "ITS ID"})

    def _not_there(self, found: str | None) -> str:
        what = f"is another data directory's now ({found})" if found else f"lacks the {OWNER} that was written there"
        return (
            f"{self.url} {what}: is the right disk mounted? If that was done on purpose, and it is this server's, "
            f"{self.url}/{OWNER} must hold {self._owner_text()}"
        )

    # ------------------------------------------------------------ inside

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _manifest(self, key: str) -> tuple[bytes, dict[str, dict[str, Any]]]:
        """(as it is there, what it says)."""
        with self._found(key):
            content = self._fs.cat_file(self._path(f"{key}/{MANIFEST}"))
        try:
            return content, _parsed(content)
        except ValueError:
            raise InvalidRequest(
                f"the manifest of the checkpoint at {self.url}/{key} is damaged; load another checkpoint"
            ) from None

    @staticmethod
    def _go_on(is_stopped: Callable[[], bool]) -> None:
        if is_stopped():
            raise StoreUnavailable("its publication was given up")

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
        except (NotFound, StoreUnavailable, UnusableStore):
            raise
        except FileNotFoundError:
            raise NotFound(
                f"there is nothing at {self.url}{key and f'/{key}'}: it was removed there, or never whole"
            ) from None
        except Exception as error:
            why = without_userinfo(" ".join(str(error).split()))
            raise StoreUnavailable(f"{self.url} cannot be used now: {why}") from error

    @contextmanager
    def _found(self, key: str) -> Iterator[None]:
        """As `_reached`; NotFound only if the store itself is there: a disk that is not mounted comes back."""
        try:
            with self._reached(key):
                yield
        except NotFound:
            with self._reached():
                found = self._found_owner()
                is_ours = self._owner is None or not self._owner.has_claimed(self.url) or found == self._owner.id
                if found is None or not is_ours:
                    raise StoreUnavailable(self._not_there(found)) from None
            raise


def is_whole(copy: Path) -> bool:
    """Whether a copy is there and its files have the sizes that its manifest says; one without a manifest was saved
    here and not published yet, or before copies had theirs. OSError."""
    if not copy.is_dir():
        return False
    try:
        files = _parsed((copy / MANIFEST).read_bytes())
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    there = {file.name: file.stat().st_size for file in copy.iterdir()}
    return all(there.get(name) == of["size"] for name, of in files.items())


def _parsed(manifest: bytes) -> dict[str, dict[str, Any]]:
    """{file name: size, sha256}. ValueError: also for names of files that would be elsewhere."""
    try:
        files = json.loads(manifest)["files"]
        described = {name: {"size": int(of["size"]), "sha256": str(of["sha256"])} for name, of in files.items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error
    for name in described:
        if name in ("", ".", "..", MANIFEST) or any(character in name for character in "/\\\0"):
            raise ValueError(f"{name!r} is no name of a file")
    return described


def _digest_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
