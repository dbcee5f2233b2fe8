"""What one user may look at of another's: what is published, and what is in the project that its key is for."""

import time

from sqlalchemy import update

from tests.api.tenants import make_key
from tinkercloud.ledger import keys
from tinkercloud.ledger.schema import checkpoints

SCOPE = "?access_scope=accessible"


async def _all(tenants, who: str, path: str) -> str:
    return (await tenants.ask(who, "GET", f"{path}{SCOPE}&limit=1000")).text


def test_a_published_checkpoint_shows_its_training_run_and_nothing_else_of_it(tenants):
    async def story():
        things = await tenants.begin()
        saved = await tenants.post("/save_weights", model_id=things.run, seq_id=2, path="secret")
        hidden = (await tenants.result(saved))["path"]
        run = f"/training_runs/{things.run}"
        assert (await tenants.ask("another owner", "GET", run + SCOPE)).status_code == 404
        assert things.run not in await _all(tenants, "another owner", "/training_runs")
        published = await tenants.ask("owner", "POST", f"{run}/checkpoints/weights/first/publish")
        assert published.status_code == 204
        seen = await tenants.ask("another owner", "GET", run + SCOPE)
        assert seen.json()["last_checkpoint"]["tinker_path"] == things.checkpoint
        assert seen.json()["model_owner"] == "alice" and hidden not in seen.text
        listed = await _all(tenants, "another owner", "/training_runs")
        assert things.run in listed and hidden not in listed
        for path in (run, f"/sessions/{things.session}", f"/sessions/{things.session}{SCOPE}"):
            assert (await tenants.ask("another owner", "GET", path)).status_code == 404
        assert things.run not in (await tenants.ask("another owner", "GET", "/training_runs")).text
        info = await tenants.post("/weights_info", "another owner", tinker_path=things.checkpoint)
        assert info["lora_rank"] == 2
        changed = await tenants.ask("another owner", "DELETE", f"{run}/checkpoints/weights/first")
        assert changed.status_code == 404
        await tenants.ask("owner", "DELETE", f"{run}/checkpoints/weights/first/publish")
        assert (await tenants.ask("another owner", "GET", run + SCOPE)).status_code == 404

    tenants.run(story())


def test_keys_of_one_project_see_each_others_runs_and_may_change_none(tenants):
    async def story():
        for name, project in (("heidi", "mars"), ("ivan", "mars"), ("judy", "venus")):
            tenants.secrets[name], _ = make_key(tenants.data_dir, name, project_id=project)
        await tenants.service.keys.refresh()
        things = await tenants.begin("heidi")
        run, session = f"/training_runs/{things.run}", f"/sessions/{things.session}"
        for path in (run, session):
            assert (await tenants.ask("ivan", "GET", path + SCOPE)).status_code == 200
            assert (await tenants.ask("ivan", "GET", path)).status_code == 404
            assert (await tenants.ask("judy", "GET", path + SCOPE)).status_code == 404
        assert things.run in await _all(tenants, "ivan", "/training_runs")
        assert things.session in await _all(tenants, "ivan", "/sessions")
        assert things.checkpoint not in await _all(tenants, "ivan", "/training_runs"), "it is not published"
        assert things.run not in await _all(tenants, "judy", "/training_runs")
        assert things.session not in await _all(tenants, "judy", "/sessions")
        step = {"model_id": things.run, "seq_id": 2, "adam_params": {}}
        assert (await tenants.ask("ivan", "POST", "/optim_step", step)).status_code == 404
        weights = {"tinker_path": things.checkpoint}
        assert (await tenants.ask("ivan", "POST", "/weights_info", weights)).status_code == 404

    tenants.run(story())


def test_a_token_of_the_owner_lets_another_load_its_weights(tenants):
    async def story():
        things = await tenants.begin()
        session = (await tenants.post("/create_session", "another owner", sdk_version="x"))["session_id"]
        load = {"session_id": session, "model_seq_id": 0, "path": things.checkpoint, "optimizer": True}
        assert (await tenants.ask("another owner", "POST", "/load_weights", load)).status_code == 404
        wrong = load | {"weights_access_token": "tml-nobody"}
        assert (await tenants.ask("another owner", "POST", "/load_weights", wrong)).status_code == 403
        token = (await tenants.post("/auth/token"))["jwt"]
        loaded = await tenants.post("/load_weights", "another owner", **load, weights_access_token=token)
        assert (await tenants.result(loaded, "another owner"))["path"] == things.checkpoint

    tenants.run(story())


def test_searches_see_what_lists_see_and_know_their_last_page(tenants):
    async def story():
        for name in ("kim", "leo"):
            tenants.secrets[name], _ = make_key(tenants.data_dir, name, project_id="pluto")
        await tenants.service.keys.refresh()
        made = [await tenants.post("/create_session", who, sdk_version="x") for who in ("kim", "leo")]
        mine, other = [session["session_id"] for session in made]

        async def search(**query) -> dict:
            return await tenants.post("/sessions/search", "kim", **query)

        def ids(page: dict) -> list[str]:
            return [session["session_id"] for session in page["sessions"]]

        assert ids(await search()) == [mine]
        accessible = {"owner": {"type": "accessible"}}
        both = await search(limit=2, **accessible)
        assert ids(both) == [other, mine] and both["next_cursor"] is None
        first = await search(limit=1, **accessible)
        second = await search(limit=1, cursor=first["next_cursor"], **accessible)
        assert ids(first) + ids(second) == [other, mine] and second["next_cursor"] is None
        await tenants.post(f"/sessions/{mine}/finish", "kim", reason={"type": "errored"}, detail="out of data")
        (ended,) = (await search())["sessions"]
        assert ended["status"] == {
            "type": "client_finished",
            "reason": {"type": "errored"},
            "detail": "out of data",
        }

    tenants.run(story())


def test_a_checkpoint_whose_time_is_over_is_in_no_list(tenants):
    async def story():
        things = await tenants.begin()
        before = (await tenants.ask("owner", "GET", "/checkpoints")).json()
        with keys.changing(tenants.data_dir, None) as connection:
            is_it = checkpoints.c.path == things.checkpoint
            connection.execute(update(checkpoints).where(is_it).values(expires_at=time.time() - 1))
        after = (await tenants.ask("owner", "GET", "/checkpoints")).json()
        assert things.checkpoint in str(before) and things.checkpoint not in str(after)
        assert after["cursor"]["total_count"] == before["cursor"]["total_count"] - 1

    tenants.run(story())
