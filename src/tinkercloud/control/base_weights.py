"""Whether what was made on a base model is asked to run on other weights that bear its name now.

Such a run or sampler is kept as it is: what was accepted waits, and goes on when its weights are served again.
"""

from __future__ import annotations

from tinkercloud.engine.base_model import BaseModelInfo
from tinkercloud.engine.fingerprint import same_weights
from tinkercloud.ledger.records import CheckpointRecord, ModelRecord, SamplerRecord

DIGITS = 12
"""Of a fingerprint, that are shown."""

MadeOnBase = ModelRecord | SamplerRecord | CheckpointRecord


def fits(made: MadeOnBase, info: BaseModelInfo | None) -> bool:
    """Whether the loaded base model has the weights that it was made on, as far as is known of the two."""
    made_on, served = made.base_fingerprint, info.fingerprint if info else ""
    return not (made_on and served) or same_weights(made_on, served)


def other_weights(made: MadeOnBase, info: BaseModelInfo, former_folder: str | None) -> str:
    """What to tell the owner of something that does not fit. `former_folder`: where its weights lay, if known."""
    name = made.base_model
    lay = f" (they lay in {former_folder})" if former_folder else ""
    # Of an earlier version's fingerprint there is only the last part (see `fingerprint.fingerprint_of`).
    compared = min(len(made.base_fingerprint), len(info.fingerprint))
    was, now = (one[-compared:][:DIGITS] for one in (made.base_fingerprint, info.fingerprint))
    return (
        f"{_called(made)} was made on {name} with weights {was}{lay}, and {name} now stands for other weights, {now} "
        f"(in {info.folder}), on which its numbers would be others. It "
        f"is kept as it is: whoever runs the server can serve the former weights as {name} again, and these under "
        "another name; or go on with what is served now in a new training run"
    )


def _called(made: MadeOnBase) -> str:
    match made:
        case ModelRecord():
            return f"training run {made.model_id}"
        case SamplerRecord():
            return f"sampler {made.sampler_id}"
        case CheckpointRecord():
            return made.path
