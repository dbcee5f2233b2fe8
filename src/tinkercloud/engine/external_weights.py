"""External weights: an adapter folder in the published form (`published_layout.py`), if wished encrypted with age.

Encryption is that of https://age-encryption.org: each file is `NAME.age`, for every one of the recipients. Needs no
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyrage

from tinkercloud.engine.operations import OperationError
from tinkercloud.engine.published_layout import write_published

MAX_RECIPIENTS = 10
"""Keys that one export may be encrypted to, as the SDK documents it."""

AGE_SUFFIX = ".age"


def write_external(source: Path, target: Path, recipients: Sequence[str]) -> None:
    """Write the adapter folder `source` into the empty folder `target`, encrypted if there are recipients.

    OperationError if a recipient is none.
    """
    keys = read_recipients(recipients)
    write_published(source, target)
    if keys:
        for file in sorted(target.iterdir()):
            pyrage.encrypt_file(str(file), f"{file}{AGE_SUFFIX}", keys)
            file.unlink()


def read_recipients(recipients: Sequence[str]) -> list[pyrage.x25519.Recipient | pyrage.ssh.Recipient]:
    """The public keys `age1…` and of SSH (ssh-ed25519, ssh-rsa). OperationError names the first that is none."""
    if len(recipients) > MAX_RECIPIENTS:
        raise OperationError(
            f"there are {len(recipients)} age_encryption_recipients; at most {MAX_RECIPIENTS} are served"
        )
    keys = []
    for text in recipients:
        kind = pyrage.ssh if text.startswith("ssh-") else pyrage.x25519
        try:
            keys.append(kind.Recipient.from_str(text))
        except pyrage.RecipientError as error:
            raise OperationError(
                f"age_encryption_recipients has {text!r:.100}, which is no public key ({error}); send age1... keys or "
                "SSH public keys (ssh-ed25519, ssh-rsa)"
            ) from None
    return keys
