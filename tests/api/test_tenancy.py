"""Every endpoint, asked with no key, keys that are not valid, another owner's, and the owner's.

The rows are held to the application's own routes: a route that has none here fails.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import jwt
import pytest
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto

from tests.api.tenants import NANO, Tenants, Things, json_batch, make_key
from tinkercloud.api import tokens
from tinkercloud.api.app import create_app
from tinkercloud.ledger import keys

NOBODY = ("no key", "a wrong key", "a revoked key", "an expired key")
REASON = {"reason": {"type": "success"}}
GRAPH = {
    "format": 1,
    "nodes": [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": [], "kwargs": {}},
        {"op": "call_method", "name": "total", "target": "sum", "args": [{"ref": "logprobs"}], "kwargs": {}},
        {"op": "output", "name": "output", "target": "output", "args": [{"tuple": [{"ref": "total"}, {"dict": {}}]}],
         "kwargs": {}},
    ],
}  # fmt: skip


class Row(NamedTuple):
    """How a route is asked for what is somebody's."""

    path: Callable[[Things], str]
    body: Callable[[Things], Any] = lambda things: None
    other: int = 404
    """What another owner gets; where it is 404, word for word as for what does not exist."""
    owner: int = 200
    ends: bool = False
    """It ends what it is asked for, which therefore nobody else needs."""


def at(path: str) -> Callable[[Things], str]:
    """The same for everybody."""
    return lambda things: path


def only_operators(path: str, body: Any = None) -> Row:
    return Row(at(path), lambda things: body, other=403, owner=403)


def of_the_caller(path: str, body: Any = None) -> Row:
    """What is about nobody else: its answer to another owner must not show anything of the owner."""
    return Row(at(path), lambda things: body, other=200)


def operation(path: str, /, **fields: Any) -> Row:
    return Row(at(path), lambda things: {"model_id": things.run, "seq_id": things.seq_id} | fields)


CHECKPOINT = "/training_runs/{training_run_id}/checkpoints/{segment}/{name}"


def checkpoint(things: Things) -> str:
    run, name = things.checkpoint.removeprefix("tinker://").split("/", 1)
    return f"/training_runs/{run}/checkpoints/{name}"


def this_hour() -> str:
    """The time of a question about usage."""
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    end = hour + timedelta(hours=2)  # should the next one begin meanwhile
    return f"starting_on={hour:%Y-%m-%dT%H:%M:%SZ}&ending_before={end:%Y-%m-%dT%H:%M:%SZ}"


