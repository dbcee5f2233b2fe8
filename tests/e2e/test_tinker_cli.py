"""The official `tinker` command line against a real server."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent
from tinker import types

from tests.e2e.test_first_steps import datum
from tests.e2e.uploads import hub
from tests.programs import run_python

PROGRAM = Path(__file__).with_name("tinker_cli.py")


@pytest.fixture
def tinker_cli(server, tmp_path):
    """Runs commands; the JSON or text that each printed. One that fails is its error, as an exception in its place."""

    def run(*commands: list[str], **environ: str) -> list:
        environ |= {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-test"}
        done = run_python(".venv-clients", str(PROGRAM), cwd=tmp_path, input=json.dumps(commands), **environ)
        assert done.returncode == 0, done.stdout + done.stderr
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(answers) == len(commands), done.stdout + done.stderr
        return [RuntimeError(answer["error"]) if answer["error"] else as_json(answer["output"]) for answer in answers]

    return run


def as_json(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def test_checkpoints_are_listed_changed_and_deleted(tinker_cli, training):
    run = training.get_info().model_id
    kept = training.save_state("kept", user_metadata={"step": "3"}).result().path
    others = [training.save_state("other").result().path, training.save_weights_for_sampler("s").result().path]
    models, runs, info, listed, *changes, afterwards, wrong, gone, none, everything = tinker_cli(
        ["-f", "json", "model", "list"],
        ["-f", "json", "run", "list", "--limit", "5"],
        ["-f", "json", "run", "info", run],
        ["-f", "json", "checkpoint", "list", "--run-id", run],
        ["checkpoint", "publish", kept],
        ["checkpoint", "publish", kept],
        ["checkpoint", "set-ttl", kept, "--ttl", "7200"],
        ["-f", "json", "checkpoint", "info", kept],
        ["checkpoint", "unpublish", kept],
        ["checkpoint", "set-ttl", kept, "--remove"],
        ["-f", "json", "checkpoint", "info", kept],
        ["checkpoint", "set-ttl", kept, "--ttl", "5"],
        ["-f", "json", "checkpoint", "delete", "--yes", *others, f"tinker://{run}/weights/never"],
        ["-f", "json", "checkpoint", "delete", "--yes", "--run-id", run, "--before", "2020-01-01"],
        ["-f", "json", "checkpoint", "list", "--limit", "0"],
    )
    assert "tinkercloud/nano" in json.dumps(models)
    assert run in [found["training_run_id"] for found in runs["runs"]]
    assert info["lora_rank"] == 8 and info["base_model"] == "tinkercloud/nano"
    by_path = {found["tinker_path"]: found for found in listed["checkpoints"]}
    assert by_path.keys() == {kept, *others}
    assert by_path[kept]["user_metadata"] == {"step": "3"} and not by_path[kept]["public"]
    published, again, timed, between, private, untimed = changes
    assert [published, again, timed, private, untimed] == [""] * 5, changes
    assert between["public"] and between["expires_at"] and not afterwards["public"] and not afterwards["expires_at"]
    assert isinstance(wrong, RuntimeError) and "3600" in str(wrong)
    assert gone["deleted_count"] == 2 and "never" in gone["failed"][0]["error"]
    assert "No checkpoints found" in none
    left = {found["tinker_path"] for found in everything["checkpoints"]}
    assert kept in left and not left & set(others)


def test_what_a_session_did_is_downloaded_traced_and_counted(tinker_cli, client, training, tmp_path):
    run = training.get_info().model_id
    session = run.split(":")[0]
    training.forward_backward([datum(list(range(9)))], "cross_entropy").result()
    training.optim_step(types.AdamParams()).result()
    path = training.save_state("final").result().path
    exported = training.save_weights_external("mine").result().path
    prompt = types.ModelInput.from_ints([1, 2, 3])
    sampler = training.save_weights_and_get_sampling_client().result()
    sampler.sample(prompt, 2, types.SamplingParams(max_tokens=4, stop=[])).result()
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    window = [(hour - timedelta(hours=1)).isoformat(), (hour + timedelta(hours=2)).isoformat()]
    with hub() as (hub_url, committed):
        trained, external, pushed, trace, url, usage, storage, status, _ = tinker_cli(
            ["-f", "json", "checkpoint", "download", path],
            ["-f", "json", "checkpoint", "download", exported],
            ["-f", "json", "checkpoint", "push-hf", exported, "--repo", "me/it"],
            ["-f", "json", "session", "export-trace", session, "-o", "it.pftrace"],
            ["session", "export-trace", session, "--url-only"],
            ["-f", "json", "billing", "usage", *window],
            ["-f", "json", "billing", "checkpoint-storage"],
            ["auth", "status"],
            ["auth", "logout"],
            HF_ENDPOINT=hub_url,
            HF_TOKEN="hf_it",
        )
    for done in (trained, external):
        files = sorted(file.name for file in (tmp_path / done["destination"]).iterdir())
        assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert pushed["repo_id"] == "me/it" and committed["README.md"].startswith(b"---\nbase_model: tinkercloud/nano\n")
    downloaded = tmp_path / external["destination"] / "adapter_model.safetensors"
    assert committed["adapter_model.safetensors"] == downloaded.read_bytes()
    assert "accessible: yes" in status and f"{session}.pftrace" in url
    check_trace((tmp_path / trace["destination"]).read_bytes(), run)
    mine = [event for event in usage["data"] if event["session_id"] == session]
    used = Counter()
    for event in mine:
        info = event["event_info"]
        used[info["type"]] += info.get("token_count", info.get("count", info.get("gigabyte_hours")))
        assert event["base_model"] == "tinkercloud/nano" and event["estimated_cost_usd"] in (0, None)
    assert (used["training"], used["sampling_sample"], used["sampling_prefill"]) == (8, 8, 3)
    assert used["checkpoint"] == 2 and 0 < used["storage"] < 1e-3
    stored = next(row for row in storage["data"] if row["project_id"] is None)
    assert stored["size_bytes"] > 0 and storage["effective_rate_usd_per_gigabyte_month"] == 0


def check_trace(data: bytes, run: str) -> None:
    """That a trace has the lanes and the slices of a session that trained, saved and sampled, well nested."""
    trace = Trace.FromString(data)
    lanes = {p.track_descriptor.uuid: p.track_descriptor.name for p in trace.packet if p.HasField("track_descriptor")}
    running: dict[int, int] = {}
    names: dict[str, list[str]] = {}
    for packet in sorted((p for p in trace.packet if p.HasField("track_event")), key=lambda p: p.timestamp):
        event = packet.track_event
        begins = event.type == TrackEvent.TYPE_SLICE_BEGIN
        running[event.track_uuid] = running.get(event.track_uuid, 0) + (1 if begins else -1)
        assert running[event.track_uuid] in (0, 1), "a lane has one slice at a time"
        if begins:
            names.setdefault(lanes[event.track_uuid], []).append(event.name)
    assert not any(running.values())
    kinds = ["create_model", "forward_backward", "optim_step", "save_weights", "save_weights_external"]
    assert names[f"{run}: running"] == [*kinds, "save_weights_for_sampler"] == names[f"{run}: waiting"]
    assert names["engine: cycles"] == ["cycle"] * 6 and len(names["engine: steps"]) >= 6
    assert sum(kinds == ["sample"] for lane, kinds in names.items() if lane.endswith(": running")) == 1
