"""Adapter folders in PEFT's layout: names, keys and configuration. Needs no torch.

adapter_config.json        PEFT's `LoraConfig`
adapter_model.safetensors  `base_model.model.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]; of fused
                           experts [experts * r, in] and [out, r * experts], the experts counting slower in A and
                           faster in B, under the names that PEFT gives to `target_parameters`
optimizer.safetensors      ours: the optimizer's moments under the same keys, prefixed; metadata: optimizer, steps
gradients.safetensors      ours: accumulated gradients under the same keys
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open

from tinkercloud.engine.operations import LoraConfig, OperationError, OptimizerFamily

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
GRADIENTS_FILE = "gradients.safetensors"

FINGERPRINT = "base_fingerprint"
"""The key of `fingerprint.fingerprint_of` the base model in the weights' metadata."""

PARTS = {
    "attn": (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),  # multi-head latent attention
        *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj_qkvz", "in_proj_ba", "out_proj"),  # linear
    ),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""Linear layers that LoRA adapts, by the last part of their module path; any other is the unembedding."""

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
"""What LoRA adapts of a module `experts`, in which the experts of a layer are fused: 3-D parameters, part of mlp."""

_PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")

_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA biases",
    "fan_in_fan_out": "transposed layers",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "rank_pattern": "ranks that differ between modules (rank_pattern)",
    "alpha_pattern": "alphas that differ between modules (alpha_pattern)",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained token embeddings",
    "megatron_config": "Megatron layers",
}
"""Settings of PEFT's LoraConfig that change what an adapter computes, and that we do not."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""init_lora_weights that also change the base model's own weights."""


def part_of(module: str) -> str:
    """attn, mlp or unembed."""
    if is_experts(module):
        return "mlp"
    leaf = module.rpartition(".")[2]
    return next((part for part, names in PARTS.items() if leaf in names), "unembed")


def is_experts(module: str) -> bool:
    """Whether a module path is that of a parameter of fused experts."""
    return module.endswith(tuple(f".experts.{parameter}" for parameter in EXPERT_PARAMETERS))


def weight_keys(module: str) -> tuple[str, str]:
    """The keys of a module's A and B, or of a parameter's of fused experts.

    PEFT wraps experts once for each adapted parameter: gate_up_proj within, down_proj around it.
    """
    if is_experts(module):
        experts, _, parameter = module.rpartition(".")
        module = experts if parameter == EXPERT_PARAMETERS[-1] else f"{experts}.base_layer"
    return _PREFIX + module + _SUFFIXES[0], _PREFIX + module + _SUFFIXES[1]


def _module_of(path: str) -> str:
    """What a key's path stands for: the reverse of `weight_keys`."""
    if path.endswith(".experts.base_layer"):
        return f"{path.removesuffix('.base_layer')}.{EXPERT_PARAMETERS[0]}"
    return f"{path}.{EXPERT_PARAMETERS[1]}" if path.endswith(".experts") else path


def adapter_config(lora: LoraConfig, base_model: str, adapted: list[str], others: Iterable[str]) -> dict[str, Any]:
    """PEFT's configuration of an adapter on the modules `adapted`, where the model has other linear modules `others`.

    Modules are named by their last part where that is unambiguous, by their whole path where it is not. Beside fused
    experts, the linear layers of mlp are named as parameters too: as modules, PEFT would take their names for those
    that the experts had before transformers fused them.
    """
    partial = {name.rpartition(".")[2] for name in others}
    fused = any(map(is_experts, adapted))
    parameters = {name for name in adapted if fused and part_of(name) == "mlp"}
    modules = [name for name in adapted if name not in parameters]
    targets = {name if (leaf := name.rpartition(".")[2]) in partial else leaf for name in modules}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "inference_mode": True,
    }
    if parameters:
        config["target_parameters"] = sorted(name if is_experts(name) else f"{name}.weight" for name in parameters)
    return config


def weights_metadata(
    lora: LoraConfig, base_model: str, *, fingerprint: str = "", alternating: bool = False
) -> dict[str, str]:
    """What our own adapter_model.safetensors says besides its tensors. `fingerprint`: of the base model's weights.
    `alternating`: the rows of experts' gate_up_proj are gate, up, gate, up and so on, not all gates and then all
    ups."""
    metadata = {"format": "pt", "base_model": base_model, "seed": str(lora.seed)}
    if fingerprint:
        metadata[FINGERPRINT] = fingerprint
    return metadata | ({"gate_up_rows": "alternating"} if alternating else {})


def gates_alternate(metadata: Mapping[str, str]) -> bool:
    """Whether a file's gate_up_proj has alternating rows; see `weights_metadata`."""
    return metadata.get("gate_up_rows") == "alternating"


def optimizer_metadata(optimizer: OptimizerFamily, steps: int) -> dict[str, str]:
    """What our optimizer.safetensors says besides its tensors."""
    return {"optimizer": optimizer, "steps": str(steps)}


