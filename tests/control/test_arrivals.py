"""Waiting for an event."""

import asyncio

import pytest

from tinkercloud.control.arrivals import within


@pytest.mark.parametrize("turns", range(4))
def test_a_cancellation_that_comes_with_the_event_is_not_forgotten(run, turns):
    """However many turns of the loop lie between the two."""

    async def story():
        event = asyncio.Event()
        waiting = asyncio.create_task(within(event, 60))
        await asyncio.sleep(0)
        event.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        if waiting.cancel():
            await asyncio.wait([waiting])
            assert waiting.cancelled()

    run(story)
