"""What is refused before it reaches a route: names and pages that are not the server's, forms, and too much at once."""

import asyncio
import socket

import httpx
import pytest
import zstandard

from tests.api.conftest import SETTINGS
from tests.serving import Server
from tinkercloud.api.doors import HostCheck
from tinkercloud.api.wire.answers import Json
from tinkercloud.config import Settings


def post(server, **headers) -> httpx.Response:
    return httpx.post(f"{server.url}/api/v1/create_session", content=b'{"sdk_version": "x"}', headers=headers)


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost", "LOCALHOST:9", "[::1]:80", "127.9.9.9"])
def test_every_loopback_name_is_the_servers(server, host):
    assert post(server, host=host).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "[::"])
@pytest.mark.parametrize("route", ["/api/v1/create_session", "/api/v1/healthz", "/hf/a/b/resolve/main/c", "/docs"])
def test_a_name_that_resolves_here_is_not_the_servers(server, host, route):
    answer = httpx.request("POST" if "session" in route else "GET", server.url + route, headers={"host": host})
    assert answer.status_code == 403 and "allowed_hosts" in answer.json()["detail"]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost:3000", "[::", "http://[::1"]
)
def test_another_servers_page_is_refused(server, origin):
    answer = post(server, origin=origin)
    assert answer.status_code == 403 and "pages of" in answer.json()["detail"]


def test_the_servers_own_pages_are_not(server):
    assert post(server, origin=server.url).status_code == 200


@pytest.mark.parametrize("form", ["text/plain", "application/x-www-form-urlencoded", "Multipart/Form-Data; boundary=x"])
def test_a_form_is_refused(server, form):
    answer = post(server, **{"content-type": form})
    assert answer.status_code == 400 and "application/json" in answer.json()["detail"]


def test_a_proxys_name_and_its_pages_can_be_allowed():
    async def route(scope, receive, send) -> None:
        await Json({})(scope, receive, send)

    async def statuses(*allowed: str) -> list[int]:
        transport = httpx.ASGITransport(HostCheck(route, Settings.load(allowed_hosts=",".join(allowed))))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            requests = [
                {"host": "Tinker.Example:8000"},
                {"host": "tinker.example", "origin": "https://tinker.example"},
                {"origin": "https://tinker.example"},
                {"host": "other.example"},
                {"origin": "https://other.example"},
            ]
            return [(await client.post("/", headers=headers)).status_code for headers in requests]

    assert asyncio.run(statuses()) == [403] * 5
    assert asyncio.run(statuses("tinker.EXAMPLE")) == [200, 200, 200, 403, 403]
    assert asyncio.run(statuses("*")) == [200] * 5


class Sending:
    """A request with a body of zeros that has been announced and not sent."""

    def __init__(self, server: Server, size: int):
        self.size = size
        self.socket = socket.create_connection(("127.0.0.1", server.port))
        head = f"POST /api/v1/telemetry HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {size}\r\nConnection: close\r\n"
        self.socket.sendall(f"{head}Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n".encode())
        assert self.socket.recv(100).startswith(b"HTTP/1.1 100"), "it is being read"

    def answer(self) -> str:
        self.socket.sendall(b" " * (self.size - 2) + b"{}")
        parts = []
        while part := self.socket.recv(10_000):
            parts.append(part)
        self.socket.close()
        return b"".join(parts).decode()


def test_more_bodies_than_may_be_in_hand_are_told_to_come_again(server):
    """And are read to their ends, so that their senders see the answer; small ones and what came before are served."""
    limit = SETTINGS["max_bodies_bytes"]
    first = Sending(server, 90_000)
    second = Sending(server, limit - 90_000)
    refused = Sending(server, 70_000).answer()
    assert refused.startswith("HTTP/1.1 429") and "retry-after: 1" in refused and "max_bodies_bytes" in refused
    assert "200 OK" in Sending(server, 1000).answer()
    assert "200 OK" in first.answer()
    assert "200 OK" in Sending(server, 70_000).answer(), "the first one's bytes are free again"
    assert "200 OK" in second.answer()


def test_bodies_count_as_decompressed_and_without_an_announcement(server):
    def send(content, **headers):
        headers = {"content-type": "application/json", **headers}
        return httpx.post(f"{server.url}/api/v1/telemetry", content=content, headers=headers).status_code

    bomb = zstandard.compress(b" " * 900_000 + b"{}")
    in_hand = Sending(server, 90_000)
    assert send(bomb, **{"content-encoding": "zstd"}) == 429
    assert "200 OK" in in_hand.answer()
    assert send(bomb, **{"content-encoding": "zstd"}) == 200, "one alone is always served"
    others = [Sending(server, 90_000), Sending(server, SETTINGS["max_bodies_bytes"] - 100_000)]
    assert send(iter([b" " * 40_000] * 2 + [b"{}"])) == 429
    assert ["200 OK" in other.answer() for other in others] == [True, True]
    assert send(iter([b" " * 40_000] * 2 + [b"{}"])) == 200
