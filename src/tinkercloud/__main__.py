"""`python -m tinkercloud` is the command `tinkercloud`."""

from tinkercloud.cli.app import main

main()