ROWS: dict[str, Row] = {
    "POST /client/config": of_the_caller("/client/config", {"sdk_version": "x"}),
    "POST /client/dynamic_config": of_the_caller("/client/dynamic_config", {"sdk_version": "x"}),
    "POST /auth/token": of_the_caller("/auth/token", {}),
    "GET /auth/apikey/me": of_the_caller("/auth/apikey/me"),
    "GET /get_server_capabilities": of_the_caller("/get_server_capabilities"),
    "POST /telemetry": of_the_caller("/telemetry", {}),
    "POST /create_session": of_the_caller("/create_session", {"sdk_version": "x"}),
    "POST /session_heartbeat": Row(at("/session_heartbeat"), lambda things: {"session_id": things.session}),
    "POST /sessions/{session_id}/finish": Row(
        lambda things: f"/sessions/{things.session}/finish", lambda things: REASON, ends=True
    ),
    "GET /sessions": of_the_caller("/sessions"),
    "GET /sessions/{session_id}": Row(lambda things: f"/sessions/{things.session}"),
    "POST /create_model": Row(
        at("/create_model"),
        lambda things: {
            "session_id": things.session,
            "model_seq_id": 9,
            "base_model": NANO,
            "lora_config": {"rank": 2},
        },
    ),
    "POST /get_info": Row(at("/get_info"), lambda things: {"model_id": things.run}),
    "POST /unload_model": Row(at("/unload_model"), lambda things: {"model_id": things.run}, ends=True),
    "POST /forward_backward": operation("/forward_backward", forward_backward_input=json_batch()),
    "POST /forward": operation("/forward", forward_input=json_batch()),
    "POST /optim_step": operation("/optim_step", adam_params={}),
    "POST /create_custom_loss": Row(
        at("/create_custom_loss"),
        lambda things: {
            "session_id": things.session,
            "custom_loss_seq_id": 0,
            "name": "mine",
            "inputs": [{"name": "logprobs", "rank": 1}],
            "graph": GRAPH,
        },
    ),
    "POST /save_weights": operation("/save_weights", path="again"),
    "POST /save_weights_for_sampler": operation("/save_weights_for_sampler", path="again"),
    "POST /load_weights": Row(
        at("/load_weights"),
        lambda things: {
            "model_id": things.run,
            "seq_id": things.seq_id,
            "path": things.checkpoint,
            "optimizer": True,
        },
    ),
    "POST /create_sampling_session": Row(
        at("/create_sampling_session"),
        lambda things: {"session_id": things.session, "sampling_session_seq_id": 5, "base_model": NANO},
    ),
    "GET /samplers/{sampler_id}": Row(lambda things: f"/samplers/{things.sampler}"),
    "POST /join_sampling_session": Row(
        at("/join_sampling_session"), lambda things: {"sampling_session_id": things.sampler}
    ),
    "POST /asample": Row(
        at("/asample"),
        lambda things: {
            "sampling_session_id": things.sampler,
            "seq_id": 0,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]},
            "sampling_params": {"max_tokens": 1},
        },
    ),
    "POST /retrieve_future": Row(at("/retrieve_future"), lambda things: {"request_id": things.request}),
    "POST /retrieve_futures": Row(
        at("/retrieve_futures"), lambda things: {"target": {"sampling_session_id": things.sampler}, "timeout": 0}
    ),
    "POST /cancel_future": Row(
        at("/cancel_future"), lambda things: {"request_id": things.request}, other=200, owner=400
    ),
    "GET /training_runs": of_the_caller("/training_runs"),
    "GET /training_runs/{training_run_id}": Row(lambda things: f"/training_runs/{things.run}"),
    "GET /training_runs/{training_run_id}/checkpoints": Row(lambda things: f"/training_runs/{things.run}/checkpoints"),
    "GET /checkpoints": of_the_caller("/checkpoints"),
    "POST /weights_info": Row(at("/weights_info"), lambda things: {"tinker_path": things.checkpoint}),
    "POST /copy_weights": Row(
        at("/copy_weights"), lambda things: {"source_path": things.checkpoint, "destination_project_id": "p"}
    ),
    "POST /save_weights_external": operation("/save_weights_external", path="again"),
    f"GET {CHECKPOINT}/external_weights_urls": Row(
        lambda things: f"{checkpoint(things)}/external_weights_urls", owner=400
    ),
    f"GET {CHECKPOINT}/archive": Row(lambda things: f"{checkpoint(things)}/archive", owner=302),
    f"PUT {CHECKPOINT}/ttl": Row(
        lambda things: f"{checkpoint(things)}/ttl", lambda things: {"ttl_seconds": None}, owner=204
    ),
    f"DELETE {CHECKPOINT}/publish": Row(lambda things: f"{checkpoint(things)}/publish", owner=204),
    f"POST {CHECKPOINT}/publish": Row(lambda things: f"{checkpoint(things)}/publish", owner=204, ends=True),
    f"DELETE {CHECKPOINT}": Row(checkpoint, owner=204, ends=True),
    "PUT /sessions/{session_id}/project": Row(
        lambda things: f"/sessions/{things.session}/project", lambda things: {"project_id": "p"}, owner=204
    ),
    "GET /sessions/{session_id}/trace_export": Row(lambda things: f"/sessions/{things.session}/trace_export"),
    "POST /sessions/search": of_the_caller("/sessions/search", {"owner": {"type": "accessible"}}),
    "GET /billing/usage/events": Row(lambda things: f"/billing/usage/events?{this_hour()}", other=200),
    "GET /billing/usage/checkpoints/current": of_the_caller("/billing/usage/checkpoints/current"),
    "GET /admin/models": only_operators("/admin/models"),
    "POST /admin/models": only_operators("/admin/models", {"name": "a/b"}),
    "DELETE /admin/models/{name:path}": only_operators("/admin/models/a/b"),
    "POST /admin/checkpoints/import": only_operators("/admin/checkpoints/import", {"folder": "/", "name": "x"}),
    "GET /admin/sessions": only_operators("/admin/sessions"),
    "POST /admin/sessions/{session_id}/stop": only_operators("/admin/sessions/x/stop", {}),
    "POST /admin/sessions/{session_id}/drain": only_operators("/admin/sessions/x/drain", {}),
    "POST /admin/training_runs/{model_id}/stop": only_operators("/admin/training_runs/x/stop", {}),
    "POST /admin/samplers/{sampler_id}/stop": only_operators("/admin/samplers/x/stop", {}),
    "GET /audit": only_operators("/audit"),
    "DELETE /auth/apikey/me": of_the_caller("/auth/apikey/me")._replace(ends=True),
}

