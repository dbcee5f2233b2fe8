"""`tinkercloud serve`"""

from __future__ import annotations

import errno
import logging
import os
import socket
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tinkercloud.base_models import missing_tokenizer
from tinkercloud.cli import options
from tinkercloud.cli.console import CommandError, err
from tinkercloud.config import Settings, unknown_variables

if TYPE_CHECKING:
    from tinkercloud.control.conductor import Unfinished

log = logging.getLogger(__name__)


def serve(
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
    """Serve base models to Tinker clients until Ctrl-C or SIGTERM."""
    settings = options.settings_of(
        assignments,
        models=model or None,
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
    os.umask(0o077)  # what users train on is for the server's account only
    _log_to(settings)
    for name, meant in unknown_variables():
        log.warning("%s sets nothing%s", name, f"; did you mean {meant}?" if meant else "")

    for served in settings.models:
        if warning := missing_tokenizer(served.name, served.source):
            log.warning("%s", warning)

    from tinkercloud.server import StartError, run

    bars = LoadingBars(settings)

    def on_listening(url: str) -> None:
        err.print(_banner(settings))
        bars.start(url)

    try:
        run(settings, bars.report, on_listening, bars.ready, bars.stopping)
    except StartError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        no_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        if not no_host and error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        mend = "give another --port, or 0 for any free one"
        if no_host:
            mend = "give another --host, an address of this machine"
        raise CommandError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; {mend}") from None
    finally:
        bars.stop()
    err.print("Stopped; everything is on disk.")


def _log_to(settings: Settings) -> None:
    handler: logging.Handler
    line, time = "%(asctime)s %(levelname)-7s %(name)s: %(message)s", None
    if settings.log_file:
        try:
            settings.log_file.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(settings.log_file)
        except OSError as error:
            why = f"{error.filename}: {error.strerror}"
            raise CommandError(f"the log file cannot be written: {why}; give another --log-file") from None
    elif err.is_terminal:
        handler = TerminalHandler()
        line, time = "%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"
    else:
        handler = logging.StreamHandler()
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper(), format=line, datefmt=time)
    for library in ("alembic", "httpx", "uvicorn"):
        logging.getLogger(library).setLevel(logging.WARNING)


class TerminalHandler(logging.Handler):
    """Log lines as they are, neither coloured nor wrapped, above the bars of what loads."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(Text(self.format(record)), soft_wrap=True)


def _banner(settings: Settings) -> Panel:
    """What is served and where its data are. Not the URL, which leads nowhere if a model cannot be loaded."""
    lines = Table.grid(padding=(0, 2))
    for number, model in enumerate(settings.models):
        source = {"builtin": "comes with the package", model.name: "Hugging Face"}.get(model.source, model.source)
        lines.add_row(
            "" if number else "[dim]models", f"{model.name} [dim]({escape(source)}{', lazy' if model.lazy else ''})"
        )
    lines.add_row("[dim]data", escape(str(settings.data_dir)))
    if settings.log_file:
        lines.add_row("[dim]log", escape(str(settings.log_file)))
    return Panel(lines, title="[bold]tinkercloud", title_align="left", expand=False)


def _waits_for(unfinished: Unfinished) -> str:
    parts = []
    if unfinished.operations:
        parts.append(f"finishing {unfinished.operations} operation{'s' * (unfinished.operations > 1)}")
    if unfinished.runs:
        parts.append(f"saving {unfinished.runs} training run{'s' * (unfinished.runs > 1)}")
    return " and ".join(parts) or "nothing runs, and everything is on disk"


class LoadingBars:
    """A bar for each base model while it loads, and a line with the server's URL when all are ready."""

    def __init__(self, settings: Settings) -> None:
        columns = (SpinnerColumn(), "{task.fields[model]}", BarColumn(), TextColumn("[dim]{task.description}"))
        self._bars = Progress(*columns, TimeElapsedColumn(), console=err, transient=True)
        self._url = ""
        names = [model.name for model in settings.models if not model.lazy]
        self._tasks = {name: self._bars.add_task("starting", total=1.0, model=name) for name in names}
        self._stopping = False

    def start(self, url: str) -> None:
        """The server listens at `url`, and models begin to load."""
        self._url = url
        self._bars.start()

    def report(self, model: str, fraction: float, text: str) -> None:
        """`fraction` (0 to 1) of the base model is loaded, and `text` is what its engine does now."""
        if model in self._tasks:
            self._bars.update(self._tasks[model], completed=fraction, description=text)

    def ready(self, models: list[str]) -> None:
        """Every model that is loaded at the start is there, those that were added before among them."""
        self.stop()
        for model in models:
            err.print(f"[green]✓[/] {model}")
        err.print(f"Ready at [bold cyan]{self._url}[/]. Ctrl-C stops the server and keeps everything.")

    def stopping(self, unfinished: Unfinished) -> None:
        """A signal has come, the first or another one."""
        self.stop()
        if self._stopping:
            err.print(
                f"Still stopping: {_waits_for(unfinished)}. No need to wait: `kill -9 {os.getpid()}` ends it at once "
                "and loses nothing, the next start only takes longer.",
                highlight=False,
                soft_wrap=True,
            )
            return
        self._stopping = True
        err.print(f"Stopping: {_waits_for(unfinished)}.", highlight=False)

    def stop(self) -> None:
        if self._bars.live.is_started:  # rich prints an empty line otherwise
            self._bars.stop()
