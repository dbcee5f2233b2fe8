"""Which weights a base model's folder holds: the same ones have the same fingerprint, wherever they lie.

A name says nothing of it: another fine-tune, or a newer version, may lie behind it tomorrow.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

WHOLE_BYTES = 16 * 2**10
"""Tensors up to this size are read whole."""

SAMPLES = 8
SAMPLE_BYTES = 512
"""Of larger ones, so many places of so many bytes are: whatever trains, merges or quantises a model changes its tensors
all over, and what loading reads anyway costs no time. 400 tensors of 16 GB are 3,200 places, less than a second."""

NO_NUMBERS = {
    *("_name_or_path", "architectures", "auto_map", "transformers_version", "use_cache"),
    *("dtype", "torch_dtype", "output_attentions", "output_hidden_states", "return_dict"),
}
"""What config.json says that decides no number of a model with these tensors; token ids neither."""


def fingerprint_of(folder: Path) -> str:
    """32 hexadecimal digits, over what decides the numbers in config.json, and the names, types, shapes and sampled
    bytes of all tensors, in whatever files they are. OSError, ValueError if the files are not a model's."""
    digest = hashlib.sha256()
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    digest.update(json.dumps(_deciding(config), sort_keys=True).encode())
    tensors = [(name, form, file) for file in _weight_files(folder) for name, form in _header(file).items()]
    opened: dict[Path, BinaryIO] = {}
    try:
        for name, (dtype, shape, begin, end), file in sorted(tensors, key=lambda tensor: tensor[0]):
            digest.update(f"{name} {dtype} {shape}\0".encode())
            stream = opened.get(file) or opened.setdefault(file, file.open("rb"))
            for at, length in _places(begin, end):
                stream.seek(at)
                digest.update(stream.read(length))
    finally:
        for stream in opened.values():
            stream.close()
    return digest.hexdigest()[:32]


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


def _header(file: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """name -> (type, shape, where its bytes begin and end in the file)."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    base = 8 + length
    return {
        name: (tensor["dtype"], tensor["shape"], *(base + offset for offset in tensor["data_offsets"]))
        for name, tensor in header.items()
    }


def _places(begin: int, end: int) -> list[tuple[int, int]]:
    """(where, how many bytes) to read of a tensor: its beginning, its end, and evenly between."""
    if end - begin <= WHOLE_BYTES:
        return [(begin, end - begin)]
    step = (end - begin - SAMPLE_BYTES) / (SAMPLES - 1)
    return [(begin + int(step * place), SAMPLE_BYTES) for place in range(SAMPLES)]
