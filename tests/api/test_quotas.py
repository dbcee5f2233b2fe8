"""What a key's limits refuse, and when it goes on."""

import asyncio
import time

from sqlalchemy import update

from tests.api.tenants import NANO, Tenants, json_batch, make_key
from tinkercloud.control.quotas import DAY_SECONDS
from tinkercloud.ledger import keys
from tinkercloud.ledger.schema import api_keys

RANK = {"rank": 2, "seed": 1}


async def user(tenants: Tenants, name: str, **limits) -> str:
    """A session of a new user, who is called so from now on."""
    tenants.secrets[name], _ = make_key(tenants.data_dir, name, **limits)
    await tenants.service.keys.refresh()
    return (await tenants.post("/create_session", name, sdk_version="x"))["session_id"]


def test_training_runs_at_a_time(tenants):
    async def story():
        session = await user(tenants, "carol", max_models=1)
        make = {"session_id": session, "base_model": NANO, "lora_config": RANK}
        first = await tenants.post("/create_model", "carol", model_seq_id=0, **make)
        assert await tenants.post("/create_model", "carol", model_seq_id=0, **make) == first, "a repeat"
        answer = await tenants.ask("carol", "POST", "/create_model", make | {"model_seq_id": 1})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 1
        for part in ("carol", "max_models", "has 1 training runs", "allows 1"):
            assert part in answer.json()["detail"]
        await tenants.post(f"/sessions/{session}/finish", "carol", reason={"type": "success"})
        make["session_id"] = (await tenants.post("/create_session", "carol", sdk_version="x"))["session_id"]
        await tenants.post("/create_model", "carol", model_seq_id=0, **make)

    tenants.run(story())


def test_bytes_of_checkpoints(tenants):
    async def story():
        await user(tenants, "dave", max_storage_bytes=1)
        things = await tenants.begin("dave")
        save = {"model_id": things.run, "seq_id": 2, "path": "second", "ttl_seconds": 7200}
        for _ in range(2):  # a repeat too
            answer = await tenants.ask("dave", "POST", "/save_weights", save)
            assert answer.status_code == 403, answer.text
            for part in ("dave", "max_storage", "until some are deleted"):
                assert part in answer.json()["detail"]
        copy = {"source_path": things.checkpoint, "destination_project_id": "p"}
        again = {"x-idempotency-key": "k"}
        assert (await tenants.ask("dave", "POST", "/copy_weights", copy, **again)).status_code == 403
        with keys.changing(tenants.data_dir, None) as connection:
            connection.execute(update(api_keys).where(api_keys.c.owner == "dave").values(max_storage_bytes=10**12))
        await tenants.service.keys.refresh()
        copied = await tenants.ask("dave", "POST", "/copy_weights", copy, **again)
        with keys.changing(tenants.data_dir, None) as connection:
            connection.execute(update(api_keys).where(api_keys.c.owner == "dave").values(max_storage_bytes=1))
        await tenants.service.keys.refresh()
        repeated = await tenants.ask("dave", "POST", "/copy_weights", copy, **again)
        assert copied.status_code == repeated.status_code == 200 and copied.json() == repeated.json()
        sampler = await tenants.ask("dave", "POST", "/save_weights_for_sampler", save | {"seq_id": 3})
        assert sampler.status_code == 403
        # The refusals have used up their seq_ids: training goes on behind them.
        stepped = await tenants.post("/optim_step", "dave", model_id=things.run, seq_id=4, adam_params={})
        assert "no gradients" not in (await tenants.result(stepped, "dave")).get("error", "")

    tenants.run(story())


def test_many_saves_at_once_have_one_limit(tenants):
    """As if they had come one after the other: what is accepted before others are written is looked at again."""

    async def story():
        await user(tenants, "oscar", max_storage_bytes=10**12)
        things = await tenants.begin("oscar")
        with keys.changing(tenants.data_dir, None) as connection:
            connection.execute(update(api_keys).where(api_keys.c.owner == "oscar").values(max_storage_bytes=1))
        await tenants.service.keys.refresh()
        _, segment, name = things.checkpoint.removeprefix("tinker://").split("/")
        gone = await tenants.ask("oscar", "DELETE", f"/training_runs/{things.run}/checkpoints/{segment}/{name}")
        assert gone.status_code == 204, gone.text
        save = {"model_id": things.run, "ttl_seconds": 7200}
        async with tenants.service.models.get(NANO).conductor._between_cycles:
            sent = [
                await tenants.post("/save_weights", "oscar", **save, seq_id=seq_id, path=f"at-{seq_id}")
                for seq_id in (2, 3, 4)
            ]
        saved, *refused = [await tenants.result(one, "oscar") for one in sent]
        assert saved["path"].endswith("/at-2")
        for one in refused:
            assert one["category"] == "user" and "max_storage" in one["error"], one
        run = (tenants.data_dir / "checkpoints" / things.run.replace(":", "_") / "weights").glob("*/*")
        assert [folder.parent.name for folder in run] == ["at-2"], "nothing stays of the others"

    tenants.run(story())


