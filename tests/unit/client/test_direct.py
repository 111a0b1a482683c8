"""Generations that the router only plans: a real router, scripted workers, the tokens straight from them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from sagellm_common.client.router import RouterClient
from sagellm_common.core.errors import (
    ContextTooLong,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    KvExhausted,
    PeerLost,
    SageError,
)
from sagellm_common.core.types import (
    FinishReason,
    GenerationOutput,
    GenerationRequest,
    KvPeer,
    SamplingParams,
    as_token_ids,
)
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from services.decode.servicer import _peer
from tests.support.router_harness import PATIENCE_S, PROMPT, RouterHarness, router_harness
from tests.support.scripted_workers import LAYOUT, MODEL, ScriptedDecode, ScriptedPrefill, oracle
from tests.support.waiting import eventually

SAMPLING = SamplingParams(max_new_tokens=6)


def request(request_id: str = "r", prompt: list[int] = PROMPT, **sampling: Any) -> GenerationRequest:
    params = SamplingParams(**({"max_new_tokens": 6} | sampling))
    return GenerationRequest(request_id, MODEL.name, as_token_ids(prompt), params)


@pytest.fixture
async def router() -> AsyncIterator[RouterHarness]:
    async with router_harness(tokens="direct") as harness:
        yield harness


@pytest.fixture
async def client(router: RouterHarness) -> AsyncIterator[RouterClient]:
    async with RouterClient(router.router.address, tokens="direct") as client:
        yield client


async def outputs_of(
    client: RouterClient, asked: GenerationRequest, timeout_s: float = PATIENCE_S
) -> list[GenerationOutput]:
    async with aclosing(client.generate(asked, timeout_s)) as outputs:
        return [output async for output in outputs]


def tokens_of(outputs: list[GenerationOutput]) -> list[int]:
    tokens: list[int] = []
    for output in outputs:
        assert output.index == len(tokens)
        tokens += output.token_ids
    return tokens


async def test_tokens_come_from_the_worker_and_the_router_knows_it_all(
    router: RouterHarness, client: RouterClient
) -> None:
    prefill, decode = await router.pair()
    outputs = await outputs_of(client, request())
    assert tokens_of(outputs) == oracle(PROMPT, SAMPLING)
    assert [route.attempt for route in decode.routed] == [1]
    summary = outputs[-1].summary
    assert summary is not None
    assert (summary.prefill_worker_id, summary.decode_worker_id) == (prefill.worker_id, decode.worker_id)
    assert (summary.prompt_tokens, summary.completion_tokens, summary.attempts) == (len(PROMPT), 6, 1)
    assert summary.kv_bytes_transferred > 0
    await router.assert_nothing_held()
    stages = [event.stage for event in (await router.explain()).events]
    assert stages == ["admit", "match", "plan", "reserve", "prefill", "prompt KV", "transfer", "decode"]
    assert router.metric("sagellm_router_requests_total", code="OK") == 1
    assert router.metric("sagellm_router_generated_tokens_total") == 6
    assert router.link(decode).decode.carrier == "", (
        "the router has no session with the worker: it is on no token's way"
    )


async def test_a_route_says_whose_cache_has_more_of_the_prompt(router: RouterHarness, client: RouterClient) -> None:
    prefill = ScriptedPrefill()
    decode = ScriptedDecode(prefills=[prefill])
    decode.cached_hashes = block_hashes(as_token_ids(PROMPT), LAYOUT.block_size_tokens, root_hash(LAYOUT))
    for one in (prefill, decode):
        await router.add(one)
    assert tokens_of(await outputs_of(client, request())) == oracle(PROMPT, SAMPLING)
    (route,) = decode.routed
    assert _peer(route) == KvPeer(decode.worker_id, decode.incarnation, decode.record.address, 8)
    await outputs_of(client, request("unknown", [9] * 9))
    assert _peer(decode.routed[-1]) is None


async def test_many_at_once(router: RouterHarness, client: RouterClient) -> None:
    await router.pair()
    prompts = [[i, i + 1, i + 2] for i in range(1, 21)]
    got = await asyncio.gather(*(outputs_of(client, request(f"r{i}", p)) for i, p in enumerate(prompts)))
    assert [tokens_of(outputs) for outputs in got] == [oracle(prompt, SAMPLING) for prompt in prompts]
    await router.assert_nothing_held()


async def test_without_a_prefill_worker_the_decode_worker_computes(router: RouterHarness, client: RouterClient) -> None:
    decode = await router.add(ScriptedDecode())
    assert tokens_of(await outputs_of(client, request())) == oracle(PROMPT, SAMPLING)
    assert not decode.routed[0].HasField("prefill")


@pytest.mark.parametrize("point", ["reserve", "reserved", "pull", "token:1", "token:3"])
async def test_a_lost_decode_worker_is_replaced(router: RouterHarness, client: RouterClient, point: str) -> None:
    prefill, _ = await router.pair()
    other = await router.add(ScriptedDecode("decode-1", prefills=[prefill]))
    for worker in router.workers:
        if isinstance(worker, ScriptedDecode) and worker is not other:
            worker.on(point, worker.die)
    outputs = await outputs_of(client, request())
    assert tokens_of(outputs) == oracle(PROMPT, SAMPLING)
    await router.assert_nothing_held()


@pytest.mark.parametrize("point", ["prefill", "prefilled"])
async def test_a_lost_prefill_worker_is_replaced(router: RouterHarness, client: RouterClient, point: str) -> None:
    prefill, decode = await router.pair()
    other = await router.add(ScriptedPrefill("prefill-1"))
    decode.prefills[other.worker_id] = other
    prefill.on(point, prefill.die)
    outputs = [*await outputs_of(client, request("a")), *await outputs_of(client, request("b"))]
    assert [t for o in outputs for t in o.token_ids] == 2 * oracle(PROMPT, SAMPLING)
    assert max(route.attempt for route in decode.routed) == 2
    await router.assert_nothing_held()


async def test_a_full_worker_is_asked_again(router: RouterHarness, client: RouterClient) -> None:
    _, decode = await router.pair()
    decode.on("reserve", decode.refuse(KvExhausted("no room")))
    outputs = await outputs_of(client, request())
    assert tokens_of(outputs) == oracle(PROMPT, SAMPLING)
    summary = outputs[-1].summary
    assert summary is not None
    assert [route.attempt for route in decode.routed] == [1, 2]
    await router.assert_nothing_held()


async def test_attempts_are_bounded(router: RouterHarness, client: RouterClient) -> None:
    _, decode = await router.pair()
    decode.on("token:2", *[decode.refuse(EngineFailed("broken")) for _ in range(3)])
    decode.on("token:1", *[decode.refuse(EngineFailed("broken")) for _ in range(3)])
    with pytest.raises(EngineFailed, match="broken"):
        await outputs_of(client, request())
    assert router.metric("sagellm_router_requests_total", code="ENGINE_FAILED") == 1
    await router.assert_nothing_held()


async def test_a_cancelled_generation_ends_everywhere(router: RouterHarness, client: RouterClient) -> None:
    _, decode = await router.pair()
    decode.on("token:2", decode.hang)
    task = asyncio.create_task(outputs_of(client, request()))
    await decode.reached["token:2"].wait()
    await client.cancel("r")
    outputs = await task
    assert outputs[-1].finish_reason is FinishReason.CANCELLED
    assert tokens_of(outputs) == oracle(PROMPT, SAMPLING)[:2]
    await router.assert_nothing_held()
    assert router.metric("sagellm_router_requests_total", code="CANCELLED") == 1


@pytest.mark.parametrize("point", ["reserve", "token:2"])
async def test_who_leaves_early_cancels(router: RouterHarness, client: RouterClient, point: str) -> None:
    _, decode = await router.pair()
    decode.on(point, decode.hang)
    task = asyncio.create_task(outputs_of(client, request()))
    await decode.reached[point].wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await router.assert_nothing_held()
    assert router.metric("sagellm_router_requests_total", code="CANCELLED") == 1


async def test_a_client_that_is_gone_holds_nothing(router: RouterHarness) -> None:
    _, decode = await router.pair()
    decode.on("token:2", decode.hang)
    async with RouterClient(router.router.address, tokens="direct") as client:
        task = asyncio.create_task(outputs_of(client, request()))
        await decode.reached["token:2"].wait()
        assert router.pipeline.in_flight == 1
    with pytest.raises(PeerLost):
        await task
    await router.assert_nothing_held()


async def test_a_deadline(router: RouterHarness, client: RouterClient) -> None:
    _, decode = await router.pair()
    decode.on("token:2", decode.hang)
    with pytest.raises(DeadlineExceeded):
        await outputs_of(client, request(), timeout_s=0.3)
    await router.assert_nothing_held()


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (request(prompt=[]), InvalidRequest),
        (request(prompt=[1] * 300), ContextTooLong),
        (request(temperature=float("nan")), InvalidRequest),
    ],
)
async def test_bad_requests(
    router: RouterHarness, client: RouterClient, asked: GenerationRequest, error: type[SageError]
) -> None:
    await router.pair()
    with pytest.raises(error):
        await outputs_of(client, asked)
    await router.assert_nothing_held()


async def test_it_waits_for_a_worker_and_is_told_when_none_comes(router: RouterHarness, client: RouterClient) -> None:
    with pytest.raises(SageError, match="no worker has joined"):
        await outputs_of(client, request())
    task = asyncio.create_task(outputs_of(client, request("late")))
    await eventually(lambda: router.pipeline.in_flight == 1)
    await router.pair()
    assert tokens_of(await task) == oracle(PROMPT, SAMPLING)


async def test_a_router_that_relays_is_understood() -> None:
    async with router_harness() as router, RouterClient(router.router.address, tokens="direct") as client:
        _, decode = await router.pair()
        assert tokens_of(await outputs_of(client, request())) == oracle(PROMPT, SAMPLING)
        assert not decode.routed


async def test_tokens_of_a_worker_that_cannot_be_reached_are_relayed(
    router: RouterHarness, client: RouterClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, decode = await router.pair()
    channels = client._channels
    monkeypatch.setattr(channels, "get", lambda address, get=channels.get: get("127.0.0.1:1"))
    for name in ("a", "b"):
        assert tokens_of(await outputs_of(client, request(name))) == oracle(PROMPT, SAMPLING)
    assert not decode.routed
    assert caplog.text.count("its tokens are relayed") == 1
    await router.assert_nothing_held()
