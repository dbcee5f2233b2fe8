"""What was used, hour by hour, and what it costs at the prices of the settings."""

import time

import pytest

from tests.control.conftest import NANO, OWNER, Client
from tinkercloud.config import Settings
from tinkercloud.control.billing import GIGABYTE, HOURS_PER_MONTH, Billing
from tinkercloud.ledger.usage import HOUR_SECONDS

PRICES = {"price_train": 3.0, "price_storage": 5e6}


def test_tokens_checkpoints_and_storage_are_counted_and_priced(shared):
    async def story(service):
        billing = Billing(service._ledger, service.models, Settings.load(**PRICES))
        client = await Client.create(service)
        await client.forward_backward()
        saved = [await client.save("first"), await client.save("first", overwrite=True), await client.save("other")]
        await service.checkpoints.delete(saved[2].path, OWNER)
        start = time.time() // HOUR_SECONDS * HOUR_SECONDS
        later = start + 3 * HOUR_SECONDS
        events = await billing.usage(OWNER, start - HOUR_SECONDS, later, now=later)
        mine = [event for event in events if event.session_id == client.session.session_id]
        (train,) = [event for event in mine if event.kind == "train"]
        assert (train.quantity, train.cost, train.base_model) == (7, pytest.approx(7 * 3e-6), NANO)
        assert sum(event.quantity for event in mine if event.kind == "checkpoint") == 3
        storage = [event for event in mine if event.kind == "storage"]
        whole = [event.quantity for event in storage if event.hour > saved[1].created_at]
        assert whole == [pytest.approx(saved[1].size_bytes / GIGABYTE)] * len(whole) and len(whole) >= 2
        for event in storage:
            assert event.cost == pytest.approx(event.quantity * 5e6 / HOURS_PER_MONTH)
        lives = [life for life in await service._ledger.accounts.lives(OWNER, start, later) if life.removed_at]
        gone = [life for life in lives if life.session_id == client.session.session_id]
        assert [life.created_at for life in gone] == [saved[0].created_at, saved[2].created_at]
        total = saved[1].size_bytes * (later - saved[1].created_at)
        total += sum(life.size_bytes * (life.removed_at - life.created_at) for life in gone)
        stored = sum(event.quantity for event in storage) * GIGABYTE * HOUR_SECONDS
        assert stored == pytest.approx(total, rel=1e-9), "what has gone counts for as long as it was there"
        before = await billing.usage(OWNER, start - 2 * HOUR_SECONDS, start - HOUR_SECONDS, now=later)
        assert not [event for event in before if event.session_id == client.session.session_id]

    shared(story)