WITHOUT_A_KEY = {
    "GET /api/v1/healthz",
    "GET /api/v1/downloads/{token}/{name}",
    "GET /hf/api/models/{repository:path}",
    "GET /hf/api/models/{repository:path}/revision/{revision}",
    "GET /hf/api/models/{repository:path}/tree/{revision}",
    "GET /hf/api/models/{repository:path}/tree/{revision}/{folder:path}",
    "GET /hf/{repository:path}/resolve/{revision}/{file:path}",
    "GET /openapi.json",
    "GET /docs",
    "GET /docs/oauth2-redirect",
    "GET /redoc",
}
"""Whether the server is up, what a signed link is to, tokenizers (a hub's client has no key), and the description of
this API."""


def routes() -> set[str]:
    """Every route of the application, by method and path."""
    app = create_app(None, None)  # type: ignore[arg-type]  # to describe itself it needs neither
    return set(_named(app.routes, ""))


def _named(found: list[Any], prefix: str) -> Iterator[str]:
    for route in found:
        if hasattr(route, "original_router"):  # FastAPI keeps what was included apart
            yield from _named(route.original_router.routes, prefix + route.include_context.prefix)
        else:
            yield from (f"{method} {prefix}{route.path}" for method in route.methods - {"HEAD"})


def test_every_route_is_in_the_matrix():
    assert routes() == {f"{name.split()[0]} /api/v1{name.split()[1]}" for name in ROWS} | WITHOUT_A_KEY


def nothing_like(things: Things) -> Things:
    """Ids of the same form, of things that are not there."""
    none = Things()
    for name, value in vars(things).items():
        none.__dict__[name] = value.replace(things.session, things.session[::-1]) if isinstance(value, str) else value
    return none


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.ends])
def test_who_is_answered(tenants, name):
    tenants.run(_ask_everybody(tenants, name, tenants.things))


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.ends])
def test_who_may_end_things(tenants, name):
    async def story():
        things, secret = await tenants.begin(), tenants.secrets["owner"]
        tenants.secrets["owner"], _ = make_key(tenants.data_dir, "alice")  # it may be the key that ends
        await tenants.service.keys.refresh()
        try:
            await _ask_everybody(tenants, name, things)
        finally:
            tenants.secrets["owner"] = secret

    tenants.run(story())


async def _ask_everybody(tenants: Tenants, name: str, things: Things) -> None:
    row, method = ROWS[name], name.split()[0]
    for who in NOBODY:
        answer = await tenants.ask(who, method, row.path(things), row.body(things))
        assert answer.status_code == 401, (who, answer.text)
        assert answer.headers["www-authenticate"].startswith("Bearer") and "detail" in answer.json()
        assert "invalid_token" not in answer.headers["www-authenticate"], "it was no token"
    if not (name.endswith("/auth/apikey/me") and row.ends):
        answer = await tenants.ask("another owner", method, row.path(things), row.body(things))
        assert answer.status_code == row.other, answer.text
        if row.other == 404:
            none = nothing_like(things)
            nothing = await tenants.ask("another owner", method, row.path(none), row.body(none))
            assert nothing.status_code == 404
            assert answer.text.replace(things.session, none.session) == nothing.text, "it shows that it exists"
        elif row.other == 200:
            shown = answer.text
            assert not [thing for thing in things.ids() if thing in shown] and "alice" not in shown
    answer = await tenants.ask("owner", method, row.path(things), row.body(things))
    assert answer.status_code == row.owner, answer.text
    if answer.status_code == 200 and "model_id" in answer.json() and "seq_id" in (row.body(things) or {}):
        things.seq_id += 1


