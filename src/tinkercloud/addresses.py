"""The addresses that a server listens on: which of them only this machine reaches, and their URLs."""

from __future__ import annotations

import ipaddress
from functools import lru_cache


@lru_cache(maxsize=256)  # asked of each request's host
def is_loopback(host: str) -> bool:
    """Whether a host is this machine, and cannot be reached from another one."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def server_url(host: str, port: int, tls: bool = False) -> str:
    """Where a server that listens there is found."""
    return f"http{'s' * tls}://{f'[{host}]' if ':' in host else host}:{port}"
