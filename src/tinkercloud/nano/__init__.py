"""The embedded model: a small Qwen3 that the server serves when no other is named. README.md is its card."""

from pathlib import Path

NAME = "tinkercloud/nano"
"""As clients name it."""

FOLDER = Path(__file__).parent
"""Where its weights, configuration and tokenizer are."""
