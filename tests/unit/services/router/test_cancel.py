"""Cancellation, deadlines and overload: every party hears of it, whatever the request was doing."""

from __future__ import annotations

import asyncio

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sagellm_common.core.errors import DeadlineExceeded, Draining, InvalidRequest, NoWorker, QueueFull
from sagellm_common.core.types import FinishReason, SamplingParams
from sagellm_common.rpc.carriers import Choice
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2
from tests.support.router_harness import PATIENCE_S, PROMPT, RouterHarness, router_harness
from tests.support.scripted_workers import ScriptedWorker, oracle
from tests.support.waiting import eventually

POINTS = ["reserve", "reserved", "prefill", "prefilled", "pull", "token:1", "token:3"]
STATE = {"reserve": 0, "reserved": 0, "prefill": 0, "prefilled": 0, "pull": 1, "token:1": 1, "token:3": 3}
"""Tokens the client has by then."""


@pytest.fixture(params=["framed", "grpc"])
def carried_by(request: pytest.FixtureRequest) -> Choice:
    return request.param  # type: ignore[no-any-return]


async def pair_hanging_at(router: RouterHarness, point: str) -> ScriptedWorker:
    prefill, decode = await router.pair()
    worker = prefill if point.startswith("prefill") else decode
    worker.on(point, worker.hang)
    return worker


def assert_all_heard(router: RouterHarness, point: str) -> None:
    prefill, decode = router.workers
    assert ("r", 1) in decode.released  # type: ignore[attr-defined]
    if point not in ("reserve", "reserved"):
        assert ("r", 1) in prefill.cancelled
    if point.startswith(("pull", "token")):
        assert ("r", 1) in decode.cancelled


async def cancel_by_client(router: RouterHarness, worker: ScriptedWorker, point: str) -> None:
    call = router.call()
    await eventually(lambda: worker.reached[point].is_set())
    call.cancel()


async def cancel_by_rpc(router: RouterHarness, worker: ScriptedWorker, point: str) -> None:
    call = asyncio.create_task(router.generate())
    await eventually(lambda: worker.reached[point].is_set())
    for _ in range(2):  # idempotent
        await router.stub.CancelGeneration(inference_pb2.CancelGenerationRequest(request_id="r"), timeout=5)
    generated = await call
    assert generated.finish_reason is FinishReason.CANCELLED
    assert generated.tokens == oracle(PROMPT, SamplingParams(max_new_tokens=6))[: STATE[point]]
    assert router.metric("sagellm_router_requests_total", code="CANCELLED") == 1


async def deadline_passes(router: RouterHarness, worker: ScriptedWorker, point: str) -> None:
    with pytest.raises(DeadlineExceeded):
        await router.generate(timeout_s=0.5)
    assert worker.reached[point].is_set()


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("how", [cancel_by_client, cancel_by_rpc, deadline_passes])
async def test_every_party_hears_of_the_end(router: RouterHarness, point: str, how: object) -> None:
    worker = await pair_hanging_at(router, point)
    await how(router, worker, point)  # type: ignore[operator]
    if point in ("reserve",):  # the worker is stuck there and has nothing to release yet
        await eventually(lambda: router.pipeline.in_flight == 0)
    else:
        await router.assert_nothing_held()
    await eventually(lambda: router.workers[1].released)  # type: ignore[attr-defined]
    assert_all_heard(router, point)
    if how is not deadline_passes:  # there the router and its client give up in the same moment
        assert router.workers[1].ended_by_client == {True}  # type: ignore[attr-defined]
    assert (await router.generate(request_id="next")).tokens == oracle(PROMPT, SamplingParams(max_new_tokens=6))


async def test_cancelling_while_waiting_for_a_worker() -> None:
    async with router_harness(worker_grace_s=60.0) as router:
        call = asyncio.create_task(router.generate())
        await eventually(lambda: router.pipeline.in_flight == 1)
        await router.stub.CancelGeneration(inference_pb2.CancelGenerationRequest(request_id="r"), timeout=5)
        assert (await call).finish_reason is FinishReason.CANCELLED


async def test_waiting_for_a_worker_ends_with_the_deadline() -> None:
    async with router_harness(worker_grace_s=60.0) as router:
        with pytest.raises((NoWorker, DeadlineExceeded)):
            await router.generate(timeout_s=0.3)
        await eventually(lambda: router.pipeline.in_flight == 0)


async def test_the_configured_timeout_holds_for_clients_without_a_deadline() -> None:
    async with router_harness(request_timeout_s=0.3) as router:
        await pair_hanging_at(router, "token:2")
        with pytest.raises(DeadlineExceeded):
            await router.generate(timeout_s=None)
        await router.assert_nothing_held()


async def test_cancelling_what_is_unknown_is_fine(router: RouterHarness) -> None:
    await router.stub.CancelGeneration(inference_pb2.CancelGenerationRequest(request_id="never"), timeout=5)


async def test_a_full_router_turns_away_at_once_and_says_when_to_come_back() -> None:
    async with router_harness(max_queue=1) as router:
        worker = await pair_hanging_at(router, "token:2")
        call = router.call()
        await eventually(lambda: worker.reached["token:2"].is_set())
        with pytest.raises(QueueFull, match="max_queue") as caught:
            await router.generate(request_id="second")
        assert caught.value.retry_after_s
        call.cancel()
        await router.assert_nothing_held()
        assert (await router.generate(request_id="third")).finish_reason is FinishReason.LENGTH


async def test_a_request_id_in_flight_is_refused_and_the_first_goes_on(router: RouterHarness) -> None:
    _, decode = await router.pair()
    go_on = asyncio.Event()
    decode.on("token:2", decode.wait_for(go_on))
    first = asyncio.create_task(router.generate())
    await eventually(lambda: decode.reached["token:2"].is_set())
    with pytest.raises(InvalidRequest, match="in flight"):
        await router.generate()
    go_on.set()
    assert (await first).tokens == oracle(PROMPT, SamplingParams(max_new_tokens=6))


async def test_a_draining_router_finishes_what_it_has_and_takes_nothing_new(router: RouterHarness) -> None:
    _, decode = await router.pair()
    go_on = asyncio.Event()
    decode.on("token:2", decode.wait_for(go_on))
    first = asyncio.create_task(router.generate())
    await eventually(lambda: decode.reached["token:2"].is_set())
    health = health_pb2_grpc.HealthStub(router.channel)
    drain = asyncio.create_task(router.router.drain())
    answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(Draining):
        await router.generate(request_id="second")
    assert not drain.done()
    go_on.set()
    assert (await first).tokens == oracle(PROMPT, SamplingParams(max_new_tokens=6))
    await drain
