"""Adapter folders: written whole or not at all, read with every mismatch named (layout: `engine/peft_layout.py`)."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinkercloud.engine.checksums import check, write_checksums
from tinkercloud.engine.external_weights import write_external
from tinkercloud.engine.fingerprint import same_weights
from tinkercloud.engine.operations import LoraConfig, OperationError
from tinkercloud.engine.peft_layout import (
    CONFIG_FILE,
    FINGERPRINT,
    GRADIENTS_FILE,
    OPTIMIZER_FILE,
    WEIGHTS_FILE,
    adapter_config,
    optimizer_metadata,
    read_adapter_config,
    read_optimizer_metadata,
    read_weights_header,
    weight_keys,
    weights_metadata,
)
from tinkercloud.engine.torch.adapter import Adapter, AdapterLayout
from tinkercloud.engine.torch.lora import Pair
from tinkercloud.engine.torch.model import BaseModel
from tinkercloud.engine.torch.optimizer import OPTIMIZERS


class SavedAdapter(NamedTuple):
    """An adapter folder's weights, laid out for a base model."""

    config: LoraConfig
    layout: AdapterLayout
    parameters: Tensor
    """float32 [layout.size], on the CPU"""


# ---------------------------------------------------------------- writing


DRAFT = ".draft"
"""How the name of a folder ends that is being written."""


class Draft(NamedTuple):
    """An adapter's files, written and not synced, beside the folder that they are to be."""

    files: Path
    folder: Path

    def publish(self) -> int:
        """Sync the files and give them their place, whole; their size in bytes. Waits for the disk, and for nothing
        else: several may be published at a time."""
        try:
            size = _sync(self.files)
            if self.folder.exists():
                old = self.folder.with_name(f"{self.files.name.removesuffix(DRAFT)}.old")
                self.folder.rename(old)
                try:
                    self.files.rename(self.folder)
                except OSError:
                    old.rename(self.folder)
                    raise
                shutil.rmtree(old, ignore_errors=True)
            else:
                self.files.rename(self.folder)
            _sync_directory(self.folder.parent)
        except BaseException:
            shutil.rmtree(self.files, ignore_errors=True)
            raise
        return size


def draft_adapter(
    adapter: Adapter,
    model: BaseModel,
    folder: Path,
    *,
    with_optimizer: bool,
    with_gradients: bool,
    replace: bool,
    external_to: Sequence[str] | None = None,
) -> Draft:
    """Write an adapter beside `folder`, where `publish` moves it. OperationError if that is there and `replace` is not
    set. `external_to`: as external weights, encrypted to these keys.

    A crash leaves the old folder or the new one.
    """
    if folder.exists() and not replace:
        raise OperationError(f"there is already a checkpoint {folder.name!r}; choose another name or replace it")
    _make_folder(folder.parent)
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}{DRAFT}")
    draft.mkdir()
    try:
        if external_to is None:
            _write_files(adapter, model, draft, with_optimizer, with_gradients)
        else:
            with TemporaryDirectory(dir=folder.parent, prefix=f".{draft.name}.") as plain:
                _write_files(adapter, model, Path(plain), with_optimizer=False, with_gradients=False)
                write_external(Path(plain), draft, external_to)
        write_checksums(draft)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return Draft(draft, folder)


def _write_files(adapter: Adapter, model: BaseModel, folder: Path, with_optimizer: bool, with_gradients: bool) -> None:
    layout = adapter.layout
    adapted = [name for name in layout.names if name is not None]
    others = [linear.name for linear, name in zip(model.linears, layout.names, strict=True) if name is None]
    config = adapter_config(adapter.config, model.info.name, adapted, others + model.others)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    metadata = weights_metadata(
        adapter.config, model.info.name, fingerprint=model.info.fingerprint, alternating=model.gates_alternate
    )
    save_file(_tensors(layout, adapter.parameters), folder / WEIGHTS_FILE, metadata)
    if with_optimizer:
        moments: dict[str, Tensor] = {}
        for name, moment in adapter.moments.items():
            moments |= _tensors(layout, moment, f"{name}.")
        save_file(moments, folder / OPTIMIZER_FILE, optimizer_metadata(adapter.optimizer, adapter.steps))
    if with_gradients:
        gradient = {} if adapter.gradient is None else _tensors(layout, adapter.gradient)
        save_file(gradient, folder / GRADIENTS_FILE)


def _tensors(layout: AdapterLayout, flat: Tensor, prefix: str = "") -> dict[str, Tensor]:
    tensors = {}
    for name, pair in zip(layout.names, layout.views(flat.cpu()), strict=True):
        if name is not None and pair is not None:
            for key, view in zip(weight_keys(name), _stored(pair), strict=True):
                tensors[prefix + key] = view.contiguous()
    return tensors


def _stored(pair: Pair) -> Pair:
    """A and B as they lie in a file: PEFT makes one matrix of all experts'."""
    a, b = pair
    if a.ndim == 2:
        return pair
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1).contiguous()


def _loaded(a: Tensor, b: Tensor, num_experts: int) -> Pair:
    """A and B of experts from how they lie in a file: the reverse of `_stored`."""
    return a.unflatten(0, (num_experts, -1)), b.unflatten(1, (-1, num_experts)).permute(2, 0, 1)


