"""`tinkercloud doctor`: what is here, what is missing, and how to mend it."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import typer
from msgspec import structs
from rich.markup import escape

from tinkercloud.addresses import is_loopback, server_url
from tinkercloud.base_models import NO_TOKENIZER, ModelError, has_tokenizer
from tinkercloud.cli import options
from tinkercloud.cli.console import out
from tinkercloud.cli.memory import ENGINE_BYTES, ask_hub, local_folder, model_bytes
from tinkercloud.config import Settings, unknown_variables
from tinkercloud.control.engine_state import SOUND_STATES
from tinkercloud.model_settings import ModelSettings, read_model
from tinkercloud.setting_errors import ConfigError
from tinkercloud.tls import unusable_certificate
from tinkercloud.units import MIB

MIN_PYTHON = (3, 11)
MIN_DISK_BYTES = 1024 * MIB
"""Room that the data folder should have: a few checkpoints of small adapters."""

SERVER_SECONDS = 5.0
"""How long a server that listens at the port may take to say what it is."""


class Check(NamedTuple):
    """One thing that was looked at. `mend` says what to do when it is not `ok`, or could be better."""

    name: str
    ok: bool
    found: str
    mend: str = ""
    warns: bool = False
    """It works, but not everything that its user may want of it."""


def doctor(
    model: options.Model = None,
    host: options.Host = None,
    port: options.Port = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    log_file: options.LogFile = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantization: options.Quantization = None,
    max_rank: options.MaxRank = None,
    max_context: options.MaxContext = None,
    assignments: options.Set = None,
) -> None:
    """Look at everything that `serve` with the same options needs, short of loading the models: what shows in their
    numbers alone shows then. Exit status 1 if something is broken."""
    checks = [*installation(), *environment()]
    sound = []
    for text in model or ():
        try:
            sound.append(read_model(text))
        except ModelError as error:
            mend = "correct it, or leave it out; docs/configuration.md has the ways to name a model"
            checks.append(Check("model", False, str(error).removeprefix("model "), mend))
    try:
        settings = options.settings_of(
            assignments,
            models=sound if model else None,
            host=host,
            port=port,
            data_dir=data_dir,
            config=config,
            log_file=log_file,
            device=device,
            dtype=dtype,
            quantization=quantization,
            max_rank=max_rank,
            max_context=max_context,
        )
    except ConfigError as error:
        checks.append(Check("settings", False, str(error), "correct it; docs/configuration.md has every setting"))
    else:
        checks += [*machine(settings), *access(settings), *storage(settings), *models(settings)]
    for check in checks:
        mark = "[bold red]✗[/]" if not check.ok else "[yellow]![/]" if check.warns else "[green]✓[/]"
        out.print(f"{mark} [bold]{check.name}[/] {escape(check.found)}", soft_wrap=True)
        if check.warns or not check.ok:
            out.print(f"  [yellow]→[/] {escape(check.mend)}", soft_wrap=True)
    broken = sum(not check.ok for check in checks)
    warned = sum(check.ok and check.warns for check in checks)
    well = f"\nNothing is broken; {warned} of {len(checks)} to look at (!)." if warned else "\nAll is well."
    out.print(f"\nTo mend: {broken} of {len(checks)}." if broken else well)
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
    """The devices, the memory and the port."""
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
    yield from quantization(settings)
    yield from memory(settings, cuda)
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            where = f"{settings.host}:{settings.port}"
            if server := _running_server(settings):
                yield Check("port", True, f"{where}: a tinkercloud server is there ({server['status']})")
                for name, state in server["engines"].items():
                    mend = "look into the server's log, which says what to do"
                    yield Check(f"engine {name}", True, state, mend, warns=state not in SOUND_STATES)
            else:
                mend = "stop the program that listens there, or give another --port"
                if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                    mend = "give another --host, an address of this machine"
                yield Check("port", False, f"{where}: {error.strerror}", mend)
        else:
            port = f"{settings.host}:{settings.port} is free" if settings.port else "any that is free"
            yield Check("port", True, port)


def _running_server(settings: Settings) -> dict[str, Any] | None:
    """What a tinkercloud server at the settings' address says of itself: `status`, and of each of its `engines` the
    state. None if there is none."""
    import httpx

    try:
        url = server_url(settings.host, settings.port, tls=settings.tls_cert is not None)
        # Nothing secret is asked or sent, so it does not matter whose certificate it is.
        answer = httpx.get(f"{url}/api/v1/healthz", timeout=SERVER_SECONDS, trust_env=False, verify=False).json()
        return {"status": str(answer["status"]), "engines": {str(k): str(v) for k, v in answer["engines"].items()}}
    except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError):
        return None


def quantization(settings: Settings) -> Iterator[Check]:
    """The extra that quantised models need, if there are any."""
    if all(settings.for_model(model, "quantization") == "none" for model in settings.models):
        return
    for name in ("bitsandbytes", "accelerate"):
        try:
            yield Check(name, True, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Check(name, False, "is not installed", "pip install -e '.[quantized]' in tinkercloud's clone")


def memory(settings: Settings, cuda: bool) -> Iterator[Check]:
    """Whether the models that are loaded at the start fit, on the machine and on each GPU."""
    import psutil
    import torch

    needs: dict[str, int] = {"": 0}
    unknown: dict[str, list[str]] = {"": []}
    for model in settings.models:
        if model.lazy:
            continue
        device = str(settings.for_model(model, "device"))
        place = "" if device == "cpu" or not cuda else "cuda" if device == "auto" else device
        size = model_bytes(settings, model, on_gpu=bool(place))
        for where in {"", place}:
            needs[where] = needs.get(where, 0) + ENGINE_BYTES
        needs[place] += size or 0
        unknown.setdefault(place, []).extend([model.name] if size is None else [])
    for place, need in needs.items():
        try:
            free = torch.cuda.mem_get_info(place)[0] if place else psutil.virtual_memory().available
        except (RuntimeError, ValueError, AssertionError):
            continue  # there is no such device, which has been said
        found = f"{free / MIB:,.0f} MiB free, about {need / MIB:,.0f} MiB needed"
        if unknown.get(place):
            found += f", and what {', '.join(unknown[place])} takes, whose size is not known yet"
        mend = (
            "serve fewer or smaller models, list some as lazy, or give --dtype bfloat16, --quantization 4bit or a "
            "smaller --max-context"
        )
        yield Check(f"memory of {place}" if place else "memory", free >= need, found, mend)


def storage(settings: Settings) -> Iterator[Check]:
    """Whether the log, the database and the data folder can be used, and there is room."""
    from tinkercloud.ledger.lock import holder

    if settings.log_file:
        why_not = "Is a directory" if settings.log_file.is_dir() else _unwritable(settings.log_file.parent)
        yield Check(
            "log file", not why_not, f"{settings.log_file}{why_not and f': {why_not}'}", "give another --log-file"
        )
    if settings.database_url:
        from tinkercloud.ledger.database import UnusableDatabase, parse_url

        try:
            yield Check("database", True, parse_url(settings.database_url).render_as_string())
        except UnusableDatabase as error:
            yield Check("database", False, str(error), "correct database_url, or leave it out to have SQLite")
    if settings.checkpoints_url:
        from tinkercloud.control.checkpoint_store import CheckpointStore, UnusableStore
        from tinkercloud.control.store_owner import StoreOwner, without_userinfo

        try:
            why = CheckpointStore(settings.checkpoints_url, StoreOwner(settings.data_dir)).check()
        except UnusableStore as error:
            yield Check("checkpoints", False, str(error), "correct checkpoints_url, or leave it out")
        else:
            mend = "look at its address, and at what its credentials may do: list, read, write and delete"
            yield Check(
                "checkpoints", why is None, why or f"{without_userinfo(settings.checkpoints_url)} can be written", mend
            )
    folder = settings.data_dir
    if why_not := _unwritable(folder):
        yield Check("data folder", False, f"{folder}: {why_not}", "give a folder of yours with --data-dir")
        return
    free = shutil.disk_usage(_nearest(folder)).free
    found = f"{folder} ({free / MIB:,.0f} MiB free)"
    mend = "make room, or give another --data-dir"
    user = holder(folder)
    if user is not None and free >= MIN_DISK_BYTES:
        found += f"; {user} is at work on it"
        mend = "stop that one before another is started on it, or give this one a --data-dir of its own"
    yield Check("data folder", free >= MIN_DISK_BYTES, found, mend, warns=user is not None)


def access(settings: Settings) -> Iterator[Check]:
    """Who can reach the server, and how."""
    if settings.tls_cert is not None:
        why = unusable_certificate(settings)
        yield Check("certificate", why is None, why or str(settings.tls_cert), "correct tls_cert and tls_key")
    if is_loopback(settings.host) or _has_keys(settings):
        return
    yield Check(
        "keys",
        False,
        f"{settings.host} can be reached from other machines, and there are no keys to tell users apart",
        "make one first (`tinkercloud keys create NAME`), or listen on 127.0.0.1",
    )


def _has_keys(settings: Settings) -> bool:
    """Whether there ever was a key; also if its database cannot be asked, which is another check's to say."""
    from sqlalchemy.exc import SQLAlchemyError

    from tinkercloud.ledger import database, keys

    if settings.database_url is None and not (settings.data_dir / database.DATABASE_FILE).is_file():
        return False
    try:
        engine = database.connect(database.address_in(settings.data_dir, settings.database_url), 1)
        try:
            with engine.connect() as connection:
                return bool(keys.find_all(connection))
        finally:
            engine.dispose()
    except (SQLAlchemyError, database.UnusableDatabase):
        return True


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there already."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def _unwritable(folder: Path) -> str:
    """Why nothing can be written there; empty if it can."""
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _damaged(folder: Path) -> str:
    """The first weights file whose length is not what its header says, empty if there is none."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "np"):
                pass
        except (SafetensorError, OSError):
            return file.name
    return ""


def _refusal_of(settings: Settings, model: ModelSettings, folder: Path) -> str | None:
    """Why an engine would refuse to load a model's files."""
    from tinkercloud.engine.torch.architecture import refusal_of

    return refusal_of(structs.replace(settings.engine_options(model), source=str(folder)))


