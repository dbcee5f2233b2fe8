"""Where things lie in the data directory, and what a tinker:// path means. All folders are relative to that directory.

checkpoints/<run>/weights/<name>/<seq_id>          named training checkpoints
checkpoints/<run>/sampler_weights/<name>/<seq_id>  named sampler checkpoints
checkpoints/<run>/external_weights/<name>/<seq_id> exports for other programs
checkpoints/.<run>/weights/<name>/<seq_id>         an import that no engine has opened yet
cache/<run>/<segment>/<name>/<seq_id>              copies of checkpoints that lie in a store (`checkpoints_url`)
samplers/<sampler>                                 ephemeral samplers
snapshots/<run>/<seq_id>                           whole states of training runs, for recovery
pins/<run>/<unique>                                checkpoints that a run's log loads, for as long as it may be replayed
scratch/<base model>                               what an engine has no memory for; its process's alone
fingerprints/<base model's folder>                 of weights whose files have not changed since they were read

A save never touches the folder of an earlier one: what a name means changes with its record, in one transaction.
"""

from __future__ import annotations

import uuid
from typing import Literal
from urllib.parse import quote

from tinkercloud.errors import InvalidRequest

CheckpointKind = Literal["training", "sampler", "external"]

SAMPLERS = "samplers"
"""The folder of the ephemeral samplers."""

CACHE = "cache"
"""The folder of the copies of stored checkpoints: what a record names there is in the store, whether or not it is here
too. What is in `checkpoints` is nowhere else."""

FINGERPRINTS = "fingerprints"

IMPORT_PREFIX = "import-"

KEPT_TREES = ("checkpoints/*/*/*/*", f"{SAMPLERS}/*", "snapshots/*/*", "pins/*/*")
"""Patterns of the folders that are each written by one operation, and go as a whole."""

TREES = (*KEPT_TREES, f"{CACHE}/*/*/*/*")
"""As `KEPT_TREES`, with those whose files are in a store."""

_SEGMENTS: dict[CheckpointKind, str] = {
    "training": "weights",
    "sampler": "sampler_weights",
    "external": "external_weights",
}
_KINDS: dict[str, CheckpointKind] = {segment: kind for kind, segment in _SEGMENTS.items()}


def checkpoint_path(model_id: str, kind: CheckpointKind, name: str) -> str:
    """tinker://<run>/<weights|sampler_weights|external_weights>/<name>, the checkpoint's name on the wire."""
    return f"tinker://{model_id}/{_SEGMENTS[kind]}/{name}"


def checkpoint_folder(model_id: str, kind: CheckpointKind, name: str, seq_id: int, *, stored: bool = False) -> str:
    """`stored`: it is to be put into the store."""
    return f"{checkpoints_folder(model_id, stored=stored)}/{_SEGMENTS[kind]}/{name}/{seq_id}"


def checkpoints_folder(model_id: str, *, stored: bool = False) -> str:
    return f"{CACHE if stored else 'checkpoints'}/{_folder_name(model_id)}"


def is_stored(folder: str) -> bool:
    """Whether it is of a checkpoint in the store, and a folder of this name here its copy."""
    return folder.startswith(f"{CACHE}/")


def key_of(folder: str) -> str:
    """What a stored checkpoint's folder is called in the store."""
    return folder.removeprefix(f"{CACHE}/")


def import_id() -> str:
    """A new one for the training run that an import is of."""
    return f"{IMPORT_PREFIX}{uuid.uuid4()}"


def is_import(model_id: str) -> bool:
    """Whether it is an `import_id`."""
    return model_id.startswith(IMPORT_PREFIX)


def draft_of(model_id: str) -> str:
    """The run that the folders of an import are of until an engine has opened it; no record ever names them."""
    return f".{model_id}"


def is_import_draft(folder: str) -> bool:
    """Whether it is of a `draft_of` an import."""
    return folder.startswith("checkpoints/.")


def sampler_folder(sampler_id: str) -> str:
    return f"{SAMPLERS}/{_folder_name(sampler_id)}"


def snapshot_folder(model_id: str, seq_id: int) -> str:
    return f"{snapshots_folder(model_id)}/{seq_id}"


def snapshots_folder(model_id: str) -> str:
    return f"snapshots/{_folder_name(model_id)}"


def pin_folder(model_id: str) -> str:
    """A new one at each call: a repeat of a load must not touch what the first one holds."""
    return f"{pins_folder(model_id)}/{uuid.uuid4().hex}"


def pins_folder(model_id: str) -> str:
    return f"pins/{_folder_name(model_id)}"


def scratch_folder(base_model: str) -> str:
    return f"scratch/{quote(base_model, safe='')}"


def session_of(folder: str) -> str:
    """The `session_part` of the folder of an operation; for an import something that is no session's."""
    run_or_sampler = folder.split("/")[1].lstrip(".")  # a draft begins with a dot
    return run_or_sampler.rsplit("_", 2)[0]


def run_part(model_id: str) -> str:
    """What a run is called in folders."""
    return _folder_name(model_id)


def session_part(session_id: str) -> str:
    """What the folders of a session's runs and samplers begin with."""
    return _folder_name(session_id)


def parse_checkpoint_path(path: str) -> tuple[str, CheckpointKind, str]:
    """(run, kind, name) of a tinker:// path. InvalidRequest says what a path looks like."""
    scheme, _, rest = path.partition("://")
    parts = rest.split("/")
    if scheme != "tinker" or len(parts) != 3 or not all(parts) or parts[1] not in _KINDS:
        raise InvalidRequest(
            f"{path!r:.300} is no checkpoint path; expected tinker://<run>/weights/<name>, "
            "tinker://<run>/sampler_weights/<name> or tinker://<run>/external_weights/<name>"
        )
    return parts[0], _KINDS[parts[1]], parts[2]


def _folder_name(identifier: str) -> str:
    """Ids hold colons, which some file systems refuse."""
    return identifier.replace(":", "_")
