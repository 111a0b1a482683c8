"""InferenceService.Session, both ends: many generations on one stream, each with its own end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

from sagellm_common.core.errors import DeadlineExceeded, InvalidRequest, PeerLost
from sagellm_common.core.types import FinishReason, GenerationOutput, GenerationRequest, SamplingParams, as_token_ids
from sagellm_common.rpc import codec
from sagellm_common.rpc.carriers import FramedCarrier
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2
from sagellm_common.rpc.inference_session import InferenceSession
from services.router.servicer import SERVICE
from tests.support.router_harness import PATIENCE_S, PROMPT, RouterHarness
from tests.support.scripted_workers import MODEL, oracle
from tests.support.waiting import eventually

SAMPLING = SamplingParams(max_new_tokens=6)


def request(request_id: str = "r", prompt: list[int] = PROMPT, **changes: Any) -> GenerationRequest:
    return GenerationRequest(request_id, changes.pop("model", MODEL.name), as_token_ids(prompt), SAMPLING, **changes)


def counted(code: str, method: str = "Generate") -> float:
    labels = {"service": SERVICE, "method": method, "code": code}
    return REGISTRY.get_sample_value("sagellm_rpc_requests_total", labels) or 0.0


@pytest.fixture(params=["framed", "grpc"])
async def session(request: pytest.FixtureRequest, router: RouterHarness) -> AsyncIterator[InferenceSession]:
    session = InferenceSession(router.channel, router.router.address, request.param)
    yield session
    await session.close()


async def outputs_of(
    session: InferenceSession, asked: GenerationRequest, timeout_s: float = PATIENCE_S
) -> list[GenerationOutput]:
    async with aclosing(session.generate(asked, timeout_s=timeout_s)) as outputs:
        return [output async for output in outputs]


async def tokens_of(session: InferenceSession, asked: GenerationRequest) -> list[int]:
    return [token for output in await outputs_of(session, asked) for token in output.token_ids]


async def test_many_generations_share_one_stream(router: RouterHarness, session: InferenceSession) -> None:
    await router.pair()
    sessions, served = counted("CANCELLED", "Session"), counted("OK")
    prompts = [[i, i + 1, i + 2] for i in range(20)]
    got = await asyncio.gather(*(tokens_of(session, request(f"r{i}", p)) for i, p in enumerate(prompts)))
    assert got == [oracle(prompt, SAMPLING) for prompt in prompts]
    assert counted("OK") == served + len(prompts)
    await session.close()
    await eventually(lambda: counted("CANCELLED", "Session") == sessions + 1)


async def test_the_last_output_has_the_summary(router: RouterHarness, session: InferenceSession) -> None:
    await router.pair()
    *_, last = await outputs_of(session, request(""))
    assert last.finish_reason is FinishReason.LENGTH
    assert last.request_id
    assert last.summary is not None
    assert last.summary.completion_tokens == SAMPLING.max_new_tokens


@pytest.mark.parametrize(
    ("asked", "timeout_ms", "message"),
    [
        (request(prompt=[]), 1000, "the prompt is empty"),
        (request(), -1, "timeout_ms is -1"),
    ],
    ids=["prompt", "timeout"],
)
async def test_one_generations_error_is_its_own(
    router: RouterHarness,
    session: InferenceSession,
    monkeypatch: pytest.MonkeyPatch,
    asked: GenerationRequest,
    timeout_ms: int,
    message: str,
) -> None:
    _, decode = await router.pair()
    go_on = asyncio.Event()
    decode.on("token:2", decode.wait_for(go_on))
    other = asyncio.create_task(tokens_of(session, request("other")))
    await eventually(lambda: decode.reached["token:2"].is_set())
    refused = counted("INVALID_ARGUMENT")
    monkeypatch.setattr("sagellm_common.rpc.inference_session.to_ms", lambda _: timeout_ms)
    with pytest.raises(InvalidRequest, match=message):
        await outputs_of(session, asked)
    assert counted("INVALID_ARGUMENT") == refused + 1
    go_on.set()
    assert await other == oracle(PROMPT, SAMPLING)


async def test_an_id_in_flight_is_refused_by_the_router(router: RouterHarness, session: InferenceSession) -> None:
    _, decode = await router.pair()
    go_on = asyncio.Event()
    decode.on("token:2", decode.wait_for(go_on))
    first = asyncio.create_task(tokens_of(session, request()))
    await eventually(lambda: decode.reached["token:2"].is_set())
    with pytest.raises(InvalidRequest, match="in flight already"):
        await outputs_of(session, request())
    go_on.set()
    assert await first == oracle(PROMPT, SAMPLING)


@pytest.mark.parametrize("how", ["leaves", "is cancelled", "runs out of time", "closes"])
async def test_a_client_that_goes_ends_its_generation_everywhere(
    router: RouterHarness, session: InferenceSession, how: str
) -> None:
    _, decode = await router.pair()
    decode.on("token:2", decode.hang)
    outputs = session.generate(request(), timeout_s=0.5 if how == "runs out of time" else PATIENCE_S)
    await anext(outputs)
    waiting = asyncio.create_task(_rest(outputs))
    await eventually(lambda: decode.reached["token:2"].is_set())
    cancelled = counted("CANCELLED")
    if how == "runs out of time":
        with pytest.raises(DeadlineExceeded):
            await waiting
    elif how == "closes":
        await session.close()
        with pytest.raises(PeerLost, match="the session with the router"):
            await waiting
    else:
        waiting.cancel()
        await asyncio.wait([waiting])
        await outputs.aclose()
    await router.assert_nothing_held()
    assert ("r", 1) in decode.cancelled
    if how != "runs out of time":
        await eventually(lambda: counted("CANCELLED") >= cancelled + 1)


async def _rest(outputs: Any) -> list[GenerationOutput]:
    return [output async for output in outputs]


async def test_a_reader_that_does_not_read_holds_up_nobody(router: RouterHarness, session: InferenceSession) -> None:
    await router.pair()
    async with aclosing(session.generate(request("slow"), timeout_s=PATIENCE_S)) as slow:
        first = await anext(slow)
        for i in range(5):
            assert await tokens_of(session, request(f"r{i}")) == oracle(PROMPT, SAMPLING)
        await eventually(lambda: router.pipeline.in_flight == 0)  # nor the slow one's own workers
        tokens = [*first.token_ids, *[t async for output in slow for t in output.token_ids]]
        assert tokens == oracle(PROMPT, SAMPLING)


async def test_a_broken_stream_is_peer_lost_and_the_next_generation_opens_another(
    router: RouterHarness, session: InferenceSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, decode = await router.pair()
    decode.on("token:2", decode.hang, decode.hang)
    open_carrier, carriers = session._open, []

    async def opened(*args: Any) -> Any:
        carriers.append(carrier := await open_carrier(*args))
        return carrier

    monkeypatch.setattr(session, "_open", opened)
    waiting = [asyncio.create_task(tokens_of(session, request(f"r{i}"))) for i in range(2)]
    await eventually(lambda: decode.reached["token:2"].is_set())
    carrier = carriers[0]
    carrier._connection.abort() if isinstance(carrier, FramedCarrier) else carrier._call.cancel()
    assert [type(r) for r in await asyncio.gather(*waiting, return_exceptions=True)] == [PeerLost] * 2
    await router.assert_nothing_held()
    assert await tokens_of(session, request()) == oracle(PROMPT, SAMPLING)
    assert len(carriers) == 2


async def test_a_call_id_in_use_ends_the_session(router: RouterHarness) -> None:
    _, decode = await router.pair()
    decode.on("token:2", decode.hang)
    stream = router.stub.Session(timeout=PATIENCE_S)
    message = inference_pb2.InferenceSessionRequest(call_id=1, generate=codec.encode_generation_request(request()))
    await stream.write(message)
    await eventually(lambda: decode.reached["token:2"].is_set())
    await stream.write(message)
    with pytest.raises(grpc.aio.AioRpcError, match="call_id 1 is in use"):
        async for _ in stream:
            pass
    await router.assert_nothing_held()


async def test_leaving_what_is_not_there_changes_nothing(router: RouterHarness) -> None:
    await router.pair()
    stream = router.stub.Session(timeout=PATIENCE_S)
    leave = inference_pb2.InferenceSessionRequest(call_id=7, leave=inference_pb2.LeaveRequest())
    await stream.write(leave)
    generate = codec.encode_generation_request(request())
    await stream.write(inference_pb2.InferenceSessionRequest(call_id=7, generate=generate))
    await stream.done_writing()  # what runs may finish
    results = [result async for message in stream for result in message.results]
    assert [token for r in results for token in codec.decode_output(r.output).token_ids] == oracle(PROMPT, SAMPLING)
    assert {result.call_id for result in results} == {7}
