"""`tinkercloud models`, `checkpoints` and `sessions`: what can be changed while the server runs."""

from __future__ import annotations

import os
import re
import ssl
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer
from rich.filesize import decimal
from rich.markup import escape

from tinkercloud import running
from tinkercloud.addresses import is_loopback, server_url
from tinkercloud.base_models import ModelError, option_text, parse_model
from tinkercloud.cli.console import CommandError, err, out, print_columns
from tinkercloud.cli.options import ONE_MODEL_TEXT
from tinkercloud.config import Settings
from tinkercloud.setting_errors import ConfigError

if TYPE_CHECKING:
    import httpx

models = typer.Typer(help="List, add or remove base models of a running server.", no_args_is_help=True)
checkpoints = typer.Typer(help="List or import checkpoints of a running server.", no_args_is_help=True)

REQUEST_SECONDS = 600.0
"""How long a command waits for the server: a base model may be downloaded and loaded meanwhile."""

PAGE = 1000
"""Checkpoints asked for at a time: the most that the server gives."""

sessions = typer.Typer(
    help="List, drain or stop any user's sessions, training runs and samplers.", no_args_is_help=True
)

Url = Annotated[
    str | None,
    typer.Option(
        envvar="TINKER_BASE_URL",
        help="The running server; without it, that of the data directory (TINKERCLOUD_DATA_DIR), else the one that "
        "the settings describe (http://127.0.0.1:8000).",
        show_default=False,
    ),
]


@models.command("list")
def list_models(url: Url = None) -> None:
    """Show the base models, the state of each, and the settings that were given for it alone."""
    rows = [("model", "state", "source", "settings")]
    for model in _ask(url, "GET", "/api/v1/admin/models", "models")["models"]:
        state = model["state"] + (" (lazy)" if model["lazy"] else "")
        rows.append((model["name"], state, model["source"], option_text(model.get("settings", {}))))
    print_columns(rows)


@models.command("add")
def add_model(
    model: Annotated[str, typer.Argument(help=ONE_MODEL_TEXT, metavar="NAME[=FOLDER]")],
    lazy: Annotated[bool, typer.Option("--lazy", help="Load it when the first client asks for it.")] = False,
    url: Url = None,
) -> None:
    """Serve one more base model, now and after every start on this data directory, until `models remove`."""
    try:
        (chosen,) = Settings.load(models=[model]).models
        given = parse_model(model)
    except ModelError as error:
        raise CommandError(str(error)) from None
    body = chosen.model_dump(mode="json", include=set(given)) | {"name": chosen.name, "source": chosen.source}
    answer = _ask(url, "POST", "/api/v1/admin/models", "state", body | {"lazy": lazy or chosen.lazy})
    if answer.get("warning"):
        err.print(f"[yellow]warning:[/] {escape(answer['warning'])}", soft_wrap=True)
    done = "is served" if answer["state"] == "ready" else "will be loaded when a client first asks for it"
    kept = f"The next `serve` has it too, until `tinkercloud models remove {chosen.name}`."
    out.print(f"{chosen.name} {done}. {kept}", soft_wrap=True)


@models.command("remove")
def remove_model(name: Annotated[str, typer.Argument(help="As `models list` shows it.")], url: Url = None) -> None:
    """Stop serving a base model, and forget it if it was added; its training runs and checkpoints stay on disk."""
    answer = _ask(url, "DELETE", f"/api/v1/admin/models/{quote(name)}", "waiting_runs")
    waiting = _waiting(answer["waiting_runs"], answer["waiting_sequences"])
    out.print(f"{name} is no longer served. {waiting}", soft_wrap=True)


def _waiting(runs: int, sequences: int) -> str:
    if not runs and not sequences:
        return "Nothing waits for it."
    each = []
    if runs:
        each.append("1 training run that has not ended" if runs == 1 else f"{runs} training runs that have not ended")
    if sequences:
        each.append("1 sequence to draw" if sequences == 1 else f"{sequences} sequences to draw")
    wait = "waits" if runs + sequences == 1 else "wait"
    return f"{' and '.join(each)} {wait} for it from now on: clients go on when a model of this name is served again."


