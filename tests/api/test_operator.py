"""What an operator sees and may end, and what the audit log says of everybody."""

import json

import pytest
from tinker import types

from tests.api.tenants import json_batch, make_key
from tests.api.test_tenancy import ROWS
from tinkercloud.api.app import PREFIX, create_app
from tinkercloud.api.audit import event_of
from tinkercloud.ledger.writer import DiskFull

UNRECORDED = {
    "POST /client/config",
    "POST /client/dynamic_config",
    "POST /auth/token",
    "POST /telemetry",
    "POST /session_heartbeat",
    "POST /get_info",
    "POST /forward_backward",
    "POST /forward",
    "POST /optim_step",
    "POST /create_custom_loss",
    "POST /join_sampling_session",
    "POST /asample",
    "POST /retrieve_future",
    "POST /retrieve_futures",
    "POST /cancel_future",
    "POST /weights_info",
    "POST /sessions/search",
}
"""What changes nothing that outlives its session, or is a step of what was recorded when it began."""


async def operate(tenants, path: str) -> dict:
    answer = await tenants.ask("an operator", "POST", f"/admin/{path}", {})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_operator_sees_everybodys_sessions(tenants):
    async def story():
        things = await tenants.begin("another owner")
        listed = (await tenants.ask("an operator", "GET", "/admin/sessions")).json()["sessions"]
        owners = {session["session_id"]: session["owner"] for session in listed}
        assert owners[things.session] == "bob" and owners[tenants.things.session] == "alice"
        (mine,) = (session for session in listed if session["session_id"] == things.session)
        assert [run["model_id"] for run in mine["training_runs"]] == [things.run]
        assert [sampler["sampler_id"] for sampler in mine["samplers"]] == [things.sampler]
        await operate(tenants, f"sessions/{things.session}/stop")
        gone = await tenants.ask("another owner", "POST", "/session_heartbeat", {"session_id": things.session})
        assert gone.status_code == 410 and "stopped by the operator" in gone.text
        listed = (await tenants.ask("an operator", "GET", "/admin/sessions")).text
        assert things.session not in listed
        assert things.session in (await tenants.ask("an operator", "GET", "/admin/sessions?finished=true")).text
        saved = await tenants.ask("another owner", "POST", "/weights_info", {"tinker_path": things.checkpoint})
        assert saved.status_code == 200, "checkpoints stay"
        for path in ("sessions/x/stop", "sessions/x/drain", "training_runs/x/stop", "samplers/x/stop"):
            assert (await tenants.ask("an operator", "POST", f"/admin/{path}", {})).status_code == 404

    tenants.run(story())


def test_a_drained_session_has_done_what_it_accepted(tenants):
    async def story():
        things = await tenants.begin()
        send = {"model_id": things.run, "forward_backward_input": json_batch()}
        sent = [await tenants.post("/forward_backward", seq_id=seq_id, **send) for seq_id in range(2, 6)]
        part = await tenants.ask("an operator", "POST", f"/admin/sessions/{things.run}/drain", {})
        assert part.status_code == 404 and f"the whole one, {things.session}" in part.text
        assert (await operate(tenants, f"sessions/{things.session}/drain"))["drained"]
        for future in sent:
            assert "loss_fn_outputs" in await tenants.result(future)
        assert (await tenants.ask("owner", "POST", "/forward_backward", send | {"seq_id": 9})).status_code == 404

    tenants.run(story())


def test_a_training_run_is_stopped_and_its_session_goes_on(tenants):
    async def story():
        things = await tenants.begin()
        send = {"model_id": things.run, "forward_backward_input": json_batch()}
        waits = await tenants.post("/forward_backward", seq_id=3, **send)  # for seq_id 2
        await operate(tenants, f"training_runs/{things.run}/stop")
        failed = await tenants.result(waits)
        assert failed["category"] == "user" and "stopped by the operator" in failed["error"]
        await tenants.post("/session_heartbeat", session_id=things.session)

    tenants.run(story())


@pytest.mark.parametrize("what", ["samplers", "sessions"])
def test_a_sampler_is_stopped_with_what_it_draws(tenants, what):
    """By itself, or with its session."""

    async def story():
        things = await tenants.begin()
        sample = {
            "sampling_session_id": things.sampler,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5]}]},
        }
        options = {"sampling_params": {"max_tokens": 400, "stop": []}, "num_samples": 8}
        await tenants.post("/asample", seq_id=0, **sample, **options)
        await operate(tenants, f"{what}/{things.sampler if what == 'samplers' else things.session}/stop")
        assert not await tenants.service._ledger.pending(things.sampler)
        gone = await tenants.ask("owner", "POST", "/asample", sample | {"seq_id": 1} | options)
        assert gone.status_code in (404, 410)

    tenants.run(story())


