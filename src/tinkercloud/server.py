"""The control process: builds every room, serves HTTP until told to stop, and leaves a state that starts again."""

# ruff: noqa: E402
from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence

# The SDK's package imports torch when it finds it: 3 s and hundreds of MB that this process has no use for.
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]

import uvicorn

from tinkercloud import running
from tinkercloud.addresses import is_loopback, server_url
from tinkercloud.api import tokens
from tinkercloud.config import Settings
from tinkercloud.control.checkpoint_store import UnusableStore
from tinkercloud.control.conductor import Unfinished
from tinkercloud.control.engines import OnProgress
from tinkercloud.control.housekeeping import keep_house
from tinkercloud.control.service import NoKeys, Service
from tinkercloud.event_loop import new_event_loop
from tinkercloud.ledger.database import DatabaseInUse, UnusableDatabase, WrongVersion
from tinkercloud.ledger.lock import DataDirInUse
from tinkercloud.tls import unusable_certificate

log = logging.getLogger(__name__)

GRACE_SECONDS = 10
"""How long open requests may take to end once the server is stopping."""


class StartError(Exception):
    """The server cannot serve what it was asked to; the text says why."""


def run(
    settings: Settings,
    on_progress: OnProgress = lambda model, fraction, text: None,
    on_listening: Callable[[str], None] = lambda url: None,
    on_ready: Callable[[list[str]], None] = lambda models: None,
    on_stopping: Callable[[Unfinished], None] = lambda unfinished: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Returns when everything is on disk and every engine has ended.

    `on_listening` gets the URL, before the base models are loaded; `on_ready` once when they all are, with their names;
    `on_stopping` at every signal, with what the stop waits for. Raises StartError if a base model cannot be loaded or
    the data folder not be used, OSError if the port is taken.
    """
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(settings, on_progress, on_listening, on_ready, on_stopping))


class _Server(uvicorn.Server):
    """Leaves signals to the control process: uvicorn would end the process before the engines are stopped."""

    failures: Sequence[str] = ()
    """Why it has ended by itself: a sentence for each base model that it was to serve and cannot."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    settings: Settings,
    on_progress: OnProgress,
    on_listening: Callable[[str], None],
    on_ready: Callable[[list[str]], None],
    on_stopping: Callable[[Unfinished], None],
) -> None:
    listener = _bind(settings)
    if why := unusable_certificate(settings):
        raise StartError(why)
    try:
        tokens.secret(settings.data_dir)  # from the start, since commands on this machine sign with it
        service = await Service.start(settings, on_progress)
    except (
        *(DatabaseInUse, DataDirInUse, UnusableDatabase, WrongVersion, NoKeys, UnusableStore),
        tokens.UnusableSecret,
    ) as error:
        raise StartError(str(error)) from None
    except OSError as error:
        where = error.filename or settings.data_dir
        raise StartError(
            f"the data folder cannot be used: {where}: {error.strerror}; give another --data-dir"
        ) from None
    from tinkercloud.api.app import create_app  # its imports take half a second, in which the engines begin theirs

    config = uvicorn.Config(
        create_app(service, settings),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=75,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = _Server(config)

    def stop() -> None:
        on_stopping(service.models.unfinished)
        service.release()  # at once, so that the stop does not wait for held polls and loading models
        server.force_exit = server.should_exit  # the second signal waits for nobody
        server.should_exit = True

    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop)
    background = [
        asyncio.create_task(keep_house(service), name="housekeeping"),
        asyncio.create_task(_announce_ready(service, server, on_ready), name="readiness"),
    ]
    if not is_loopback(settings.host) and settings.tls_cert is None:
        log.warning(
            "keys and data travel unencrypted: give --set tls_cert=FILE and --set tls_key=FILE, or let a proxy in "
            "front of this server speak HTTPS"
        )
    on_listening(_url_for(socket.gethostname(), listener, settings))
    try:
        running.announce(settings.data_dir, _running(listener, settings))
    except OSError as error:
        log.warning("commands on this machine need --url to find this server: %s", error)
    try:
        await server.serve(sockets=[listener])
    finally:
        with contextlib.suppress(OSError):  # then its file names a process that is gone
            running.withdraw(settings.data_dir)
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        for connection in list(server.server_state.connections):
            connection.transport.abort()  # what is still read or answered ends as if its client had gone
        await service.stop()
    if server.failures:
        raise StartError("; ".join(server.failures))


def _bind(settings: Settings) -> socket.socket:
    """The listening socket, bound before anything is loaded: a port that is taken is known at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Named as TCP, or asyncio leaves Nagle's algorithm on: 40 ms more for each answer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError:
        listener.close()
        raise
    return listener


def _url_for(any_address: str, listener: socket.socket, settings: Settings) -> str:
    """Where the server is found; `any_address` stands for the machine's own, where it listens on all of them."""
    host, port = listener.getsockname()[:2]
    return server_url(any_address if host in ("0.0.0.0", "::") else host, port, tls=settings.tls_cert is not None)


def _running(listener: socket.socket, settings: Settings) -> running.Running:
    loopback = "::1" if listener.family == socket.AF_INET6 else "127.0.0.1"
    certificate = str(settings.tls_cert.absolute()) if settings.tls_cert else None
    return running.Running(_url_for(loopback, listener, settings), certificate, os.getpid())


async def _announce_ready(service: Service, server: _Server, on_ready: Callable[[list[str]], None]) -> None:
    """Tell when all preloaded models are there; end the server when one of them never will be."""
    with contextlib.suppress(asyncio.CancelledError):
        await service.models.settled()
        if failures := service.models.failures():
            server.failures, server.should_exit = failures, True
            service.release()  # as for a stop: who waits asks again, and perhaps a server that can load it
        elif not server.should_exit:
            on_ready([served.engine.name for served in service.models if served.engine.state == "ready"])
