"""A server in the test's own process, with keys and a database, and the things of one of its users."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx

from tinkercloud.api.app import create_app
from tinkercloud.config import Settings
from tinkercloud.control.service import Service
from tinkercloud.ledger import keys
from tinkercloud.ledger.records import KeyRecord

NANO = "tinkercloud/nano"
PATIENCE = 60


def make_key(data_dir: Path, owner: str, **fields: Any) -> tuple[str, KeyRecord]:
    """A new key, stored as `tinkercloud keys create` does it."""
    secret = keys.new_secret()
    record = KeyRecord(
        0, keys.digest(secret), keys.hint(secret), owner, owner, fields.pop("is_operator", False), time.time(), **fields
    )
    with keys.changing(data_dir, None) as connection:
        return secret, keys.add(connection, record)


class Tenants:
    """The server, and who asks it: alice, whose things there are, bob, an operator, and keys that are not valid."""

    @classmethod
    async def start(cls, data_dir: Path) -> Tenants:
        made = {
            "owner": make_key(data_dir, "alice"),
            "another owner": make_key(data_dir, "bob"),
            "an operator": make_key(data_dir, "root", is_operator=True),
            "a revoked key": make_key(data_dir, "alice"),
            "an expired key": make_key(data_dir, "alice", expires_at=time.time() - 1),
        }
        with keys.changing(data_dir, None) as connection:
            keys.revoke(connection, made["a revoked key"][1].key_id, time.time())
        settings = Settings.load(data_dir=data_dir, poll_seconds=1)
        service = await Service.start(settings, lambda model, fraction, text: None)
        return cls(data_dir, settings, service, {who: secret for who, (secret, _) in made.items()})

    def __init__(self, data_dir: Path, settings: Settings, service: Service, secrets: dict[str, str]):
        self.data_dir, self.service, self.app = data_dir, service, create_app(service, settings)
        self.secrets: dict[str, str | None] = secrets | {"no key": None, "a wrong key": "tml-" + "x" * 43}
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1/api/v1", timeout=PATIENCE)

    async def stop(self) -> None:
        await self.http.aclose()
        await self.service.stop()

    async def ask(self, who: str, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        """What the server answers to this one."""
        secret = self.secrets[who]
        headers = ({"x-api-key": secret} if secret else {}) | headers
        return await self.http.request(method, path, json=body, headers=headers)

    async def post(self, route: str, who: str = "owner", /, **body: Any) -> dict[str, Any]:
        answer = await self.ask(who, "POST", route, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def result(self, future: dict[str, Any], who: str = "owner") -> dict[str, Any]:
        for _ in range(PATIENCE):
            answer = await self.ask(who, "POST", "/retrieve_future", {"request_id": future["request_id"]})
            if answer.status_code != 408:
                return answer.json()
        raise AssertionError(f"no result of {future}")

    async def begin(self, who: str = "owner") -> Things:
        """A session with a training run that has learned something, a checkpoint, a sampler and a sample."""
        things = Things()
        things.session = (await self.post("/create_session", who, sdk_version="x"))["session_id"]
        made = await self.post("/create_model", who, session_id=things.session, model_seq_id=0, base_model=NANO,
                               lora_config={"rank": 2, "seed": 1})  # fmt: skip
        things.run = made["model_id"]
        sampler = await self.post(
            "/create_sampling_session", who, session_id=things.session, sampling_session_seq_id=0, base_model=NANO
        )
        things.sampler = sampler["sampling_session_id"]
        saved = await self.post("/save_weights", who, model_id=things.run, seq_id=1, path="first")
        things.request = saved["request_id"]
        things.checkpoint = (await self.result(saved, who))["path"]
        things.seq_id = 2
        return things


class Things:
    """What belongs to one user, by id."""

    session: str
    run: str
    sampler: str
    checkpoint: str
    request: str
    """Of a future that has ended."""
    seq_id: int
    """The next one of the run."""

    def ids(self) -> list[str]:
        return [self.session, self.run, self.sampler, self.checkpoint]


def json_batch() -> dict[str, Any]:
    """A small cross_entropy batch in its JSON form."""
    targets = {"data": [6, 7, 5], "dtype": "int64"}
    weights = {"data": [1.0, 1.0, 1.0], "dtype": "float32"}
    datum = {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "loss_fn_inputs": {"target_tokens": targets, "weights": weights},
    }
    return {"data": [datum], "loss_fn": "cross_entropy"}
