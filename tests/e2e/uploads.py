"""What `tinker checkpoint push-hf` uploads to: as much of a Hugging Face hub as that needs, for one repository."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """(its address, the files that were committed there, by path)."""
    committed: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"name": "me", "type": "user", "orgs": [], "auth": {}})

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["content-length"]))
            if self.path.endswith("/repos/create"):
                self._answer({"url": f"{url}/me/it"})
            elif "/preupload/" in self.path:
                paths = [file["path"] for file in json.loads(sent)["files"]]
                how = {"uploadMode": "regular", "shouldIgnore": False}
                self._answer({"files": [{"path": path, **how} for path in paths]})
            elif "/commit/" in self.path:
                for line in map(json.loads, sent.splitlines()):
                    if line["key"] == "file":
                        committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self._answer({"commitUrl": f"{url}/me/it/commit/0", "commitOid": "0"})
            else:
                self._answer({})

        def _answer(self, body: dict) -> None:
            content = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield url, committed
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