@checkpoints.command("list")
def list_checkpoints(url: Url = None) -> None:
    """Show the checkpoints, with the path that clients load them by."""
    rows = [("path", "saved", "size")]
    total = None
    while total is None or len(rows) <= total:
        page = _ask(url, "GET", f"/api/v1/checkpoints?limit={PAGE}&offset={len(rows) - 1}", "checkpoints")
        for checkpoint in page["checkpoints"]:
            saved = datetime.fromisoformat(checkpoint["time"]).astimezone()
            rows.append((checkpoint["tinker_path"], f"{saved:%Y-%m-%d %H:%M}", decimal(checkpoint["size_bytes"])))
        total = page["cursor"]["total_count"] if page["checkpoints"] else 0
    if not rows[1:]:
        err.print(_no_checkpoints(url), soft_wrap=True)
        return
    print_columns(rows)


def _no_checkpoints(url: str | None) -> str:
    from tinkercloud.api.tokens import NO_KEYS

    asking = _ask(url, "GET", "/api/v1/auth/apikey/me", "key_id")
    if asking["note"] == NO_KEYS:
        return "No checkpoints yet."
    whose = f"{asking['name']}'s" if asking["key_id"] else "the operator's"
    return f"None of {whose}; a user's are listed by `tinker checkpoint list` with that user's key."


@checkpoints.command("import")
def import_checkpoint(
    folder: Annotated[Path, typer.Argument(help="An adapter in PEFT's layout.", exists=True, file_okay=False)],
    base_model: Annotated[
        str | None, typer.Option(help="The served base model that it belongs to; without it, the one it names.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The checkpoint's name; without it, the folder's, with _ for what no name may have."),
    ] = None,
    url: Url = None,
) -> None:
    """Import an adapter that was trained elsewhere, to sample from or to train on."""
    if not (folder / "adapter_config.json").is_file():
        raise CommandError(
            f"{folder} has no adapter_config.json; give the folder that PEFT's `save_pretrained` has written"
        )
    name = name or re.sub(r"[^\w.+=@,-]+", "_", folder.resolve().name, flags=re.ASCII)
    body = {"folder": str(folder.resolve()), "base_model": base_model, "name": name}
    answer = _ask(url, "POST", "/api/v1/admin/checkpoints/import", "path", body)
    out.print(answer["path"], soft_wrap=True)


@sessions.command("list")
def list_sessions(
    everything: Annotated[bool, typer.Option("--all", help="Those that have finished too.")] = False, url: Url = None
) -> None:
    """Show all users' sessions, newest first, and below each its training runs and samplers."""
    rows = [("id", "user", "state", "last heard of", "what")]
    page = None
    offset = 0
    while page is None or len(page) == PAGE:
        wanted = f"finished={str(everything).lower()}&limit={PAGE}&offset={offset}"
        page = _ask(url, "GET", f"/api/v1/admin/sessions?{wanted}", "sessions")["sessions"]
        offset += len(page)
        for session in page:
            heard = f"{datetime.fromtimestamp(session['last_heartbeat']):%Y-%m-%d %H:%M}"
            project = f"project {session['project_id']}" if session["project_id"] else "session"
            rows.append((session["session_id"], session["owner"], session["state"], heard, project))
            for run in session["training_runs"]:
                done = run["applied_seq"] + 1
                what = f"training run of {run['base_model']}, {done} operation{'s' * (done != 1)}"
                rows.append((f"  {run['model_id']}", "", run["state"], "", what))
            for sampler in session["samplers"]:
                what = f"sampler of {sampler['base_model']}"
                if count := sampler["sequences"]:
                    what += f", {count} sequence{'s' * (count != 1)} to draw"
                rows.append((f"  {sampler['sampler_id']}", "", "", "", what))
    if not rows[1:]:
        err.print("No sessions.")
        return
    print_columns(rows)


Id = Annotated[str, typer.Argument(help="As `sessions list` shows it.")]


@sessions.command("drain")
def drain_session(session_id: Id, url: Url = None) -> None:
    """End a session when everything that was accepted has run; its training runs take in nothing new meanwhile."""
    while not _ask(url, "POST", f"/api/v1/admin/sessions/{quote(session_id)}/drain", "drained", {})["drained"]:
        err.print("Operations of this session still run ...")
    out.print(f"{session_id} has ended; its checkpoints are still there.", soft_wrap=True)


@sessions.command("stop")
def stop_session(target: Id, url: Url = None) -> None:
    """End a session, training run or sampler now: what waits in it fails; checkpoints stay."""
    kind = "training_runs" if ":train:" in target else "samplers" if ":sample:" in target else "sessions"
    _ask(url, "POST", f"/api/v1/admin/{kind}/{quote(target)}/stop", "stopped", {})
    out.print(f"{target} is stopped.", soft_wrap=True)