def read_optimizer_metadata(metadata: Mapping[str, str]) -> tuple[OptimizerFamily, int]:
    """(family, steps taken). OperationError if it is not there. Files that name no family are AdamW's."""
    family, steps = metadata.get("optimizer", "adamw"), metadata.get("steps", "")
    if not steps.isdigit():
        raise OperationError(f"{OPTIMIZER_FILE} does not say how many steps were taken")
    if family not in get_args(OptimizerFamily):
        known = ", ".join(get_args(OptimizerFamily))
        raise OperationError(f"{OPTIMIZER_FILE} is of optimizer {family!r:.80}; this server has {known}")
    return family, int(steps)


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """The `LoraConfig` of an adapter folder, ours or trained elsewhere.

    Parts are those of which it has at least one module. OperationError says what is missing or not supported.
    """
    folder = Path(folder)
    config = _read_json(folder / CONFIG_FILE)
    check_supported(config)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise OperationError(f"{CONFIG_FILE} must give r (a positive integer) and lora_alpha (a number)")
    # Rank-stabilised LoRA scales by alpha / sqrt(r); an alpha of alpha * sqrt(r) gives the same in the usual form.
    alpha = alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)
    modules, _, metadata = read_weights_header(folder)
    parts = {part_of(module) for module in modules}
    seed = metadata.get("seed", "0")
    return LoraConfig(
        rank=rank,
        alpha=float(alpha),
        seed=int(seed) if seed.lstrip("-").isdigit() else 0,
        train_attn="attn" in parts,
        train_mlp="mlp" in parts,
        train_unembed="unembed" in parts,
    )


def read_base_model(folder: str | Path) -> str:
    """The base model that an adapter folder says it belongs to. OperationError if it names none."""
    name = _read_json(Path(folder) / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise OperationError(f"{CONFIG_FILE} names no base model (base_model_name_or_path); say which one it is for")
    return name


def read_weights_header(folder: Path) -> tuple[dict[str, tuple[str, str]], dict[str, str], dict[str, str]]:
    """(module -> its two keys, parameter of the base model -> key of its copy, metadata) of a folder's weights."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise OperationError(f"there is no {WEIGHTS_FILE} in the adapter folder; other formats are not read")
    try:
        with safe_open(path, framework="numpy") as file:
            return *_sorted_keys(list(file.keys())), file.metadata() or {}
    except SafetensorError as error:
        raise OperationError(f"{WEIGHTS_FILE} is damaged or cut short ({error}); copy it again") from error


def _sorted_keys(keys: list[str]) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """(module -> the keys of its A and B, parameter of the base model -> key of its copy).

    PEFT adds a copy of the embeddings' own weights if the unembedding is adapted. OperationError on any other key,
    and on an A or B without its partner.
    """
    modules: dict[str, tuple[str, str]] = {}
    copies: dict[str, str] = {}
    for key in keys:
        path = key.removeprefix(_PREFIX)
        if key.startswith(_PREFIX) and key.endswith(_SUFFIXES):
            module = _module_of(path[: -len(_SUFFIXES[0])])
            modules[module] = weight_keys(module)
        elif key.startswith(_PREFIX) and path.endswith((".base_layer.weight", "embed_tokens.weight")):
            copies[path.replace(".base_layer", "")] = key
        else:
            raise OperationError(f"{WEIGHTS_FILE} has {key!r}, which is not a LoRA weight in PEFT's layout")
    whole = {module.rpartition(".")[0] for module in modules if is_experts(module)}
    lone = [name for name in whole if not modules.keys() >= {f"{name}.{parameter}" for parameter in EXPERT_PARAMETERS}]
    if lone:
        raise OperationError(f"{WEIGHTS_FILE} adapts {lone[0]} in part; adapt all of {', '.join(EXPERT_PARAMETERS)}")
    missing = [key for pair in modules.values() for key in pair if key not in set(keys)]
    if missing or not modules:
        raise OperationError(f"{WEIGHTS_FILE} lacks {missing[0] if missing else 'any LoRA weights'}")
    return modules, copies


def check_supported(config: Mapping[str, Any]) -> None:
    """OperationError names the first setting of a PEFT configuration that the engine does not do."""
    if config.get("peft_type") != "LORA":
        raise OperationError(f"only LoRA adapters are supported; this one's peft_type is {config.get('peft_type')!r}")
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise OperationError(f"adapters with {what} are not supported")
    if config.get("bias", "none") != "none":
        raise OperationError(f"adapters that train biases are not supported (bias={config['bias']!r})")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        raise OperationError(
            f"init_lora_weights={config['init_lora_weights']!r} changes the base model; convert the adapter to plain "
            "LoRA first"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OperationError(f"there is no {path.name} in the adapter folder") from error
    except (ValueError, OSError) as error:
        raise OperationError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise OperationError(f"{path.name} must hold a JSON object")
    return config
