"""How long what users may write as they like can be: it is kept for as long as what it belongs to."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import to_json

MAX_METADATA_BYTES = 64 * 2**10
"""Of user metadata, as JSON."""


def _fits(metadata: dict[str, Any]) -> dict[str, Any]:
    size = len(to_json(metadata))
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"it takes {size} bytes as JSON; send at most {MAX_METADATA_BYTES}")
    return metadata


Metadata = Annotated[dict[str, Any], AfterValidator(_fits)]

TextMetadata = Annotated[dict[str, str], AfterValidator(_fits)]

Tags = Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=100)]

Name = Annotated[str, Field(max_length=1024)]
"""What something is called for people, or what version a client is of."""

Text = Annotated[str, Field(max_length=64 * 2**10)]