def test_the_audit_log_says_who_did_what(tenants):
    async def story():
        things = await tenants.begin()
        await operate(tenants, f"sessions/{things.session}/stop")
        refused = await tenants.ask(
            "another owner", "POST", f"/sessions/{things.session}/finish", {"reason": {"type": "errored"}}
        )
        assert refused.status_code == 404
        answer = await tenants.ask("an operator", "GET", "/audit")
        log = types.AuditLogResponse.model_validate(answer.json()).entries
        about = [
            (entry.event, entry.event_details["user"], entry.tinker_path)
            for entry in log
            if things.session in json.dumps(entry.event_details)
        ]
        assert about == [
            ("session_create", "alice", None),
            ("training_run_create", "alice", None),
            ("sampler_create", "alice", None),
            ("checkpoint_create", "alice", None),
            ("session_stop", "root", None),
        ]
        times = [entry.timestamp for entry in log]
        assert times == sorted(times)
        of_checkpoints = (await tenants.ask("an operator", "GET", "/audit?event_type=checkpoints")).json()["entries"]
        assert {entry["event"].partition("_")[0] for entry in of_checkpoints} == {"checkpoint"}
        assert (await tenants.ask("an operator", "GET", "/audit?day=2020-01-01")).json() == {"entries": []}
        assert (await tenants.ask("an operator", "GET", "/audit?day=soon")).status_code == 422

    tenants.run(story())


def test_the_audit_log_has_what_a_request_was_about_and_no_more(tenants):
    """Whatever else it had."""

    async def story():
        unknown = {"path": "p" * 100_000, "ttl_seconds": 3}
        session = (await tenants.post("/create_session", sdk_version="x", project_id="q" * 400, **unknown))[
            "session_id"
        ]
        assigned = {"project_id": "r" * 300, "name": "not of this route"}
        assert (await tenants.ask("owner", "PUT", f"/sessions/{session}/project", assigned)).status_code == 204
        entries = (await tenants.ask("an operator", "GET", "/audit")).json()["entries"]
        created, moved = [e["event_details"] for e in entries if e["event_details"].get("session_id") == session]
        kept = {"session_id": session, "user": "alice", "actor": "alice", "key_id": created["key_id"]}
        assert created == kept | {"project_id": "q" * 299 + "…"}
        assert moved == kept | {"project_id": "r" * 300}
        for day in ("9999-12-31", "0001-01-01"):
            assert (await tenants.ask("an operator", "GET", f"/audit?day={day}")).json() == {"entries": []}

    tenants.run(story())


def test_the_sessions_of_a_projects_key_are_the_projects(tenants):
    async def story():
        tenants.secrets["grace"], _ = make_key(tenants.data_dir, "grace", project_id="moon")
        await tenants.service.keys.refresh()
        for given in ({}, {"project_id": "moon"}):
            await tenants.post("/create_session", "grace", sdk_version="x", **given)
        other = await tenants.ask("grace", "POST", "/create_session", {"sdk_version": "x", "project_id": "sun"})
        assert other.status_code == 403 and "'moon'" in other.text
        listed = (await tenants.ask("an operator", "GET", "/admin/sessions")).json()["sessions"]
        assert [session["project_id"] for session in listed if session["owner"] == "grace"] == ["moon", "moon"]

    tenants.run(story())


def test_every_route_that_changes_something_is_recorded():
    recorded = {f"{method} {route.path}": event_of(route) for route in _api_routes() for method in route.methods}
    changing = {name for name in recorded if not name.startswith("GET")}
    assert changing == set(ROWS) - {name for name in ROWS if name.startswith("GET")}
    assert {name for name in changing if recorded[name] is None} == UNRECORDED


def _api_routes():
    for included in create_app(None, None).routes:  # type: ignore[arg-type]
        if hasattr(included, "original_router") and included.include_context.prefix == PREFIX:
            yield from included.original_router.routes


def test_what_cannot_be_recorded_is_not_said_to_have_happened(tenants, monkeypatch):
    """And what was refused did not happen, also where a future says so."""

    async def story():
        things = await tenants.begin()

        async def full(record):
            raise DiskFull("the server's disk is full")

        async def recorded(name: str) -> list[dict]:
            entries = (await tenants.ask("an operator", "GET", "/audit")).json()["entries"]
            details = [entry["event_details"] for entry in entries if entry["event"] == "checkpoint_create"]
            return [each for each in details if each.get("path") == name]

        save = {"model_id": things.run, "seq_id": 2, "path": "kept"}
        with monkeypatch.context() as patched:
            patched.setattr(tenants.service, "audit", full)
            answer = await tenants.ask("owner", "POST", "/save_weights", save)
            assert answer.status_code == 503 and "disk is full" in answer.json()["detail"]
            assert "retry-after" in answer.headers
        await tenants.result(await tenants.post("/save_weights", **save))
        (event,) = await recorded("kept")
        assert event["repeated"], "it had happened before"
        ahead = await tenants.ask("owner", "POST", "/save_weights", save | {"seq_id": 9, "path": "not/a name"})
        assert ahead.status_code == 200 and await recorded("not/a name") == []

    tenants.run(story())
