"""tinkercloud: a server that speaks the Tinker API, on hardware its users own."""

from importlib.metadata import version

__version__ = version("tinkercloud")
