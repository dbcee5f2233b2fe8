"""Numbers of bytes, as settings are written and shown."""

KIB, MIB = 2**10, 2**20
