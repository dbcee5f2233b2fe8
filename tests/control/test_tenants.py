"""Through the service: no tenant's losses show who else was there, in which order they came, or who left."""

import asyncio

from tests.control.conftest import OWNER, Client, datum
from tinkercloud.engine.operations import AdamParams, ForwardBackward, OptimStep
from tinkercloud.engine.results import LossOutput

BATCHES = [
    (datum(5, 6, 7, 8, 9, 10), datum(20, 21, 22)),
    (datum(*range(30, 70)),),
    (datum(1, 2), datum(9, 8, 7, 6), datum(9, 8, 7, 5)),
]


async def _train(client: Client, steps: int, seed: int) -> list[float]:
    losses = []
    for step in range(steps):
        losses.append((await client.forward_backward(BATCHES[(seed + step) % 3])).metrics["loss:sum"])
        await client.optim_step()
    return losses


def test_tenants_interleaved_and_one_after_another_get_the_same_bits(shared):
    async def story(service):
        serial = [await _train(await Client.create(service, seed), 4, seed) for seed in range(3)]
        clients = [await Client.create(service, seed) for seed in range(3)]
        together = await asyncio.gather(*(_train(client, 4, seed) for seed, client in enumerate(clients)))
        assert together == serial

    shared(story)


def test_operations_that_arrive_in_another_order_give_the_same_bits(shared):
    async def losses(service, order: list[int]) -> list[float]:
        client = await Client.create(service)
        model_id = client.model.model_id
        operations = {}
        for step in range(3):
            for place, batch in enumerate(BATCHES):
                operations[4 * step + place + 1] = (
                    "forward_backward",
                    ForwardBackward(model_id, batch, "cross_entropy"),
                )
            operations[4 * step + 4] = ("optim_step", OptimStep(model_id, AdamParams(1e-2)))
        entries = {seq: await service.runs.submit(client.model, seq, *operations[seq]) for seq in order}
        results = [await client.result(entries[seq]) for seq in sorted(entries)]
        return [result.metrics["loss:sum"] for result in results if isinstance(result, LossOutput)]

    async def story(service):
        straight = await losses(service, list(range(1, 13)))
        assert await losses(service, [2, 3, 4, 1, 8, 6, 5, 7, 12, 11, 10, 9]) == straight

    shared(story)


def test_a_tenant_that_is_deleted_changes_nothing(shared):
    async def story(service):
        alone = await _train(await Client.create(service, 1), 6, 1)
        staying, leaving, finishing = [await Client.create(service, seed) for seed in (1, 2, 3)]
        training = asyncio.create_task(_train(staying, 6, 1))
        await asyncio.gather(_train(leaving, 2, 0), _train(finishing, 1, 2))
        await leaving.forward_backward()
        await leaving.result(await service.runs.unload(leaving.model))
        await service.sessions.finish(finishing.session.session_id, OWNER, "success")
        assert await training == alone

    shared(story)


def test_the_seed_makes_the_run(shared):
    async def story(service):
        one, same, other = [await _train(await Client.create(service, seed), 3, 0) for seed in (4, 4, 5)]
        assert one == same
        assert one[0] == other[0], "a fresh adapter adds nothing whatever its seed is"
        assert one[1:] != other[1:]

    shared(story)
