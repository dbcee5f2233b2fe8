"""`tinkercloud keys`: who may use the server. They work on the database itself, with the server running or not."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.filesize import decimal
from rich.markup import escape

from tinkercloud.cli import options
from tinkercloud.cli.console import CommandError, err, out, print_columns

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from tinkercloud.ledger.records import KeyRecord

keys = typer.Typer(help="Make, list or revoke API keys.", no_args_is_help=True)

SECONDS = {"h": 3600, "d": 86400, "w": 7 * 86400}
"""Units of `--expires`."""

MAX_SECONDS = 100 * 365 * 86400
"""The longest that a key may be valid."""

MAX_COUNT = {"models": 2**31 - 1, "bytes": 2**63 - 1, "tokens": 2**63 - 1}
"""What the database's columns hold."""

MAX_USER = 128
"""Letters of a user's name."""

USER = re.compile(r"[\w.+@-]+")
"""What a user may be called: it becomes a part of the names of folders."""


@keys.command("create")
def create_key(
    user: Annotated[str, typer.Argument(help="Whose key it is; what is made with it belongs to this user.")],
    name: Annotated[str | None, typer.Option(help="What the key is for; without it, the user's name.")] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long it is valid, such as 12h, 30d or 8w.")
    ] = None,
    project: Annotated[str | None, typer.Option(help="The project that its sessions belong to, and no other.")] = None,
    operator: Annotated[bool, typer.Option("--operator", help="It may administer the server as well.")] = False,
    max_models: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_COUNT["models"], help="Training runs that the user may have at a time, in live sessions."
        ),
    ] = None,
    max_storage: Annotated[
        str | None, typer.Option(metavar="BYTES", help="What the user's checkpoints may take, such as 50GB.")
    ] = None,
    max_daily_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_COUNT["tokens"], help="Tokens that the user may train, prefill and sample in a day (UTC)."
        ),
    ] = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
) -> None:
    """Make a key and print it, this once: only its hash is stored."""
    from tinkercloud.ledger import keys as stored
    from tinkercloud.ledger.records import KeyRecord

    if not USER.fullmatch(user) or ".." in user:
        raise CommandError(
            f"{user!r} is no name for a user, which has letters, digits and _ . + @ -; write one such as alice or "
            "alice@example.org"
        )
    if len(user) > MAX_USER:
        raise CommandError(f"a user's name has at most {MAX_USER} letters, and this one {len(user)}")
    secret, now = stored.new_secret(), time.time()
    record = KeyRecord(
        key_id=0,
        digest=stored.digest(secret),
        hint=stored.hint(secret),
        owner=user,
        name=name or user,
        is_operator=operator,
        created_at=now,
        project_id=project,
        expires_at=None if expires is None else now + _seconds(expires),
        max_models=max_models,
        max_storage_bytes=None if max_storage is None else _bytes(max_storage),
        max_daily_tokens=max_daily_tokens,
    )
    with _database(data_dir, config) as connection:
        is_first = not stored.find_all(connection)
        record = stored.add(connection, record)
        _audit(connection, "key_created", record)
    err.print(f"Key {record.key_id} of {escape(user)}; it is not shown again:", soft_wrap=True)
    out.print(secret, soft_wrap=True)
    if is_first:
        err.print(
            "From now on this server wants a key of every client. What was made without one belongs to the user "
            "`local`: `tinkercloud keys create local` makes a key for it.",
            soft_wrap=True,
        )


@keys.command("list")
def list_keys(data_dir: options.DataDir = None, config: options.Config = None) -> None:
    """Show the keys and what each may do."""
    from tinkercloud.ledger import keys as stored
    from tinkercloud.ledger.database import DATABASE_FILE

    settings = options.settings_of(None, data_dir=data_dir, config=config)
    if settings.database_url is None and not (settings.data_dir / DATABASE_FILE).exists():
        raise CommandError(f"no server has ever worked in {settings.data_dir}; name its data directory with --data-dir")
    with _database(data_dir, config) as connection:
        found = stored.find_all(connection)
    if not found:
        err.print(
            f"No keys in {escape(str(settings.data_dir))}: its server takes any, and listens on a loopback address "
            "only.",
            soft_wrap=True,
        )
        return
    rows = [("id", "key", "user", "name", "state", "made", "may")]
    for key in found:
        made = f"{datetime.fromtimestamp(key.created_at):%Y-%m-%d}"
        rows.append((str(key.key_id), f"{key.hint}…", key.owner, key.name, _state(key), made, _limits(key)))
    print_columns(rows)


