"""Writes docs/api/endpoints.md from the application's own description of itself.

python scripts/make_endpoints_doc.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinkercloud.api.app import create_app

PAGE = Path(__file__).parents[1] / "docs" / "api" / "endpoints.md"

HEAD = """# Endpoints

Made by `scripts/make_endpoints_doc.py` from the application; do not edit it by hand. A running server shows the same
under `/docs`.

The protocol is Tinker's: the official SDK is the reference client, and its types say what each field means. JSON bodies
may have fields that are not listed here; they are ignored, except in the objects marked *options*, where an unknown
field with a value is an error. Errors are `{"detail": "..."}` with 400, 401, 403, 404, 405, 410, 413 or 422; 429 and
503 come with `retry-after`. Requests that make a future answer `{"request_id", "model_id"}`; the result comes from
`retrieve_future`.
"""


def endpoints_page() -> str:
    """The page's text."""
    described = create_app(None, None).openapi()  # type: ignore[arg-type]  # describing needs neither
    schemas = described["components"]["schemas"]
    parts = [HEAD]
    shown: list[str] = []
    tag = None
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            if operation["tags"][0] != tag:
                tag = operation["tags"][0]
                parts.append(f"## {tag[0].upper()}{tag[1:]}\n")
            parts.append(f"### {method.upper()} {path}\n\n{operation['description']}\n")
            if "requestBody" in operation and _is_options(_body_name(operation)):
                parts.append("The fields of this body are options.\n")
            if rows := _parameters(operation) + _body(operation, schemas, shown):
                parts.append("\n".join(["| Field | Type | Default |", "|---|---|---|", *rows]) + "\n")
    parts.append("## Objects in requests\n")
    for name in shown:  # grows while it is read: objects hold objects
        schema = schemas[name]
        kind = " (options)" if _is_options(name) else ""
        parts.append(f"### {name}{kind}\n")
        rows = _fields(schema, shown)
        parts.append("\n".join(["| Field | Type | Default |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _body_name(operation: dict[str, Any]) -> str:
    return _named(operation["requestBody"]["content"]["application/json"]["schema"]["$ref"])


def _parameters(operation: dict[str, Any]) -> list[str]:
    return [
        _row(parameter["name"] + (" (path)" if parameter["in"] == "path" else ""), parameter["schema"], required, [])
        for parameter in operation.get("parameters", [])
        for required in [parameter.get("required", False)]
    ]


def _body(operation: dict[str, Any], schemas: dict[str, Any], shown: list[str]) -> list[str]:
    if "requestBody" not in operation:
        return []
    return _fields(schemas[_body_name(operation)], shown)


def _fields(schema: dict[str, Any], shown: list[str]) -> list[str]:
    required = schema.get("required", [])
    return [_row(name, field, name in required, shown) for name, field in schema.get("properties", {}).items()]


def _row(name: str, schema: dict[str, Any], required: bool, shown: list[str]) -> str:
    default = "required" if required else f"`{json.dumps(schema['default'])}`" if "default" in schema else ""
    return f"| `{name}` | {_type(schema, shown)} | {default} |"


def _type(schema: dict[str, Any], shown: list[str]) -> str:
    if "$ref" in schema:
        name = _named(schema["$ref"])
        if name not in shown:
            shown.append(name)
        return f"[{name}](#{name.lower()}{'-options' if _is_options(name) else ''})"
    if "anyOf" in schema:
        return " or ".join(_type(option, shown) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        inner = _type(schema["items"], shown) if schema["items"] else "any"
        return f"list of {inner}"
    if schema.get("type") == "object":
        more = schema.get("additionalProperties")
        return f"object of {_type(more, shown)}" if isinstance(more, dict) and more else "object"
    return schema.get("type", "any")


def _named(reference: str) -> str:
    return reference.rsplit("/", 1)[-1]


def _is_options(name: str) -> bool:
    from tinkercloud.api.wire import json as wire

    return issubclass(getattr(wire, name), wire.Options)


if __name__ == "__main__":
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(endpoints_page())
    print(f"wrote {PAGE}")
