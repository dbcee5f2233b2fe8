"""Checksums of an adapter folder's files, written with them, so that what the disk has changed can be found."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from tinkercloud.engine.operations import OperationError
from tinkercloud.engine.peft_layout import read_adapter_config, read_weights_header

CHECKSUMS_FILE = "checksums.json"
"""{file name: CRC-32 of its bytes}"""

BLOCK_BYTES = 2**20


def write_checksums(folder: Path) -> None:
    """Add the checksums of all files that are in the folder."""
    sums = {file.name: checksum(file) for file in sorted(folder.iterdir())}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def checksum(file: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
    return crc


def check(folder: Path, *names: str) -> None:
    """OperationError if one of these files is not what was written with its checksum: a flipped bit is a number like
    any other, and nothing else would notice. Files of another program have none and pass."""
    try:
        sums: dict[str, int] = dict(json.loads((folder / CHECKSUMS_FILE).read_bytes()).items())
        differing = [name for name in names if name in sums and checksum(folder / name) != sums[name]]
    except FileNotFoundError:
        return  # no checksums, or a file that is missing, which whoever reads it says
    except (ValueError, AttributeError) as error:
        raise OperationError(f"{CHECKSUMS_FILE} of the checkpoint is damaged") from error
    if differing:
        raise OperationError(f"{differing[0]} of the checkpoint is damaged (its checksum differs)")


def damage(folder: Path) -> str | None:
    """What is wrong with an adapter folder; None if its files are those that were written. One without checksums, from
    another program, is only looked at for its form."""
    if not folder.is_dir():
        return "it is missing"
    try:
        sums = json.loads((folder / CHECKSUMS_FILE).read_bytes())
        for name, expected in sums.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if checksum(folder / name) != expected:
                return f"{name} is damaged (its checksum differs)"
    except FileNotFoundError:
        return _form_of(folder)
    except (ValueError, AttributeError):
        return f"{CHECKSUMS_FILE} is damaged"
    except OSError as error:
        return f"it cannot be read: {error}"
    return None


def _form_of(folder: Path) -> str | None:
    try:
        read_adapter_config(folder)
        read_weights_header(folder)
    except OperationError as error:
        return str(error)
    return None