def _ask(url: str | None, method: str, path: str, answered: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request to the server's API; its JSON, in which `answered` is a field. CommandError with the server's own
    sentence."""
    import httpx

    from tinkercloud.api import tokens

    own_token = trusted = None
    try:
        settings = Settings.load()
    except ConfigError as error:
        if url is None:
            raise ConfigError(f"{error} (or name the server with --url)") from None
    else:
        trusted = settings.tls_cert
        if url is None:
            url, trusted = _server_of(settings)
        if _is_own(url, settings):
            try:
                own_token = tokens.issue_operators(settings.data_dir)
            except tokens.UnusableSecret as error:
                raise CommandError(str(error)) from None
    key = os.environ.get("TINKER_API_KEY")
    if key and not (key.isascii() and key.isprintable()):
        raise CommandError("TINKER_API_KEY has characters that no key has; a key is letters, digits, - and _")
    try:
        with _client(url, trusted) as client:
            refusals: list[httpx.Response] = []
            # A user's own key comes first: what belongs to somebody is the user's. Without keys, any will do.
            for secret in filter(None, (key, own_token, "tml-local")):
                answer = client.request(method, url.rstrip("/") + path, json=body, headers={"X-API-Key": secret})
                if answer.status_code not in (401, 403):
                    break
                refusals.append(answer)
            else:
                answer = refusals[0]
    except httpx.TimeoutException:
        raise CommandError(f"{url} has not answered for {REQUEST_SECONDS:.0f} s; look at the server's log") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise CommandError(
                f"the certificate of {url} is not trusted ({error}); set SSL_CERT_FILE to the certificate of who has "
                "signed it"
            ) from None
        raise CommandError(
            f"no server answers at {url} ({error}); start one with `tinkercloud serve`, or name it with --url"
        ) from None
    try:
        content = answer.json()
    except ValueError:
        content = None
    if answer.is_error and isinstance(content, dict) and "detail" in content:
        raise CommandError(f"the server refused: {content['detail']}")
    if answer.is_error or not isinstance(content, dict) or answered not in content:
        raise CommandError(
            f"{url} is no tinkercloud server (it answers {answer.status_code}); name the server with --url"
        )
    return content


def _server_of(settings: Settings) -> tuple[str, Path | None]:
    """(URL, its certificate) of the server that works in the data directory. One that was named must have one: what
    is at the port may be another's. CommandError."""
    if (server := running.find(settings.data_dir)) is not None:
        return server.url, Path(server.certificate) if server.certificate else None
    if "data_dir" in settings.model_fields_set:
        raise CommandError(
            f"no server runs on {settings.data_dir}; start one with `tinkercloud serve --data-dir "
            f"{settings.data_dir}`, or name another with --url"
        )
    return server_url(settings.host, settings.port, tls=settings.tls_cert is not None), settings.tls_cert


def _is_own(url: str, settings: Settings) -> bool:
    """Whether a URL is of this machine or of the server that the settings describe. No other may see a token that lets
    its bearer administer that one."""
    import httpx

    try:
        host = httpx.URL(url).host
        described = (server_url(settings.host, settings.port, tls=settings.tls_cert is not None), settings.public_url)
        return is_loopback(host) or _origin(url) in [_origin(own) for own in described if own]
    except httpx.InvalidURL:
        return False


def _origin(url: str) -> tuple[str, str, int | None]:
    import httpx

    parsed = httpx.URL(url)
    return parsed.scheme, parsed.host, parsed.port


def _client(url: str, certificate: Path | None) -> httpx.Client:
    """An HTTP client for a server; on this machine, one that speaks with its own certificate is trusted by it."""
    import httpx

    if not is_loopback(httpx.URL(url).host):
        return httpx.Client(timeout=REQUEST_SECONDS)
    context = ssl.create_default_context()  # it knows SSL_CERT_FILE
    if certificate is not None:
        context.load_verify_locations(cafile=str(certificate))
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the server's own is enough, whoever has signed it
        context.check_hostname = False  # which is no name of the loopback address
    return httpx.Client(timeout=REQUEST_SECONDS, trust_env=False, verify=context)  # no proxy is a way to this machine