def test_a_token_stands_for_its_key(tenants):
    """As X-API-Key and as a bearer's; not when its time is over, nor when its key was revoked."""

    async def story():
        _, of_a_while = make_key(tenants.data_dir, "alice")
        await tenants.service.keys.refresh()
        token = (await tenants.post("/auth/token"))["jwt"]
        tenants.secrets |= {
            "a token": token,
            "a token of a while": tokens.issue("alice", of_a_while, tenants.data_dir),
            "an old token": _expired(token, tenants),
            "a token from before keys": tokens.issue("local", None, tenants.data_dir),
            "whoever can read the data directory": tokens.issue_operators(tenants.data_dir),
        }
        path = f"/sessions/{tenants.things.session}"
        assert (await tenants.ask("a token", "GET", path)).status_code == 200
        assert (await tenants.ask("a token of a while", "GET", path)).status_code == 200
        bearer = await tenants.ask("no key", "GET", path, authorization=f"Bearer {token}")
        assert bearer.status_code == 200
        key = await tenants.ask("no key", "GET", path, authorization=f"bearer {tenants.secrets['owner']}")
        assert key.status_code == 200
        with keys.changing(tenants.data_dir, None) as connection:
            keys.revoke(connection, of_a_while.key_id, time.time())
        await asyncio.sleep(1)
        for who in ("an old token", "a token of a while", "a token from before keys"):
            answer = await tenants.ask(who, "GET", path)
            assert answer.status_code == 401, who
            assert 'error="invalid_token"' in answer.headers["www-authenticate"]
        assert (await tenants.ask("whoever can read the data directory", "GET", path)).status_code == 404
        listed = await tenants.ask("whoever can read the data directory", "GET", "/admin/models")
        assert listed.json()["models"][0]["name"] == NANO

    tenants.run(story())


def _expired(token: str, tenants: Tenants) -> str:
    secret = tokens.secret(tenants.data_dir)
    claims = jwt.decode(token, secret, algorithms=["HS256"])
    return jwt.encode(claims | {"exp": time.time() - 1}, secret, algorithm="HS256")


def test_an_operator_may_administer_and_owns_nothing_more(tenants):
    async def story():
        assert (await tenants.ask("an operator", "GET", "/admin/models")).status_code == 200
        assert (await tenants.ask("an operator", "GET", f"/sessions/{tenants.things.session}")).status_code == 404

    tenants.run(story())


def test_a_refusal_waits_for_no_body_and_a_key_may_call_the_server_anything(tenants):
    async def story():
        large = await tenants.http.post("/forward_backward", content=b" " * 10**6, headers={"x-api-key": "tml-x"})
        assert large.status_code == 401
        for header in (b"x-api-key", b"authorization"):
            answer = await tenants.http.get("/sessions", headers=[(header, b"\xff")])
            assert answer.status_code == 401
        called = await tenants.ask("owner", "GET", "/sessions", host="tinker.example")
        assert called.status_code == 200

    tenants.run(story())


def test_lists_show_what_is_the_owners(tenants):
    async def story():
        for path in ("/sessions", "/training_runs", "/checkpoints"):
            of_owner = await tenants.ask("owner", "GET", path)
            assert tenants.things.session in of_owner.text
            assert tenants.things.session not in (await tenants.ask("another owner", "GET", path)).text

    tenants.run(story())


def test_usage_is_shown_to_who_has_used(tenants):
    async def story():
        things = await tenants.begin()
        trained = await tenants.post(
            "/forward_backward", model_id=things.run, seq_id=2, forward_backward_input=json_batch()
        )
        await tenants.result(trained)
        path = f"/billing/usage/events?{this_hour()}"
        assert things.session in (await tenants.ask("owner", "GET", path)).text
        assert things.session not in (await tenants.ask("another owner", "GET", path)).text

    tenants.run(story())


