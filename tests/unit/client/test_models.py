from __future__ import annotations

import asyncio

import pytest

from sagellm_common.client.models import ModelDirectory
from sagellm_common.client.router import RouterClient
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import DeadlineExceeded, NoWorker, UnknownModel
from tests.support.scripted_router import model_info
from tests.support.waiting import eventually


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
async def directory(router, clock):
    async with RouterClient(router.address) as client:
        yield ModelDirectory(client, ttl_s=5.0, clock=clock)


async def test_the_router_is_asked_once_per_ttl(directory, router, clock):
    for _ in range(3):
        await directory.info("tiny")
    assert router.num_list_models == 1
    clock.advance(5.0)
    await directory.info("tiny")
    assert router.num_list_models == 2


async def test_concurrent_misses_ask_once(directory, router):
    await asyncio.gather(*(directory.info("tiny") for _ in range(5)))
    assert router.num_list_models == 1


async def test_a_model_that_has_just_come_is_found(directory, router):
    await directory.info("tiny")
    router.script.models.append(model_info(name="new"))
    assert (await directory.info("new")).name == "new"


async def test_no_model_is_not_remembered(directory, router):
    models, router.script.models = router.script.models, []
    with pytest.raises(NoWorker):
        await directory.info("tiny")
    router.script.models = models
    assert (await directory.info("tiny")).name == "tiny"


async def test_without_a_name_only_a_single_model_is_meant(directory, router):
    assert (await directory.info()).name == "tiny"
    router.script.models.append(model_info(name="new"))
    await directory.info("new")
    with pytest.raises(UnknownModel, match="new, tiny"):
        await directory.info()


async def test_the_tokenizer_is_loaded_once(directory):
    first, second = await asyncio.gather(directory.get("tiny"), directory.get("tiny"))
    assert first.tokenizer is second.tokenizer


async def test_a_silent_router_costs_all_that_wait_one_timeout():
    class SilentRouter:
        asked = 0
        gave_up = asyncio.Event()

        async def models(self):
            self.asked += 1
            await self.gave_up.wait()
            raise DeadlineExceeded("no answer within 5 s")

    router = SilentRouter()
    directory = ModelDirectory(router)
    waiting = [asyncio.create_task(directory.info("tiny")) for _ in range(3)]
    await eventually(lambda: router.asked == 1)
    router.gave_up.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [DeadlineExceeded] * 3
    assert router.asked == 1
    with pytest.raises(DeadlineExceeded):
        await directory.info("tiny")
    assert router.asked == 2
