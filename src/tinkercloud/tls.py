"""The certificate with which a server speaks HTTPS."""

from __future__ import annotations

import ssl

from tinkercloud.config import Settings


def unusable_certificate(settings: Settings) -> str | None:
    """Why the server's certificate and key cannot be used; None if they can, or there are none."""
    if settings.tls_cert is None:
        return None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except OSError as error:  # ssl's errors are some
        return (
            f"{settings.tls_cert} and {settings.tls_key} are no certificate and its key that can be read "
            f"({error.strerror or error}); both are PEM files, the key without a password"
        )
    return None
