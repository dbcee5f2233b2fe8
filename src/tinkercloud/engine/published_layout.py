"""Adapter folders in the form in which the hosted service publishes them, which its cookbook reads. Needs no torch.

It differs from PEFT's in two things. The unembedding is `model.unembed_tokens`, whatever the architecture calls it. And
experts have three linear layers each, w1 (gate), w3 (up) and w2 (down), all experts' factors in one tensor: A
[experts, r, in] and B [experts, out, r], where a first dimension of 1 stands for a factor that all share. Here each
expert is trained with its own, so that only where all experts' are equal (a fresh adapter's B, or an imported one's) a
factor is written once; gate and up are fused and have one A, so w1 and w3 carry the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tinkercloud.engine.peft_layout import (
    CONFIG_FILE,
    EXPERT_PARAMETERS,
    WEIGHTS_FILE,
    gates_alternate,
    is_experts,
    part_of,
    read_adapter_config,
    read_weights_header,
    weight_keys,
)

UNEMBEDDING = "model.unembed_tokens"


def write_published(source: str | Path, target: str | Path) -> None:
    """Write the weights and the configuration of our adapter folder `source` into the folder `target`, which is there.

    OperationError if `source` is no adapter folder.
    """
    source, target = Path(source), Path(target)
    rank = read_adapter_config(source).rank
    modules, _, metadata = read_weights_header(source)
    tensors: dict[str, np.ndarray] = {}
    with safe_open(source / WEIGHTS_FILE, framework="numpy") as file:
        for module, keys in modules.items():
            pair = tuple(file.get_tensor(key) for key in keys)
            for name, published in _published(module, *pair, rank, gates_alternate(metadata)).items():
                tensors |= zip(weight_keys(name), published, strict=True)
    config = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    (target / CONFIG_FILE).write_text(json.dumps(_config(config, tensors), indent=2) + "\n", encoding="utf-8")
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, target / WEIGHTS_FILE)


def _published(
    module: str, a: np.ndarray, b: np.ndarray, rank: int, alternating: bool
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Published module -> its A and B, of one of ours as it lies in the file."""
    if not is_experts(module):
        return {UNEMBEDDING if part_of(module) == "unembed" else module: (a, b)}
    experts, _, parameter = module.rpartition(".")
    a = a.reshape(-1, rank, a.shape[1])
    b = b.reshape(len(b), rank, -1).transpose(2, 0, 1)
    if parameter == EXPERT_PARAMETERS[1]:
        return {f"{experts}.w2": _shared(a, b)}
    half = b.shape[1] // 2
    gate, up = (b[:, ::2], b[:, 1::2]) if alternating else (b[:, :half], b[:, half:])
    return {f"{experts}.w1": _shared(a, gate), f"{experts}.w3": _shared(a, up)}


def _shared(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A [experts, r, in] and B [experts, out, r] with the factor once that is the same for all experts. Never both:
    readers take the number of experts from the other one."""
    if (a == a[:1]).all():
        return a[:1], b
    return a, b[:1] if (b == b[:1]).all() else b


def _config(config: Mapping[str, Any], keys: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`adapter_config.json`: every adapted layer by the last part of its name."""
    modules = {key.split(".lora_")[0].rpartition(".")[2] for key in keys}
    kept = {name: value for name, value in config.items() if name != "target_parameters"}
    return kept | {"target_modules": sorted(modules)}