def _sync(folder: Path) -> int:
    """Force a folder's files to disk; their size in bytes."""
    size = 0
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            size += os.fstat(file.fileno()).st_size
    _sync_directory(folder)
    return size


def _make_folder(folder: Path) -> None:
    """Make a folder, and those above it, that are not there; their names are on disk."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        _sync_directory(each.parent)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- reading


def read_adapter(folder: Path, model: BaseModel) -> SavedAdapter:
    """An adapter folder's weights for `model`; ours, or PEFT's. OperationError says what does not fit."""
    if not folder.is_dir():
        raise OperationError(f"there is no checkpoint folder {folder.name!r}")
    check(folder, CONFIG_FILE, WEIGHTS_FILE)
    config = read_adapter_config(folder)
    modules, copies, metadata = read_weights_header(folder)
    base_model = metadata.get("base_model")
    if base_model is not None and base_model != model.info.name:
        raise OperationError(f"the checkpoint belongs to base model {base_model}, not to {model.info.name}")
    made_on, served = metadata.get(FINGERPRINT, ""), model.info.fingerprint
    if made_on and served and not same_weights(made_on, served):
        raise OperationError(
            f"the checkpoint was made on {base_model} with weights {made_on:.12}, and this {base_model} has weights "
            f"{served:.12}, which are others; it can be read where the former are served"
        )
    # Exports name the unembedding after what it does; in the model it has the architecture's own name.
    names = {
        (model.unembedding.name if module.endswith("unembed_tokens") else module): keys
        for module, keys in modules.items()
    }
    unknown = names.keys() - {linear.name for linear in model.linears}
    if unknown:
        raise OperationError(
            f"the adapter has weights for {min(unknown)!r}, which is no adaptable layer of {model.info.name}"
        )
    layout = AdapterLayout(model.linears, [linear.name in names for linear in model.linears], config.rank)
    parameters = torch.empty(layout.size)
    _fill(folder / WEIGHTS_FILE, layout, parameters, names)
    for name, key in copies.items():
        if not _is_copy(folder / WEIGHTS_FILE, key, model.parameter(name)):
            raise OperationError(f"the adapter comes with a changed {name!r} of the base model, which is not supported")
    if not parameters.isfinite().all():
        raise OperationError("the adapter has NaN or infinite weights")
    return SavedAdapter(config, layout, parameters)


def read_training_state(folder: Path, adapter: Adapter, *, with_optimizer: bool, with_gradients: bool) -> None:
    """Put a folder's optimizer and gradients into an adapter that was made from its weights, bit for bit."""
    layout = adapter.layout
    keys = {name: weight_keys(name) for name in layout.names if name is not None}
    if with_optimizer:
        path = folder / OPTIMIZER_FILE
        check(folder, path.name)
        tensors, metadata = _header(path)
        adapter.optimizer, adapter.steps = read_optimizer_metadata(metadata)
        for prefix in OPTIMIZERS[adapter.optimizer].moments if tensors else ():
            moment = torch.empty(layout.size)
            _fill(path, layout, moment, {name: (f"{prefix}.{a}", f"{prefix}.{b}") for name, (a, b) in keys.items()})
            adapter.moments[prefix] = moment.to(adapter.parameters.device)
    if with_gradients:
        path = folder / GRADIENTS_FILE
        check(folder, path.name)
        tensors, _ = _header(path)
        if tensors:
            gradient = torch.empty(layout.size)
            _fill(path, layout, gradient, keys)
            adapter.gradient = gradient.to(adapter.parameters.device)


def _header(path: Path) -> tuple[list[str], dict[str, str]]:
    if not path.is_file():
        raise OperationError(
            f"the checkpoint has no {path.name}: it was saved without it (a sampler checkpoint, or another program's)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys()), file.metadata() or {}
    except SafetensorError as error:
        raise OperationError(f"{path.name} is damaged or cut short ({error})") from error


def _is_copy(path: Path, key: str, parameter: Tensor | None) -> bool:
    with safe_open(path, framework="pt") as file:
        copy = file.get_tensor(key).to(parameter) if parameter is not None else None
    return copy is not None and copy.shape == parameter.shape and torch.equal(copy, parameter)


def _fill(path: Path, layout: AdapterLayout, flat: Tensor, keys: dict[str, tuple[str, str]]) -> None:
    """Copy a file's tensors into the views of `flat`; `keys`: module -> the keys of A and B."""
    try:
        with safe_open(path, framework="pt") as file:
            for name, pair in zip(layout.names, layout.views(flat), strict=True):
                if name is None or pair is None:
                    continue
                tensors = [file.get_tensor(key) for key in keys[name]]
                for key, tensor, wanted in zip(keys[name], tensors, _stored(pair), strict=True):
                    if tensor.shape != wanted.shape or not tensor.is_floating_point():
                        raise OperationError(
                            f"{key} in {path.name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}; "
                            f"this base model and rank {layout.rank} need a float {list(wanted.shape)}"
                        )
                loaded = _loaded(*tensors, len(pair[0])) if pair[0].ndim == 3 else tensors
                for view, tensor in zip(pair, loaded, strict=True):
                    view.copy_(tensor)
    except SafetensorError as error:
        raise OperationError(f"{path.name} is damaged or cut short ({error})") from error