def models(settings: Settings) -> Iterator[Check]:
    """Whether each base model's files are here, or can be fetched, and are of a kind that can be served."""
    for model in settings.models:
        name = f"model {model.name}"
        folder = local_folder(model)
        if folder is None:
            why_not = ask_hub(model.source).refusal
            found = f"not in the Hugging Face cache; {why_not or 'fetched at the first start'}"
            mend = (
                f"correct the name, or with a network (and `hf auth login` if it is gated): hf download {model.source}"
            )
            yield Check(name, not why_not, found, mend)
            continue
        missing = [kind for kind in ("config.json", "*.safetensors") if not any(folder.glob(kind))]
        if missing:
            mend = "save the model there with `save_pretrained`, weights as safetensors"
            yield Check(name, False, f"{folder} lacks {', '.join(missing)}", mend)
        elif damaged := _damaged(folder):
            yield Check(name, False, f"{damaged} is damaged or cut short", "copy or download it again")
        elif model.source != "builtin" and (why := _refusal_of(settings, model, folder)):
            yield Check(name, False, why, "serve another model, or other settings: docs/models.md says what can be")
        elif not has_tokenizer(folder):
            mend = f"save the tokenizer there with `save_pretrained`; {NO_TOKENIZER}"
            yield Check(name, True, f"{folder} has no tokenizer", mend, warns=True)
        else:
            yield Check(name, True, str(folder))
