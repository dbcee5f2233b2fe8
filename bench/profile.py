"""Where the server's processes spend their time while a measurement runs, seen by py-spy from outside."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

RATE = 250
"""Samples a second."""
OPTIONS = ["--rate", str(RATE), "--format", "raw", "--full-filenames", "--nonblocking"]

FUNCTIONS = 12
"""Functions shown for each process."""

WAIT_SECONDS = 30


@dataclass(frozen=True)
class Profile:
    """Samples of one process's busy threads: `stacks` counts "outermost;...;innermost" stacks."""

    process: str
    stacks: Counter[str]

    @property
    def busy_seconds(self) -> float:
        """Thread time that was not spent waiting."""
        return sum(self.stacks.values()) / RATE

    def inclusive(self, inside: str = "") -> list[tuple[str, float]]:
        """(frame, seconds in it and what it called) of the frames that hold the text, most first."""
        seconds: Counter[str] = Counter()
        for stack, count in self.stacks.items():
            for frame in {frame for frame in stack.split(";") if inside in frame}:
                seconds[frame] += count
        return [(frame, count / RATE) for frame, count in seconds.most_common()]


@contextmanager
def profiled(processes: Sequence[tuple[str, int]], folder: Path) -> Iterator[list[Profile]]:
    """Profile (name, pid) processes during the block; the profiles are in the list after it, their stacks in `folder`
    in the form that flame graph programs read."""
    py_spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if py_spy is None:
        raise RuntimeError("a profile needs py-spy: pip install py-spy")
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.stacks" for name, _ in processes]
    recorders = [
        subprocess.Popen(
            [py_spy, "record", *OPTIONS, "--pid", str(pid), "--output", str(file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for (_, pid), file in zip(processes, files, strict=True)
    ]
    profiles: list[Profile] = []
    try:
        yield profiles
    finally:
        for recorder in recorders:
            recorder.send_signal(signal.SIGINT)
        for recorder in recorders:
            recorder.wait(WAIT_SECONDS)
    profiles += [Profile(name, read_stacks(file)) for (name, _), file in zip(processes, files, strict=True)]


def read_stacks(file: Path) -> Counter[str]:
    """Lines of "frame;frame;frame count"."""
    stacks: Counter[str] = Counter()
    for line in file.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        stacks[stack] += int(count)
    return stacks


def table_of(profile: Profile, title: str) -> Table:
    """The project's own functions, by the time in them and in what they call."""
    table = Table(title=f"{title}: {profile.process}, busy for {profile.busy_seconds:.1f} s")
    table.add_column("function")
    table.add_column("inclusive", justify="right")
    for frame, seconds in profile.inclusive("/tinkercloud/")[:FUNCTIONS]:
        function, _, place = frame.partition(" (")
        place = place.rpartition("/tinkercloud/")[2].rstrip(")")
        table.add_row(f"{function}  [dim]{place}[/]", f"{seconds / profile.busy_seconds:.0%}")
    return table
