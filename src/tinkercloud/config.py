"""Every setting of the server: its default, its unit and what it means.

A value comes from the command line, else from a `TINKERCLOUD_*` variable, else from the TOML file that `--config` (or
`TINKERCLOUD_CONFIG`) names, else from here. What may differ between base models is in `model_settings.py`.
`docs/configuration.md` is made from both.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from tinkercloud.base_models import ModelError, source_folder
from tinkercloud.model_settings import ModelSettings, PerModel, read_models
from tinkercloud.setting_errors import ConfigError, sentences
from tinkercloud.units import MIB

if TYPE_CHECKING:
    from tinkercloud.engine.base_model import EngineOptions

ENV_PREFIX = "TINKERCLOUD_"


def _read_names(value: Any) -> Any:
    """Accepts a list, and (from the environment and the command line) names with commas between them."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _default_data_dir() -> Path:
    if sys.platform == "darwin":
        return Path("~/Library/Application Support/tinkercloud").expanduser()
    base = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_DATA_HOME")
    return Path(base or "~/.local/share").expanduser() / "tinkercloud"


class Settings(PerModel, BaseSettings):
    """The server's settings. Make one with `Settings.load`, whose errors are sentences."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", validate_default=True)

    config: Path | None = Field(None, description="A TOML file with any of these settings.")
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on; one that other machines can reach only with keys (`tinkercloud keys "
        "create`).",
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    allowed_hosts: Annotated[list[str], NoDecode, BeforeValidator(_read_names)] = Field(
        default_factory=list,
        description="Names, without port, by which requests may call the server beside loopback addresses and `host`, "
        "and hosts whose web pages may use it; such as the name of a proxy in front of it. `*` is any: only where a "
        "proxy looks at them.",
    )
    public_url: str | None = Field(
        None,
        pattern="^https?://",
        description="URL, with the prefix if any, by which clients reach this server, where a proxy stands in front of "
        "it that does not pass on the host that they asked; links to downloads begin with it.",
    )
    data_dir: Path = Field(
        default_factory=_default_data_dir,
        description="Folder for the database, checkpoints and snapshots. "
        "The default is the user's data folder, such as `~/.local/share/tinkercloud`.",
    )
    database_url: str | None = Field(
        None,
        description="SQLAlchemy URL of the ledger's database; without it, SQLite in the data folder. "
        "`postgresql+psycopg://USER:PASSWORD@HOST/DATABASE` needs the extra `postgresql`. A database belongs to one "
        "data folder.",
    )
    checkpoints_url: str | None = Field(
        None,
        description="Where named checkpoints are kept from now on, as fsspec's URL of a folder: `s3://BUCKET/PREFIX` "
        "(the extra `s3`), `file:///OTHER/DISK`; without it, the data folder. It belongs to one data folder. See "
        "storage.md.",
    )
    checkpoints_cache_bytes: ByteSize = Field(
        32 * 2**30,
        gt=0,
        description="Bytes in the data folder for copies of checkpoints at `checkpoints_url`; beyond, the least "
        "recently used go, but none of the last ten minutes.",
    )
    tls_cert: Path | None = Field(
        None,
        description="PEM file with the certificate to listen with, and those that lead to its authority; with "
        "`tls_key`, the server speaks HTTPS and nothing else.",
    )
    tls_key: Path | None = Field(None, description="PEM file with the certificate's private key, without a password.")
    sync_to_disk: bool = Field(
        True,
        description="Acknowledge an operation when the disk has it. Without it, for measurements, a power cut may lose "
        "what was acknowledged and damage the database; a kill of the server still loses nothing.",
    )
    log_file: Path | None = Field(None, description="File that the log is appended to; without it, standard error.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    models: Annotated[list[ModelSettings], NoDecode, BeforeValidator(read_models)] = Field(
        default_factory=lambda: [ModelSettings(name="tinkercloud/nano")],
        description="Base models to serve, as `[[models]]` tables or `--model` texts; without any, the embedded model.",
    )

    clients_on_this_machine: bool = Field(
        True,
        description="Name the tokenizers of models that no hub has by their folder to clients at a loopback address. "
        "Turn it off if clients come through a tunnel: they then get the model's name, and `HF_ENDPOINT` resolves it.",
    )
    custom_loss_server_side: bool = Field(
        True,
        description="Run custom losses made with `create_custom_loss` here, in one pass instead of two. Without it the "
        "SDK runs them itself.",
    )
    raw_sample_logprobs: bool = Field(
        False,
        description="Answer samples with the raw model's log-probabilities, at temperature 1, instead of those of the "
        "distribution at the request's temperature; `topk_sample_logprobs` too. See sampling.md.",
    )
    max_body_bytes: ByteSize = Field(64 * MIB, gt=0, description="Largest request body, as it is sent.")
    max_decompressed_bytes: ByteSize = Field(256 * MIB, gt=0, description="Largest request body, decompressed.")
    max_bodies_bytes: ByteSize = Field(
        512 * MIB,
        gt=0,
        description="Bytes of all request bodies in hand at a time, as sent and as decompressed; beyond, clients are "
        "told to wait (429).",
    )
    inline_result_bytes: ByteSize = Field(
        1 * MIB,
        gt=0,
        description="Results above this many bytes are announced by their size first, where the client allows it.",
    )
    poll_seconds: float = Field(
        20, gt=0, lt=45, description="How long a request for a result waits for it; the SDK gives up after 45 s."
    )
    result_retention_seconds: float = Field(
        3600,
        gt=0,
        description="How long a result is kept after it was first retrieved; a sample's that its client acknowledges "
        "goes a minute later.",
    )
    unretrieved_retention_seconds: float = Field(
        7 * 86400, gt=0, description="How long a result that nobody retrieved is kept after its operation ended."
    )
    stability_retention_seconds: float = Field(
        86400,
        gt=0,
        description="How long stable_reinforce can train on a sample with `record_stability_info` after it was drawn; "
        "each batch that names it begins the time anew.",
    )
    session_timeout_seconds: float = Field(
        120, gt=10, description="A session without heartbeats for this long is parked; the SDK sends one every 10 s."
    )
    session_retention_seconds: float = Field(
        7 * 86400, gt=0, description="How long a parked session can come back; then it is finished."
    )
    sampler_retention_seconds: float = Field(
        86400,
        gt=0,
        description="How long the samplers of a finished session are remembered: until then their results can be "
        "retrieved, and the folders of their checkpoints stay, also of deleted ones.",
    )
    ephemeral_sampler_bytes: ByteSize = Field(
        32 * 2**30,
        gt=0,
        description="Bytes on disk for the weights of samplers without a name, such as a reinforcement learning loop "
        "makes in each step. Beyond, the least recently used go, of silent sessions first; their clients are told "
        "(404).",
    )
    gap_timeout_seconds: float = Field(
        360, gt=0, description="How long operations wait for a missing earlier one; the SDK retries for 300 s."
    )
    cycle_tokens: int = Field(
        16384, gt=0, description="Training tokens of different clients that are run together in one cycle."
    )
    snapshot_operations: int = Field(
        64, gt=0, description="Operations of a training run between two snapshots of its state; fewer restart faster."
    )
    snapshot_bytes: ByteSize = Field(
        256 * MIB, gt=0, description="Bytes of a training run's operations between two snapshots, likewise."
    )
    snapshot_seconds: float = Field(
        300, gt=0, description="Seconds after which the oldest operation that no snapshot holds makes one, likewise."
    )
    open_samplers: int = Field(
        64, gt=0, description="Samplers whose weights stay in an engine's memory; others are read again when used."
    )
    max_pending_samples: int = Field(
        20000,
        gt=0,
        description="Sequences (`num_samples` of all requests) that may wait for one base model; beyond, sessions that "
        "have their even share of them are told to wait (429), and all are at twice as many.",
    )

    price_storage: float = Field(
        0, ge=0, allow_inf_nan=False, description="USD for a gigabyte (10^9 bytes) of checkpoints in a month (720 h)."
    )

    @field_validator("data_dir", "log_file", "config", "tls_cert", "tls_key")
    @classmethod
    def _expand(cls, path: Path | None) -> Path | None:
        return path.expanduser() if path else path

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("tls_cert", "tls_key") if self.tls_key is None else ("tls_key", "tls_cert")
            raise ValueError(f"{given} is given without {missing}; a certificate and its key go together")
        return self

    @field_validator("models")
    @classmethod
    def _distinct(cls, models: list[ModelSettings]) -> list[ModelSettings]:
        seen: dict[str, ModelSettings] = {}
        for model in models:
            if model.name in seen:
                raise ValueError(
                    f"two models are called {model.name} (from {seen[model.name].source} and {model.source}); "
                    "give one of them another name with NAME=FOLDER"
                )
            seen[model.name] = model
        return models

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        path = init_settings().get("config") or os.environ.get(ENV_PREFIX + "CONFIG")
        if not path:
            return init_settings, env_settings
        file = Path(path).expanduser()
        if not file.is_file():
            raise ConfigError(f"the configuration file {file} {'is a folder' if file.is_dir() else 'does not exist'}")
        try:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=file)
        except ValueError as error:
            raise ConfigError(f"the configuration file {file} is not TOML: {error}") from None
        except OSError as error:
            raise ConfigError(f"the configuration file {file} cannot be read: {error.strerror}") from None

    @classmethod
    def load(cls, **given: Any) -> Settings:
        """Settings from what is given (the command line; None is not given), the environment, the TOML file and the
        defaults. Raises ConfigError with a sentence about each setting that is wrong."""
        try:
            return cls(**{name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            raise ConfigError(sentences(error, cls)) from None
        except ModelError as error:
            raise ConfigError(str(error)) from None

    def model(self, name: str) -> ModelSettings:
        """The settings of one of the models. KeyError if it is not served."""
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(name)

    def engine_options(self, model: str | ModelSettings) -> EngineOptions:
        """How to load a base model: its own settings, else the server's."""
        from tinkercloud.engine.base_model import EngineOptions

        chosen = self.model(model) if isinstance(model, str) else model
        of_the_engine = [name for name in PerModel.model_fields if name in EngineOptions.__struct_fields__]
        own = {name: self.for_model(chosen, name) for name in of_the_engine}
        return EngineOptions(name=chosen.name, source=source_folder(chosen.source), **own)

    def for_model(self, model: ModelSettings, setting: str) -> Any:
        """One of the settings in `PerModel`: the model's, if it was given there, else the server's."""
        value = getattr(model if setting in model.model_fields_set else self, setting)
        return int(value) if isinstance(value, ByteSize) else value


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[tuple[str, str | None]]:
    """`TINKERCLOUD_*` variables that set nothing, each with the variable that may have been meant."""
    known = [ENV_PREFIX + name.upper() for name in Settings.model_fields]
    strange = sorted(name for name in environ if name.upper().startswith(ENV_PREFIX) and name.upper() not in known)
    return [(name, next(iter(difflib.get_close_matches(name.upper(), known)), None)) for name in strange]