def test_a_link_ends_with_its_key_and_with_the_publication(tenants):
    async def story():
        things = await tenants.begin()
        await tenants.ask("owner", "POST", f"{checkpoint(things)}/publish")
        tenants.secrets["a key of a while"], of_a_while = make_key(tenants.data_dir, "alice")
        await tenants.service.keys.refresh()

        async def link_of(who: str) -> str:
            answer = await tenants.ask(who, "GET", f"{checkpoint(things)}/archive")
            assert answer.status_code == 302, answer.text
            return answer.headers["location"]

        async def status(link: str) -> int:
            return (await tenants.http.get(link)).status_code

        trace = await tenants.ask("a key of a while", "GET", f"/sessions/{things.session}/trace_export")
        owners, readers, of_key = [await link_of(who) for who in ("owner", "another owner", "a key of a while")]
        links = owners, readers, of_key, trace.json()["url"]
        assert [await status(link) for link in links] == [200, 200, 200, 200]
        await tenants.ask("owner", "DELETE", f"{checkpoint(things)}/publish")
        assert [await status(link) for link in links] == [200, 404, 200, 200]
        await tenants.service.keys.revoke(of_a_while)
        assert [await status(link) for link in links] == [200, 404, 404, 404]

    tenants.run(story())


def test_nul_is_refused_wherever_it_stands(tenants):
    """PostgreSQL stores none; only SQLite does."""

    async def story():
        things = await tenants.begin()
        for method, path, body in (
            ("GET", "/sessions/%00", None),
            ("GET", "/training_runs?project_id=%00", None),
            ("POST", "/get_info", {"model_id": "\0"}),
            ("POST", "/create_session", {"sdk_version": "x", "user_metadata": {"a": ["b\0"]}}),
            ("POST", "/create_session", {"sdk_version": "x", "user_metadata": {"\0": "b"}}),
            ("POST", "/save_weights", {"model_id": things.run, "seq_id": 2, "path": "\0"}),
        ):
            answer = await tenants.ask("owner", method, path, body)
            assert answer.status_code == 400 and "NUL" in answer.json()["detail"], answer.text
        # The refusal has used up its place in the run, and what only looks like one is none.
        await tenants.post("/save_weights", model_id=things.run, seq_id=3, path="x")
        named = await tenants.post("/create_session", sdk_version="x", display_name="\\u0000")
        assert named["session_id"]
        message = forward_backward_request_to_proto(
            types.ForwardBackwardRequest(types.ForwardBackwardInput([], "cross_entropy"), "\0", 1)
        )
        headers = {"content-type": "application/x-protobuf", "x-api-key": tenants.secrets["owner"]}
        sent = await tenants.http.post("/forward_backward", content=message.SerializeToString(), headers=headers)
        assert sent.status_code == 400 and "NUL" in sent.text

    tenants.run(story())


def test_a_published_checkpoint_is_everybodys_to_read_and_its_owners_to_change(tenants):
    async def story():
        things = await tenants.begin()
        await tenants.begin("another owner")

        async def ask(method: str, path: str, body: Any = None, who: str = "another owner", **headers: str):
            return (await tenants.ask(who, method, path, body, **headers)).status_code

        info = {"tinker_path": things.checkpoint}
        copy = {"source_path": things.checkpoint, "destination_project_id": "p"}
        publish = f"{checkpoint(things)}/publish"
        assert await ask("POST", "/weights_info", info) == 404
        assert await ask("POST", publish) == 404, "it is not his to publish"
        assert await ask("POST", publish, who="owner") == 204
        assert await ask("POST", "/weights_info", info) == await ask("POST", "/copy_weights", copy) == 200
        for method, path in (("DELETE", checkpoint(things)), ("DELETE", publish), ("PUT", f"{checkpoint(things)}/ttl")):
            assert await ask(method, path, {"ttl_seconds": 3600}) == 404, f"{method} is its owner's"
        assert await ask("DELETE", publish, who="owner") == 204
        assert await ask("POST", "/weights_info", info) == await ask("POST", "/copy_weights", copy) == 404

        token = tenants.secrets["owner"]
        header = {"x-tinker-weights-access-token": token}
        assert await ask("POST", "/copy_weights", copy, **header) == 200
        assert await ask("POST", "/copy_weights", copy, **{"x-tinker-weights-access-token": "tml-no"}) == 403
        session = (await tenants.post("/create_session", "another owner", sdk_version="x"))["session_id"]
        load = {"session_id": session, "model_seq_id": 0, "path": things.checkpoint, "optimizer": True}
        assert await ask("POST", "/load_weights", load) == 404
        loading = await tenants.post("/load_weights", "another owner", **load, weights_access_token=token)
        assert (await tenants.result(loading, "another owner"))["path"] == things.checkpoint

    tenants.run(story())