@keys.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(help="Its id, as `keys list` shows it, or the key itself.")],
    data_dir: options.DataDir = None,
    config: options.Config = None,
) -> None:
    """Revoke a key for good. A running server refuses it within a second; what was made with it stays its user's."""
    from tinkercloud.ledger import keys as stored

    with _database(data_dir, config) as connection:
        known = {str(found.key_id): found for found in stored.find_all(connection)}
        known |= {found.digest: found for found in known.values()}
        record = known.get(key) or known.get(stored.digest(key))
        if record is None:
            raise CommandError("there is no such key; `tinkercloud keys list` shows those that there are")
        if not stored.revoke(connection, record.key_id, time.time()):
            raise CommandError(f"key {record.key_id} of {record.owner} was revoked before")
        _audit(connection, "key_revoked", record)
    out.print(f"Key {record.key_id} of {record.owner} is revoked.", markup=False, soft_wrap=True)


@contextlib.contextmanager
def _database(data_dir: options.DataDir, config: options.Config) -> Iterator[Connection]:
    from tinkercloud.ledger import keys as stored
    from tinkercloud.ledger.database import DatabaseInUse, UnusableDatabase, WrongVersion
    from tinkercloud.ledger.lock import DataDirInUse

    settings = options.settings_of(None, data_dir=data_dir, config=config)
    mask = os.umask(0o077)  # the database that it may make is for the server's account only
    try:
        with stored.changing(settings.data_dir, settings.database_url) as connection:
            yield connection
    except (UnusableDatabase, DatabaseInUse, WrongVersion, DataDirInUse) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"the data folder cannot be used: {error}; give another --data-dir") from None
    finally:
        os.umask(mask)


def _audit(connection: Connection, event: str, key: KeyRecord) -> None:
    from tinkercloud.ledger import audit
    from tinkercloud.ledger.records import AuditRecord

    details = {"key_id": key.key_id, "user": key.owner, "name": key.name, "operator": key.is_operator}
    actor = f"{getpass.getuser()}@server"
    audit.add(connection, [AuditRecord(time.time(), actor, None, event, "organizations", details)])


def _seconds(text: str) -> float:
    number, unit = text[:-1], text[-1:]
    if unit not in SECONDS or not number.isdecimal() or not number.strip("0"):
        raise CommandError(f"--expires {text}: write a number and a unit, such as 12h, 30d or 8w")
    if len(number) > len(str(MAX_SECONDS)) or int(number) * SECONDS[unit] > MAX_SECONDS:
        raise CommandError(f"--expires {text}: at most 100 years (36500d); without --expires it is valid for ever")
    return int(number) * SECONDS[unit]


def _bytes(text: str) -> int:
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except (ValidationError, OverflowError):
        raise CommandError(f"--max-storage {text}: write a number of bytes, such as 50GB or 512MiB") from None
    if not 0 <= size <= MAX_COUNT["bytes"]:
        raise CommandError(f"--max-storage {text}: at most {MAX_COUNT['bytes']} bytes")
    return size


def _state(key: KeyRecord) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is None:
        return "valid"
    try:
        ends = f"{datetime.fromtimestamp(key.expires_at, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return "valid"  # until a year of which no calendar knows
    return f"expired {ends}" if key.expires_at <= time.time() else f"until {ends}"


def _limits(key: KeyRecord) -> str:
    limits = {
        "administer": key.is_operator,
        f"project {key.project_id}": key.project_id,
        f"{key.max_models} models": key.max_models,
        f"{decimal(key.max_storage_bytes or 0)} stored": key.max_storage_bytes,
        f"{key.max_daily_tokens or 0:,} tokens a day": key.max_daily_tokens,
    }
    return ", ".join(limit for limit, applies in limits.items() if applies) or "anything of its user's"
