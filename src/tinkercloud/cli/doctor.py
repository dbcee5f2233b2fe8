"""`tinkercloud doctor`: what is here, what is missing, and how to mend it."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import typer
from rich.markup import escape

from tinkercloud.cli import options
from tinkercloud.cli.console import out
from tinkercloud.config import MIB, ConfigError, ModelSettings, Settings, source_folder, unknown_variables

MIN_PYTHON = (3, 11)
MIN_DISK_BYTES = 1024 * MIB
"""Room that the data folder should have: a few checkpoints of small adapters."""
HUB_SECONDS = 10.0
"""How long the hub may take to say whether it has a model."""
ENGINE_BYTES = 512 * MIB
"""What an engine process takes beside its weights (torch, activations), roughly."""


class Check(NamedTuple):
    """One thing that was looked at. `mend` says what to do when it is not `ok`."""

    name: str
    ok: bool
    found: str
    mend: str = ""


def doctor(
    model: options.Model = None,
    host: options.Host = None,
    port: options.Port = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    device: options.Device = None,
    assignments: options.Set = None,
) -> None:
    """Look at everything that `serve` with the same options needs; exit status 1 if something is broken."""
    given = dict(models=model or None, host=host, port=port, data_dir=data_dir, config=config, device=device)
    checks = [*installation()]
    try:
        settings = options.settings_of(assignments, **given)
    except ConfigError as error:
        checks.append(Check("settings", False, str(error), "correct it; docs/configuration.md has every setting"))
    else:
        checks += [*environment(), *machine(settings), *storage(settings), *models(settings)]
    for check in checks:
        mark = "[green]✓[/]" if check.ok else "[bold red]✗[/]"
        out.print(f"{mark} [bold]{check.name}[/] {escape(check.found)}", soft_wrap=True)
        if not check.ok:
            out.print(f"  [yellow]→[/] {escape(check.mend)}", soft_wrap=True)
    broken = sum(not check.ok for check in checks)
    out.print(f"\n{broken} of {len(checks)} need mending." if broken else "\nAll is well.")
    raise typer.Exit(1 if broken else 0)


def installation() -> Iterator[Check]:
    """Python, and each package that this one depends on, against the versions it was made for."""
    from packaging.requirements import Requirement

    found = f"{platform.python_version()} ({sys.executable})"
    yield Check("python", sys.version_info >= MIN_PYTHON, found, "install Python 3.11 or newer")
    wanted = [Requirement(text) for text in metadata.requires("tinkercloud") or ()]
    wanted = [need for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]
    for need in wanted:
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            yield Check(need.name, False, "is not installed", f"pip install '{need.name}{need.specifier}'")
            continue
        fits = need.specifier.contains(version, prereleases=True)
        if not fits:
            mend = f"pip install '{need.name}{need.specifier}'"
            yield Check(need.name, False, f"{version}, made for {need.specifier}", mend)
        elif need.name in ("torch", "transformers", "tinker"):
            yield Check(need.name, True, version)


def environment() -> Iterator[Check]:
    """Variables that look like settings and are none."""
    for name, meant in unknown_variables():
        mend = f"did you mean {meant}?" if meant else f"unset {name}; docs/configuration.md has every setting"
        yield Check(name, False, "sets nothing", mend)


def machine(settings: Settings) -> Iterator[Check]:
    """The device, the memory and the port."""
    import psutil
    import torch

    cuda = torch.cuda.is_available()
    for device in sorted({str(settings.for_model(model, "device")) for model in settings.models}):
        if device == "cpu" or (device == "auto" and not cuda):
            yield Check("device", True, f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
            continue
        try:
            name = torch.cuda.get_device_name("cuda" if device == "auto" else device) if cuda else ""
        except (RuntimeError, ValueError, AssertionError) as error:
            name, why = "", str(error)
        else:
            why = "torch finds no GPU"
        mend = "run with --device cpu, or install the driver and a CUDA build of torch"
        yield Check("device", bool(name), f"{device}: {name or why}", mend)
    need = sum(ENGINE_BYTES + _weight_bytes(model) for model in settings.models if not model.lazy)
    free = psutil.virtual_memory().available
    mend = "serve fewer or smaller models, list some as lazy, or give --dtype bfloat16"
    yield Check("memory", free >= need, f"{free / MIB:,.0f} MiB free, about {need / MIB:,.0f} MiB needed", mend)
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            mend = "stop the program that listens there, or give another --port"
            yield Check("port", False, f"{settings.host}:{settings.port}: {error.strerror}", mend)
        else:
            port = f"{settings.host}:{settings.port} is free" if settings.port else "any that is free"
            yield Check("port", True, port)


def storage(settings: Settings) -> Iterator[Check]:
    """Whether the data folder can be written and has room."""
    folder = settings.data_dir
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield Check("data folder", False, f"{folder}: {error.strerror}", "give a folder of yours with --data-dir")
        return
    free = shutil.disk_usage(existing).free
    found = f"{folder} ({free / MIB:,.0f} MiB free)"
    yield Check("data folder", free >= MIN_DISK_BYTES, found, "make room, or give another --data-dir")


def models(settings: Settings) -> Iterator[Check]:
    """Whether each base model's files are here, or can be fetched."""
    for model in settings.models:
        name = f"model {model.name}"
        folder = _local_folder(model)
        if folder is None:
            why_not = _hub_refuses(model.source)
            found = f"not in the Hugging Face cache; {why_not or 'fetched at the first start'}"
            mend = (
                f"correct the name, or with a network (and `hf auth login` if it is gated): hf download {model.source}"
            )
            yield Check(name, not why_not, found, mend)
            continue
        missing = [kind for kind in ("config.json", "tokenizer*", "*.safetensors") if not any(folder.glob(kind))]
        mend = "save the model and its tokenizer there with `save_pretrained`, weights as safetensors"
        yield Check(name, not missing, f"{folder}" + (f" lacks {', '.join(missing)}" if missing else ""), mend)


def _local_folder(model: ModelSettings) -> Path | None:
    """Where the model's files are on this machine, or None if the hub's cache does not have them."""
    folder = Path(source_folder(model.source))
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model.source, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _hub_refuses(source: str) -> str | None:
    """Why the hub does not give a model, in a few words; None if it does."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        HfApi().model_info(source, timeout=HUB_SECONDS)
    except OfflineModeIsEnabled:
        return "offline (HF_HUB_OFFLINE)"
    except RepositoryNotFoundError:
        return "the hub has no such model, or keeps it private"
    except Exception as error:  # its client lets those of its HTTP library through
        return f"the hub cannot be asked ({type(error).__name__})"
    return None


def _weight_bytes(model: ModelSettings) -> int:
    folder = _local_folder(model)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder else 0
