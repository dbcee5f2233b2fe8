"""Copies of checkpoints are recorded whole or not at all."""

import pytest

from tests.control.conftest import OWNER, Client
from tinkercloud.control.checkpoints import no_limit
from tinkercloud.ledger import catalog
from tinkercloud.ledger.records import CheckpointRecord, SessionRecord


def test_a_copy_into_a_project_that_cannot_be_recorded_leaves_no_session(shared, monkeypatch):
    async def story(service):
        saved = await (await Client.create(service)).save("it")
        put = catalog.put

        def failing(transaction, record):
            if isinstance(record, SessionRecord | CheckpointRecord):
                raise ValueError("it cannot be recorded")
            return put(transaction, record)

        before = await service._ledger.count(SessionRecord)
        with monkeypatch.context() as patched:
            patched.setattr(catalog, "put", failing)
            with pytest.raises(ValueError, match="cannot be recorded"):
                await copied(service, saved)
        assert await service._ledger.count(SessionRecord) == before
        copy = await copied(service, saved)
        session = await service._ledger.get(SessionRecord, copy.model_id.partition(":")[0])
        assert (session.project_id, session.owner, session.state) == ("p", OWNER, "finished")
        assert await copied(service, saved) == copy
        assert await service._ledger.count(SessionRecord) == before + 1

    async def copied(service, saved):
        return await service.copies.into_project(saved.path, OWNER, "p", None, "key", no_limit)

    shared(story)
