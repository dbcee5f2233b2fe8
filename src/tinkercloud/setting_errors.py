"""What is wrong with settings, in sentences that name the setting and say what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from tinkercloud.base_models import ModelError


class ConfigError(Exception):
    """A setting is wrong. The text says which one, and what would be right."""


def sentences(error: ValidationError, kind: type[BaseModel]) -> str:
    """What is wrong with each setting of a `kind`."""
    return "; ".join(_sentence(problem, kind.model_fields) for problem in error.errors())


def _sentence(problem: Any, known: Iterable[str]) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place, known, n=1)
        meant = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(sorted(known))}"
        return f"there is no setting {place!r}; {meant}"
    if problem["type"] == "value_error":
        error = problem["ctx"]["error"]
        return str(error) if isinstance(error, ModelError) or not place else f"{place}: {error}"
    return f"{place}: {problem['msg']} (it is {problem['input']!r})"
