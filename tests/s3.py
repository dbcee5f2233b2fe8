"""An S3 server of this process's own: moto's, whose objects are in memory."""

from __future__ import annotations

import logging
import os
import uuid
from typing import Any

# Each request is tried once: who stops the server wants to be told so soon.
ENVIRON = {"AWS_MAX_ATTEMPTS": "1"} | {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "eu-west-1",
}


class S3:
    """Start it, and set `environ` in whoever is to find it; stop and start it again as often as you like."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.WARNING)  # which has a line for each request
        self._make = ThreadedMotoServer
        self._server = self._make(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]
        self.environ = ENVIRON | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def stop(self) -> None:
        """Refuse connections from here on; what was stored stays."""
        self._server.stop()

    def start(self) -> None:
        self._server = self._make(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()

    def bucket(self) -> str:
        """The URL of a prefix in a new bucket."""
        name = f"bucket-{uuid.uuid4().hex[:8]}"
        self.files().mkdir(name)
        return f"s3://{name}/checkpoints"

    def files(self) -> Any:
        """The file system that its buckets are in."""
        import s3fs

        return s3fs.S3FileSystem(
            key="testing",
            secret="testing",
            client_kwargs={"endpoint_url": self.environ["AWS_ENDPOINT_URL"], "region_name": "eu-west-1"},
            use_listings_cache=False,
            skip_instance_cache=True,
        )


def use(monkeypatch: Any, s3: S3) -> None:
    """Let this process find it."""
    for name, value in s3.environ.items():
        monkeypatch.setenv(name, value)
    for name in set(os.environ) & {"AWS_PROFILE", "AWS_SESSION_TOKEN"}:
        monkeypatch.delenv(name)