def test_many_copies_at_once_have_one_limit(tenants):
    async def story():
        await user(tenants, "peggy", max_storage_bytes=1)
        things = await tenants.begin()
        address = things.checkpoint.removeprefix("tinker://").replace("/", "/checkpoints/", 1)
        assert (await tenants.ask("owner", "POST", f"/training_runs/{address}/publish")).status_code == 204
        copy = {"source_path": things.checkpoint, "destination_project_id": "p"}
        asked = (
            tenants.ask("peggy", "POST", "/copy_weights", copy, **({"x-idempotency-key": "k"} if number < 3 else {}))
            for number in range(8)
        )
        statuses = [answer.status_code for answer in await asyncio.gather(*asked)]
        assert statuses == [200] * 3 + [403] * 5, "repeats are one"

    tenants.run(story())


def test_many_imports_at_once_have_one_limit(tenants):
    async def story():
        await user(tenants, "rupert", max_storage_bytes=1, is_operator=True)
        things = await tenants.begin()
        (folder,) = (tenants.data_dir / "checkpoints" / things.run.replace(":", "_") / "weights").glob("*/*")
        take_in = {"folder": str(folder), "name": "theirs"}
        asked = (tenants.ask("rupert", "POST", "/admin/checkpoints/import", take_in) for _ in range(2))
        assert sorted([answer.status_code for answer in await asyncio.gather(*asked)]) == [200, 403]
        again = await tenants.ask("rupert", "POST", "/admin/checkpoints/import", take_in)
        assert again.status_code == 403 and "max_storage" in again.text
        assert len(list((tenants.data_dir / "checkpoints").glob("*import-*/*/*/*"))) == 1, "of the others"

    tenants.run(story())


def test_tokens_a_day(tenants, monkeypatch):
    async def story():
        await user(tenants, "erin", max_daily_tokens=7)
        things = await tenants.begin("erin")
        send = {"model_id": things.run, "forward_backward_input": json_batch()}
        for seq_id in (2, 3):
            trained = await tenants.post("/forward_backward", "erin", seq_id=seq_id, **send)
        assert "loss_fn_outputs" in await tenants.result(trained, "erin")
        refused = await tenants.ask("erin", "POST", "/forward_backward", send | {"seq_id": 4})
        sample = {
            "sampling_session_id": things.sampler,
            "seq_id": 0,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]},
            "sampling_params": {"max_tokens": 1},
        }
        also = await tenants.ask("erin", "POST", "/asample", sample)
        tomorrow = time.strftime("%Y-%m-%d 00:00 UTC", time.gmtime(time.time() + DAY_SECONDS))
        for answer in (refused, also):
            assert answer.status_code == 403, answer.text
            for part in ("erin has used 6 tokens", "allows 7 a day", "max_daily_tokens", tomorrow):
                assert part in answer.json()["detail"]
        monkeypatch.setattr(tenants.service.quotas, "_clock", lambda: time.time() + DAY_SECONDS)
        assert (await tenants.ask("erin", "POST", "/asample", sample)).status_code == 200
        tenants.service.quotas._used["erin"].tokens = 7
        assert (await tenants.ask("erin", "POST", "/asample", sample)).status_code == 200, "a repeat"
        assert (await tenants.ask("erin", "POST", "/asample", sample | {"seq_id": 1})).status_code == 403

    tenants.run(story())


async def sample_of(tenants, owner: str, max_daily_tokens: int, **params) -> dict:
    """What a new user with such a limit sends to have two tokens continued, but for its seq_id."""
    session = await user(tenants, owner, max_daily_tokens=max_daily_tokens)
    made = {"session_id": session, "sampling_session_seq_id": 0, "base_model": NANO}
    sampler = await tenants.post("/create_sampling_session", owner, **made)
    return {
        "sampling_session_id": sampler["sampling_session_id"],
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]},
        "sampling_params": params,
    }


def test_many_samples_at_once_have_one_limit(tenants):
    async def story():
        sample = await sample_of(tenants, "sybil", 7, max_tokens=1)
        asked = (tenants.ask("sybil", "POST", "/asample", sample | {"seq_id": seq_id}) for seq_id in range(8))
        statuses = [answer.status_code for answer in await asyncio.gather(*asked)]
        assert sorted(statuses) == [200] * 3 + [403] * 5

    tenants.run(story())


def test_what_was_drawn_counts_at_once(tenants, monkeypatch):
    """And not when what has been used is looked up again: here it never is."""

    async def story():
        now = time.time()
        monkeypatch.setattr(tenants.service.quotas, "_clock", lambda: now)
        sample = await sample_of(tenants, "trent", 30, max_tokens=20, stop=[])
        for seq_id in range(2):
            drawn = await tenants.post("/asample", "trent", **sample, seq_id=seq_id)
            assert "sequences" in await tenants.result(drawn, "trent")
        refused = await tenants.ask("trent", "POST", "/asample", sample | {"seq_id": 2})
        assert refused.status_code == 403 and "used 44 tokens" in refused.text

    tenants.run(story())


def test_what_was_accepted_and_has_not_run_counts(tenants):
    async def story():
        await user(tenants, "frank", max_daily_tokens=7)
        things = await tenants.begin("frank")
        send = {"model_id": things.run, "forward_backward_input": json_batch()}
        # They wait for seq_id 2, which does not come.
        statuses = [
            (await tenants.ask("frank", "POST", "/forward_backward", send | {"seq_id": 3 + seq})).status_code
            for seq in range(2)
        ]
        assert statuses == [200, 200]
        tenants.service.quotas._used.clear()
        late = await tenants.ask(
            "frank", "POST", "/forward", {"model_id": things.run, "seq_id": 2, "forward_input": json_batch()}
        )
        assert late.status_code == 403 and "used 6 tokens" in late.text

    tenants.run(story())
