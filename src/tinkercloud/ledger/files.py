"""Files and folders that survive a power cut."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What a file system answers that has no hard links, or no more of them for this file."""


def sync(path: Path) -> None:
    """Return when a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private(folder: Path) -> None:
    """Make a data directory that is not there: what users train on lies in it, and is for the server's account only.
    One that is there keeps its mode."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        folder.mkdir(mode=0o700, exist_ok=True)
        sync(folder.parent)


def link_files(source: Path, target: Path, top: Path) -> None:
    """Give a folder's files a second place, `target` below `top`: the same bytes, which nobody changes, or where the
    file system cannot do that a copy."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            shutil.copyfile(file, target / file.name)
            sync(target / file.name)
    sync_names(target, top)


def sync_names(folder: Path, top: Path) -> None:
    """Return when what a folder holds is on disk by name, and its own name, and so on up to `top`."""
    for each in (folder, *folder.parents):
        sync(each)
        if each == top:
            return
