"""Which weights a base model's folder holds: the same ones have the same fingerprint, wherever they lie.

A name says nothing of it: another fine-tune, or a newer version, may lie behind it tomorrow.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

PIECE_BYTES = 64 * 2**20
"""Tensors are hashed in pieces of so many bytes, on all processors: 1.5 GB/s each."""

READ_BYTES = 2**20

SAMPLED_DIGITS = 32
"""Of the last part of a fingerprint, which is the whole of one that an earlier version took."""

SAMPLED_WHOLE_BYTES = 16 * 2**10
"""Tensors up to this size are read whole for it."""

SAMPLES = 8
SAMPLE_BYTES = 512
"""Of larger ones, so many places of so many bytes are."""

NO_NUMBERS = {
    *("_name_or_path", "architectures", "auto_map", "transformers_version", "use_cache"),
    *("dtype", "torch_dtype", "output_attentions", "output_hidden_states", "return_dict"),
}
"""What config.json says that decides no number of a model with these tensors; token ids neither."""


Tensor = tuple[str, str, list[int], Path, int, int]
"""(name, type, shape, file, where its bytes begin and end there)."""


def fingerprint_of(folder: Path, remembered: Path | None = None) -> str:
    """64 hexadecimal digits: 32 over what decides the numbers in config.json, and the names, types, shapes and bytes of
    all tensors, in whatever files they are; and 32 over the same with samples of large tensors' bytes, by which
    `same_weights` knows those that were recorded when only samples were taken.

    In the folder `remembered` is kept what was found, for as long as no file changes. OSError, ValueError if the files
    are not a model's.
    """
    state = state_of(folder)
    note = remembered and remembered / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    if note and (found := _recall(note, state)):
        return found
    fingerprint = _read(folder)
    if note:
        _remember(note, state, fingerprint)
    return fingerprint


def same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, as far as the two can tell."""
    shorter = min(len(one), len(other))
    return one[-shorter:] == other[-shorter:]


# ---------------------------------------------------------------- what was found before


def state_of(folder: Path) -> str:
    """Changes when a file of the model does: its change time cannot be set, as its modification time can. OSError,
    ValueError if the files are not a model's."""
    files = [folder / CONFIG_FILE, *_weight_files(folder)]
    facts = ((str(file), file.stat()) for file in files)
    return json.dumps([(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev) for name, s in facts])


def _recall(note: Path, state: str) -> str | None:
    try:
        known, _, fingerprint = note.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return fingerprint if known == state and len(fingerprint) == 2 * SAMPLED_DIGITS else None


def _remember(note: Path, state: str, fingerprint: str) -> None:
    draft = note.with_name(f"{note.name}.{os.getpid()}")
    try:
        note.parent.mkdir(exist_ok=True)
        draft.write_text(f"{state}\n{fingerprint}", encoding="utf-8")
        os.replace(draft, note)
    except OSError as error:  # the next start reads the weights again
        log.warning("the fingerprint of a base model could not be kept in %s: %s", note, error)


# ---------------------------------------------------------------- reading it


def _read(folder: Path) -> str:
    config = json.dumps(_deciding(json.loads((folder / CONFIG_FILE).read_bytes())), sort_keys=True).encode()
    tensors = sorted(tensor for file in _weight_files(folder) for tensor in _header(file))
    whole, sampled = hashlib.sha256(config), hashlib.sha256(config)
    with ExitStack() as stack:
        files = {file: os.open(file, os.O_RDONLY) for file in {tensor[3] for tensor in tensors}}
        for descriptor in files.values():
            stack.callback(os.close, descriptor)
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count() or 1, "fingerprint"))
        digests = pool.map(
            lambda piece: _digest(*piece),
            [(files[file], at, upto) for *_, file, begin, end in tensors for at, upto in _pieces(begin, end)],
        )
        for name, dtype, shape, file, begin, end in tensors:
            for digest in (whole, sampled):
                digest.update(f"{name} {dtype} {shape}\0".encode())
            for _ in _pieces(begin, end):
                whole.update(next(digests))
            for at, length in _places(begin, end):
                sampled.update(os.pread(files[file], length, at))
    return whole.hexdigest()[:SAMPLED_DIGITS] + sampled.hexdigest()[:SAMPLED_DIGITS]


def _digest(descriptor: int, begin: int, end: int) -> bytes:
    digest = hashlib.sha256()
    while begin < end:
        block = os.pread(descriptor, min(READ_BYTES, end - begin), begin)
        if not block:
            raise ValueError("a file of weights is cut short")
        digest.update(block)
        begin += len(block)
    return digest.digest()


def _deciding(config: Any) -> Any:
    if isinstance(config, dict):
        return {
            key: _deciding(value)
            for key, value in config.items()
            if key not in NO_NUMBERS and not key.endswith(("_token_id", "_token_index"))
        }
    return config


def _weight_files(folder: Path) -> list[Path]:
    """Those that transformers loads, a single file before an index: others may lie beside them, such as the shards of
    what a fine-tune has replaced."""
    single, index = folder / "model.safetensors", folder / INDEX_FILE
    if single.is_file():
        return [single]
    if index.is_file():
        return sorted(folder / name for name in set(json.loads(index.read_bytes())["weight_map"].values()))
    return sorted(folder.glob("*.safetensors"))


def _header(file: Path) -> Iterator[Tensor]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    base = 8 + length
    for name, tensor in header.items():
        begin, end = (base + offset for offset in tensor["data_offsets"])
        yield name, tensor["dtype"], tensor["shape"], file, begin, end


def _pieces(begin: int, end: int) -> list[tuple[int, int]]:
    """(begin, end) of each piece of a tensor."""
    return [(at, min(at + PIECE_BYTES, end)) for at in range(begin, end, PIECE_BYTES)]


def _places(begin: int, end: int) -> list[tuple[int, int]]:
    """(where, how many bytes) to read of a tensor: its beginning, its end, and evenly between."""
    if end - begin <= SAMPLED_WHOLE_BYTES:
        return [(begin, end - begin)]
    step = (end - begin - SAMPLE_BYTES) / (SAMPLES - 1)
    return [(begin + int(step * place), SAMPLE_BYTES) for place in range(SAMPLES)]
