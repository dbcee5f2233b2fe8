"""Writes docs/configuration.md from the server's settings: python scripts/make_configuration_doc.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ByteSize
from pydantic.fields import FieldInfo

from tinkercloud.config import ENV_PREFIX, Settings
from tinkercloud.model_settings import ModelSettings, PerModel
from tinkercloud.units import KIB, MIB

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

INTRODUCTION = f"""\
# Configuration

*Made from `src/tinkercloud/config.py` and `src/tinkercloud/model_settings.py` by `scripts/make_configuration_doc.py`.*

A setting comes from the command line, else from a variable, else from a TOML file, else it has its default:

```bash
tinkercloud serve --port 9000 --set token_budget=8192     # every setting: --set SETTING=VALUE
{ENV_PREFIX}TOKEN_BUDGET=8192 tinkercloud serve             # every setting: {ENV_PREFIX} and its name
tinkercloud serve --config server.toml                    # or {ENV_PREFIX}CONFIG=server.toml
```

Bytes may be written as `256MiB`. Relative paths start at the folder that the server is started in. A setting that does
not exist is an error that names the nearest one; `tinkercloud doctor` with the same options as `serve` says what else
is wrong.

## Base models

Without any, the server has the embedded model `tinkercloud/nano`. On the command line, a model is one of

| `--model` | Clients' `base_model` | Files |
|---|---|---|
| `Qwen/Qwen3-8B` | `Qwen/Qwen3-8B` | from Hugging Face, or its cache |
| `./models/mine`, `/srv/mine` | `mine` | the folder |
| `me/mine=./models/mine` | `me/mine` | the folder |
| `models/mine`, if there is such a folder | `models/mine` | the folder, not a model of that name on the hub |
| `tinkercloud/nano` | `tinkercloud/nano` | come with the package |

A folder is called as it is written where that can be a model's name, else by its last part; `tinkercloud doctor` and
`serve` show the names. A model may have settings of its own behind it, as in
`--model me/mine=./models/mine,max_rank=64,lazy=true`. The same in TOML:

```toml
max_rank = 32                  # of every model that does not say otherwise

[[models]]
name = "Qwen/Qwen3-8B"
device = "cuda:0"

[[models]]
name = "me/mine"
source = "./models/mine"
max_rank = 64
lazy = true
```

`{ENV_PREFIX}MODELS` is one `--model` text, or a JSON list of them.
"""


def page() -> str:
    """The whole page, as docs/configuration.md must be."""
    own = [name for name in ModelSettings.model_fields if name not in PerModel.model_fields]
    server = [name for name in Settings.model_fields if name not in PerModel.model_fields]
    return "\n".join(
        [
            INTRODUCTION,
            "Each model has",
            "",
            *_table({name: ModelSettings.model_fields[name] for name in own}),
            "",
            "and may set for itself what otherwise holds for all:",
            "",
            *_table(PerModel.model_fields),
            "",
            "## The server",
            "",
            *_table({name: Settings.model_fields[name] for name in server}),
            "",
        ]
    )


def _table(fields: dict[str, FieldInfo]) -> list[str]:
    rows = [f"| `{name}` | {_default(field)} | {field.description} |" for name, field in fields.items()]
    return ["| Setting | Default | Meaning |", "|---|---|---|", *rows]


def _default(field: FieldInfo) -> str:
    value: Any = field.default
    if field.is_required():
        return "required"
    if field.default_factory is not None or value in (None, ""):
        return "-"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if field.annotation is ByteSize:
        return f"`{value // MIB}MiB`" if value % MIB == 0 else f"`{value // KIB}KiB`"
    return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(page())
