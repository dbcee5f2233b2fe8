"""`python -m tinkercloud` is the command `tinkercloud`."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line. Ctrl-C ends it without a word, whatever it is importing just then."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(128 + signal.SIGINT))
    from tinkercloud.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
