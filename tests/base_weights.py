"""Base models like the embedded one, with other weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tinkercloud.nano import FOLDER

Tensor = tuple[str, list[int], bytes]
"""(type, shape, bytes): numpy has no bfloat16."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    content = (folder / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    return {
        name: (of["dtype"], of["shape"], content[begin + of["data_offsets"][0] : begin + of["data_offsets"][1]])
        for name, of in header.items()
    }


def write(file: Path, tensors: dict[str, Tensor]) -> None:
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


def other_weights(folder: Path) -> Path:
    """Make `folder` a model of the embedded one's form, and with its tokenizer, that computes something else."""
    shutil.copytree(FOLDER, folder)
    turned = {name: (dtype, shape, data[2:] + data[:2]) for name, (dtype, shape, data) in tensors_of(folder).items()}
    write(folder / "model.safetensors", turned)
    return folder
