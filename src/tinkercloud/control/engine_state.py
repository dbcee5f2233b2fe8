"""The states that a base model's engine can be in."""

from __future__ import annotations

from typing import Literal, get_args

EngineState = Literal["idle", "loading", "ready", "restarting", "stopping", "stopped", "failed"]

SOUND_STATES: tuple[EngineState, ...] = tuple(state for state in get_args(EngineState) if state != "failed")
"""What is said of an engine (`KeptEngine.status`) for which there is nothing to be mended."""
