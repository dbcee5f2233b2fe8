"""`tinkercloud serve`"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from rich.logging import RichHandler
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tinkercloud.cli import options
from tinkercloud.cli.console import CommandError, err
from tinkercloud.config import Settings, unknown_variables

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
        max_rank=max_rank,
        max_context=max_context,
    )
    settings.port = _free_port(settings.host, settings.port)
    _log_to(settings)
    for name, meant in unknown_variables():
        log.warning("%s sets nothing%s", name, f"; did you mean {meant}?" if meant else "")
    err.print(_banner(settings))

    from tinkercloud.server import StartError, run

    with _loading(settings) as progress:
        try:
            run(settings, on_progress=progress.report)
        except StartError as error:
            raise CommandError(str(error)) from None


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. CommandError if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CommandError(
                f"cannot listen on {host}:{port}: {error.strerror}; give another --port, or 0 for any free one"
            ) from None
        return probe.getsockname()[1]


def _log_to(settings: Settings) -> None:
    handler: logging.Handler
    if settings.log_file:
        settings.log_file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(settings.log_file)
    elif err.is_terminal:
        handler = RichHandler(console=err, show_path=False, log_time_format="[%X]")
    else:
        handler = logging.StreamHandler()
    if not isinstance(handler, RichHandler):
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper(), format="%(message)s")


def _banner(settings: Settings) -> Panel:
    lines = Table.grid(padding=(0, 2))
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    lines.add_row("[dim]url", f"[bold cyan]http://{host}:{settings.port}")
    for number, model in enumerate(settings.models):
        source = {"builtin": "comes with the package", model.name: "Hugging Face"}.get(model.source, model.source)
        lines.add_row("" if number else "[dim]models", f"{model.name} [dim]({source}{', lazy' if model.lazy else ''})")
    lines.add_row("[dim]data", str(settings.data_dir))
    if settings.log_file:
        lines.add_row("[dim]log", str(settings.log_file))
    return Panel(lines, title="[bold]tinkercloud", title_align="left", expand=False)


class LoadingBars:
    """A bar for each base model while it loads, and a line when it is ready."""

    def __init__(self, settings: Settings) -> None:
        self._waiting = {model.name for model in settings.models if not model.lazy}
        self._bars = Progress(
            SpinnerColumn(), "{task.fields[model]}", BarColumn(), TextColumn("[dim]{task.description}"),
            TimeElapsedColumn(), console=err, transient=True,
        )  # fmt: skip
        self._tasks = {}
        for name in sorted(self._waiting):
            self._tasks[name] = self._bars.add_task("starting", total=1.0, model=name)

    def start(self) -> None:
        if self._waiting:
            self._bars.start()

    def stop(self) -> None:
        self._bars.stop()

    def report(self, model: str, fraction: float, text: str) -> None:
        """What the server calls: `fraction` (0 to 1) of the base model is loaded, and `text` is what it does now."""
        if model not in self._waiting:
            return
        self._bars.update(self._tasks[model], completed=fraction, description=text)
        if fraction >= 1.0:
            self._waiting.remove(model)
            self._bars.remove_task(self._tasks.pop(model))
            err.print(f"[green]✓[/] {model} is ready", highlight=False)
            if not self._waiting:
                self._bars.stop()
                err.print("Ready for clients. Ctrl-C stops the server and keeps everything.", highlight=False)


@contextmanager
def _loading(settings: Settings) -> Iterator[LoadingBars]:
    bars = LoadingBars(settings)
    bars.start()
    try:
        yield bars
    finally:
        bars.stop()
