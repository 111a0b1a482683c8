"""Prefill → decode over real gRPC, the TCP byte path and real leases; only the engine is simulated.

The simulated engine's tokens depend on every byte of KV it reads: a block that did not arrive, or arrived in the wrong
place, gives other tokens than `reference`.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from sagellm_common.comm_backend.handoff import attempt_of
from sagellm_common.comm_backend.kv_dtypes import Deviation
from sagellm_common.comm_backend.transcode import Transcoder
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import (
    Cancelled,
    ContextTooLong,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    InvalidRequest,
    KvExhausted,
    LayoutMismatch,
    LeaseExpired,
    PeerLost,
    SageError,
)
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import FinishReason, SamplingParams, WorkerRole, as_token_ids
from sagellm_common.rpc.carriers import Choice
from sagellm_common.rpc.channels import call
from sagellm_common.rpc.gen.sagellm.v1 import worker_pb2, worker_pb2_grpc
from sagellm_common.rpc.sessions import FirstToken, PrefillOutcome
from tests.support.simulated_engine import ENGINE_S, SLOT_BYTES, SimulatedEngine, reference
from tests.support.topology_server import topology_server
from tests.support.waiting import TIMEOUT_S, eventually
from tests.support.workers import (
    Worker,
    decode_all,
    generate,
    request,
    test_config,
    worker,
)

PROMPT = list(range(1, 15))


@pytest.fixture
async def router() -> AsyncIterator[str]:
    async with topology_server(EmbeddedTopology()) as address:
        yield address


@pytest.fixture(params=["framed", "grpc"])
def carried_by(request: pytest.FixtureRequest) -> Choice:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
async def prefill(router: str, carried_by: Choice) -> AsyncIterator[Worker]:
    async with worker(WorkerRole.PREFILL, router) as made:
        made.carried_by = carried_by
        yield made


@pytest.fixture
async def decode(router: str, carried_by: Choice) -> AsyncIterator[Worker]:
    async with worker(WorkerRole.DECODE, router) as made:
        made.carried_by = carried_by
        yield made


# ---- the same tokens as one engine ----


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 16, 31, 100])
async def test_tokens_equal_the_single_engine(prefill: Worker, decode: Worker, num_tokens: int) -> None:
    prompt = [7 * i % 97 + 1 for i in range(num_tokens)]
    wanted = request(prompt, max_new_tokens=20)
    done = await generate(prefill, decode, wanted)
    assert (done.tokens, done.finish_reason) == reference(prompt, wanted.sampling)
    await prefill.idle()
    await decode.idle()


async def test_sampled_tokens_equal_the_single_engine(prefill: Worker, decode: Worker) -> None:
    wanted = request(PROMPT, max_new_tokens=12, temperature=0.8, seed=5, num_logprobs=1)
    done = await generate(prefill, decode, wanted)
    assert (done.tokens, done.finish_reason) == reference(PROMPT, wanted.sampling)
    assert [len(step.logprobs) for step in done.steps] == [1] * 11
    assert len(done.prefill.logprobs) == 1


async def test_both_say_how_long_their_engines_took(prefill: Worker, decode: Worker) -> None:
    done = await generate(prefill, decode, request(PROMPT, max_new_tokens=5))
    assert done.prefill.engine_ms == ENGINE_S * 1e3
    assert [step.engine_ms for step in done.steps] == [0.0, 0.0, 0.0, 4 * ENGINE_S * 1e3]


async def test_many_requests_at_once(prefill: Worker, decode: Worker) -> None:
    wanted = [request([i + 1, *PROMPT[: i % 14]], max_new_tokens=6, request_id=f"r{i}") for i in range(12)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(generate(prefill, decode, one)) for one in wanted]
    for one, task in zip(wanted, tasks, strict=True):
        assert task.result().tokens == reference(one.prompt_token_ids.tolist(), one.sampling)[0]
    await prefill.idle()
    await decode.idle()


async def test_the_engines_share_no_memory_but_what_was_pulled(prefill: Worker, decode: Worker) -> None:
    done = await generate(prefill, decode, request(PROMPT))
    transfer = done.steps[0].transfer
    assert transfer is not None
    assert (transfer.blocks, transfer.blocks_reused, transfer.backend) == (4, 0, "tcp")
    assert transfer.bytes == 4 * decode.engine.kv.layout.block_bytes
    assert all(step.transfer is None for step in done.steps[1:])
    # The prompt's KV was pulled, not computed again: one token of it was left to compute.
    assert len(decode.engine.submitted) == 1
    assert decode.engine.stats().steps == len(done.steps)


async def test_blocks_already_on_decode_are_not_pulled_again(prefill: Worker, decode: Worker) -> None:
    await generate(prefill, decode, request(PROMPT))
    await decode.idle()
    again = await generate(prefill, decode, request(PROMPT, request_id="r2"))
    transfer = again.steps[0].transfer
    assert transfer is not None
    assert (transfer.blocks, transfer.blocks_reused) == (1, 3)
    assert again.prefill.cached_tokens == 12
    assert again.tokens == reference(PROMPT, request(PROMPT).sampling)[0]


async def test_another_cache_salt_reuses_nothing(prefill: Worker, decode: Worker) -> None:
    await generate(prefill, decode, request(PROMPT, cache_salt="a"))
    other = await generate(prefill, decode, request(PROMPT, request_id="r2", cache_salt="b"))
    assert other.prefill.cached_tokens == 0
    assert other.steps[0].transfer is not None
    assert other.steps[0].transfer.blocks_reused == 0


# ---- blocks of other sizes, and other numbers of them ----


@pytest.mark.parametrize("backend", ["tcp", "gloo"])
@pytest.mark.parametrize(("theirs", "ours"), [(4, 8), (8, 4), (6, 4), (3, 5), (16, 1)])
async def test_blocks_of_different_sizes(router: str, theirs: int, ours: int, backend: str) -> None:
    """Three prompts that share 21 tokens, one after the other: what decode has cached is not pulled again."""
    config = test_config(f"transport.backend={backend}")
    async with (
        worker(
            WorkerRole.PREFILL,
            router,
            config=config,
            engine=SimulatedEngine(block_size_tokens=theirs, num_blocks=300 // theirs),
        ) as prefill,
        worker(
            WorkerRole.DECODE,
            router,
            config=config,
            engine=SimulatedEngine(block_size_tokens=ours, num_blocks=250 // ours),
        ) as decode,
    ):
        for n, tail in enumerate((0, 1, 30)):
            prompt = [7 * i % 97 + 1 for i in range(21)] + [n + 1] * tail
            wanted = request(prompt, max_new_tokens=12, request_id=f"r{n}", temperature=0.5, seed=n)
            done = await generate(prefill, decode, wanted)
            assert (done.tokens, done.finish_reason) == reference(prompt, wanted.sampling)
            transfer = done.steps[0].transfer
            assert transfer is not None
            reused = 21 // ours if n else 0
            assert (transfer.blocks_reused, transfer.blocks) == (reused, -(-len(prompt) // ours) - reused)
            pulled_blocks = -(-len(prompt) // theirs) - reused * ours // theirs
            assert transfer.bytes == pulled_blocks * prefill.engine.kv.layout.block_bytes
            assert done.prefill.cached_tokens == (min(21, len(prompt) - 1) // theirs * theirs if n else 0)
            await prefill.idle()
            await decode.idle()


@pytest.mark.parametrize("backend", ["tcp", "gloo"])
async def test_a_long_pull_is_transcoded_group_by_group(router: str, backend: str) -> None:
    """Five blocks of 4 tokens at a time, which end within blocks of ours, every time but one."""
    config = test_config(f"transport.backend={backend}", f"transport.chunk_bytes={5 * 4 * SLOT_BYTES}")
    async with (
        worker(WorkerRole.PREFILL, router, config=config) as prefill,
        worker(WorkerRole.DECODE, router, config=config, engine=SimulatedEngine(block_size_tokens=6)) as decode,
    ):
        prompt = [7 * i % 97 + 1 for i in range(99)]
        wanted = request(prompt, max_new_tokens=12)
        done = await generate(prefill, decode, wanted)
        assert (done.tokens, done.finish_reason) == reference(prompt, wanted.sampling)
        assert done.steps[0].transfer is not None
        assert done.steps[0].transfer.blocks == 17
        assert done.steps[0].transfer.bytes == 25 * prefill.engine.kv.layout.block_bytes
        await decode.idle()
        await prefill.idle()


async def test_cancelled_while_transcoding_nothing_is_written_afterwards(
    router: str, prefill: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    move = Transcoder.move

    def gated(self: Transcoder, *args: Any, **kwargs: Any) -> Deviation:
        entered.set()
        assert go_on.wait(TIMEOUT_S)
        found = move(self, *args, **kwargs)
        ended.set()
        return found

    monkeypatch.setattr(Transcoder, "move", gated)
    async with worker(WorkerRole.DECODE, router, engine=SimulatedEngine(block_size_tokens=8)) as decode:
        wanted = request(PROMPT)
        ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
        first = await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S)
        decoding = asyncio.create_task(decode_all(decode, wanted, first.token_ids, first.source))
        assert await asyncio.to_thread(entered.wait, TIMEOUT_S)
        decode.decode_session.cancel("r1", 1)
        with pytest.raises(Cancelled):
            await decoding
        # The caller has its answer; the blocks are held until the thread is done with them.
        assert decode.engine.kv.get_utilization().used_blocks == 2
        assert not ended.is_set()
        go_on.set()
        await decode.idle()
        assert ended.is_set()
    await prefill.idle()


async def test_priority_and_time_left_reach_both_engines(prefill: Worker, decode: Worker) -> None:
    await generate(prefill, decode, replace(request(PROMPT), priority=-3))
    for engine in (prefill.engine, decode.engine):
        (submitted,) = engine.submitted
        assert submitted.priority == -3
        assert 0 < submitted.timeout_s <= TIMEOUT_S


# ---- where it ends ----


async def test_one_token_leaves_nothing_to_decode(prefill: Worker, decode: Worker) -> None:
    wanted = request(PROMPT, max_new_tokens=1)
    done = await generate(prefill, decode, wanted)
    assert done.finish_reason is FinishReason.LENGTH
    assert done.prefill.source is None
    assert done.tokens == reference(PROMPT, wanted.sampling)[0]
    await prefill.idle()
    await decode.idle()


async def test_a_stop_token_first_leaves_nothing_to_decode(prefill: Worker, decode: Worker) -> None:
    first = reference(PROMPT, SamplingParams(1))[0][0]
    done = await generate(prefill, decode, request(PROMPT, stop_token_ids=(first,)))
    assert (done.tokens, done.finish_reason) == ([], FinishReason.STOP)
    await prefill.idle()
    await decode.idle()


async def test_a_stop_token_later_ends_the_stream(prefill: Worker, decode: Worker) -> None:
    tokens = reference(PROMPT, SamplingParams(8))[0]
    done = await generate(prefill, decode, request(PROMPT, stop_token_ids=(tokens[4],)))
    assert (done.tokens, done.finish_reason) == (tokens[:4], FinishReason.STOP)
    await decode.idle()


async def test_decode_without_a_source_computes_the_prompt(decode: Worker) -> None:
    """A resume: prompt and emitted tokens are known, their KV is nowhere."""
    wanted = request(PROMPT, max_new_tokens=10)
    expected = reference(PROMPT, wanted.sampling)[0]
    steps = await decode_all(decode, wanted, expected[:4], None)
    assert [token for step in steps for token in step.token_ids] == expected[4:]
    assert steps[0].index == 4
    await decode.idle()


async def test_a_reservation_serves_a_decode_without_a_source(decode: Worker) -> None:
    wanted = request(PROMPT)
    await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
    expected = reference(PROMPT, wanted.sampling)[0]
    steps = await decode_all(decode, wanted, expected[:1], None)
    assert [token for step in steps for token in step.token_ids] == expected[1:]
    await decode.idle()


# ---- cancelled at every stage ----


async def test_cancelled_after_reserve(decode: Worker) -> None:
    await decode.decode_session.reserve(request(PROMPT), 1, timeout_s=TIMEOUT_S)
    assert decode.engine.kv.get_utilization().used_blocks == 4
    decode.decode_session.release("r1", 1)
    await decode.idle()


@pytest.mark.parametrize("how", ["cancel", "session"])
async def test_cancelled_while_prefilling(prefill: Worker, decode: Worker, how: str) -> None:
    wanted = request(PROMPT)
    ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
    prefill.engine.pause()
    prefilling = asyncio.create_task(prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S))
    await eventually(lambda: bool(prefill.engine.submitted))
    if how == "cancel":
        prefill.prefill_session.cancel("r1", 1)
    else:
        await prefill.prefill_session.close()
    with pytest.raises(Cancelled if how == "cancel" else PeerLost):
        await prefilling
    await eventually(lambda: bool(prefill.engine.cancelled))
    prefill.engine.resume()
    decode.decode_session.cancel("r1", 1)
    await prefill.idle()
    await decode.idle()


@pytest.mark.parametrize("max_new_tokens", [1, 4])
async def test_the_first_token_comes_before_the_answer(prefill: Worker, max_new_tokens: int) -> None:
    wanted = request(PROMPT, max_new_tokens=max_new_tokens, num_logprobs=1)
    session, answers = prefill.prefill_session, list[object]()
    async with session.asking(wanted, 1, None, token_first=True, timeout_s=TIMEOUT_S) as replies:
        while not answers or not isinstance(answers[-1], PrefillOutcome):
            answers.append(session.answer_of(await replies.get()))
    *before, outcome = answers
    assert isinstance(outcome, PrefillOutcome) and outcome.token_ids and len(outcome.logprobs) == 1
    told = [FirstToken(outcome.token_ids, outcome.logprobs)] if max_new_tokens > 1 else []
    assert before == told
    session.cancel("r1", 1)
    await prefill.idle()


async def test_cancelled_between_prefill_and_decode(prefill: Worker, decode: Worker) -> None:
    wanted = request(PROMPT)
    ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
    await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S)
    assert len(prefill.leases) == 1
    prefill.prefill_session.cancel("r1", 1)
    decode.decode_session.cancel("r1", 1)
    await prefill.idle()
    await decode.idle()


@pytest.mark.parametrize("how", ["cancel", "session", "unary"])
@pytest.mark.parametrize("store", [False, True], ids=["", "blocks-wanted-back"])
async def test_cancelled_while_decoding(router: str, prefill: Worker, how: str, store: bool) -> None:
    async with worker(WorkerRole.DECODE, router, store=store) as decode:
        wanted = request(PROMPT, max_new_tokens=100)
        ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
        first = await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S)
        decode.engine.pause()
        steps = decode.decode_session.decode(wanted, 1, first.token_ids, first.source, timeout_s=TIMEOUT_S)
        async with aclosing(steps):  # type: ignore[type-var]
            next_step = asyncio.ensure_future(anext(steps))
            await eventually(lambda: bool(decode.engine.submitted))
            if how == "cancel":
                decode.decode_session.cancel("r1", 1)
            elif how == "session":
                await decode.decode_session.close()
            else:
                stub = worker_pb2_grpc.DecodeServiceStub(decode.channel)
                await call(stub.Cancel, worker_pb2.CancelRequest(request_id="r1", attempt=1), timeout_s=TIMEOUT_S)
            if how == "unary":
                assert (await next_step).finish_reason is FinishReason.CANCELLED
            else:
                with pytest.raises(Cancelled if how == "cancel" else PeerLost):
                    await next_step
        await eventually(lambda: bool(decode.engine.cancelled))
        decode.engine.resume()
        await prefill.idle()
        await decode.idle()


async def test_cancelling_what_is_not_there_is_a_no_op(prefill: Worker, decode: Worker) -> None:
    for stub in (
        worker_pb2_grpc.PrefillServiceStub(prefill.channel),
        worker_pb2_grpc.DecodeServiceStub(decode.channel),
    ):
        for _ in range(2):
            await call(stub.Cancel, worker_pb2.CancelRequest(request_id="x", attempt=3), timeout_s=TIMEOUT_S)
    assert (await generate(prefill, decode, request(PROMPT))).finish_reason is FinishReason.LENGTH


async def test_a_deadline_frees_everything(prefill: Worker, decode: Worker) -> None:
    prefill.engine.pause()
    stub = worker_pb2_grpc.PrefillServiceStub(prefill.channel)
    message = worker_pb2.PrefillRequest(
        request_id="r1", attempt=1, prompt_token_ids=as_token_ids(PROMPT).tobytes(), timeout_ms=30
    )
    message.sampling.max_new_tokens = 4
    message.sampling.top_p = message.sampling.repetition_penalty = 1.0
    with pytest.raises(DeadlineExceeded, match="r1"):
        await call(stub.Prefill, message, timeout_s=TIMEOUT_S)
    prefill.engine.resume()
    await prefill.idle()


@asynccontextmanager
async def silent_source() -> AsyncIterator[str]:
    """Where connections are taken by the kernel and nobody ever reads."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("how", ["cancel", "session"])
async def test_cancelled_while_pulling(router: str, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The source accepts and then says nothing. Its lease is renewed all the while, and given back at the end."""
    config = test_config("transport.lease_ttl_s=0.6")
    renewals: list[str] = []
    async with (
        silent_source() as address,
        worker(WorkerRole.PREFILL, router, config=config) as prefill,
        worker(WorkerRole.DECODE, router, config=config) as decode,
    ):
        renew = prefill.leases.renew

        def counted(transfer_id: str, epoch: int) -> float:
            renewals.append(transfer_id)
            return renew(transfer_id, epoch)

        monkeypatch.setattr(prefill.leases, "renew", counted)
        wanted = request(PROMPT)
        ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
        first = await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S)
        assert first.source is not None
        source = replace(first.source, data_address=address)
        decoding = asyncio.create_task(decode_all(decode, wanted, first.token_ids, source))
        await eventually(lambda: len(renewals) >= 4)  # each a third of the lease: it would be over without them
        assert len(prefill.leases) == 1
        if how == "cancel":
            decode.decode_session.cancel("r1", 1)
        else:
            await decode.decode_session.close()
        with pytest.raises(Cancelled if how == "cancel" else PeerLost):
            await decoding
        await decode.idle()
        await prefill.idle()
        assert decode.engine.submitted == []


# ---- who died, what expired ----


async def test_an_expired_lease_frees_the_source_and_refuses_the_pull(router: str, decode: Worker) -> None:
    clock = ManualClock()
    async with worker(WorkerRole.PREFILL, router, clock=clock) as prefill:
        wanted = request(PROMPT)
        ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
        first = await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S)
        assert prefill.engine.kv.get_utilization().used_blocks == 4
        clock.advance(test_config().transport.lease_ttl_s)
        assert prefill.leases.expire() == 1
        await prefill.idle()
        with pytest.raises(LeaseExpired):
            await decode_all(decode, wanted, first.token_ids, first.source)
    await decode.idle()


async def test_an_expired_reservation_refuses_the_decode_and_unpins_the_source(router: str, prefill: Worker) -> None:
    clock = ManualClock()
    async with worker(WorkerRole.DECODE, router, clock=clock) as decode:
        wanted = request(PROMPT)
        ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
        first = await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S)
        clock.advance(test_config().transport.lease_ttl_s)
        assert decode.reservations.expire() == 1
        with pytest.raises(LeaseExpired):
            await decode_all(decode, wanted, first.token_ids, first.source)
        await decode.idle()
        await prefill.idle()


@pytest.mark.parametrize("unary", [False, True], ids=["session", "unary"])
async def test_a_renewed_reservation_outlives_a_long_prefill(router: str, prefill: Worker, unary: bool) -> None:
    clock, wanted = ManualClock(), request(PROMPT)
    lease_s = test_config().transport.lease_ttl_s
    async with worker(WorkerRole.DECODE, router, clock=clock) as decode:
        stub = worker_pb2_grpc.DecodeServiceStub(decode.channel)
        again = worker_pb2.RenewReservationRequest(request_id="r1", attempt=1)
        ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
        for _ in range(3):
            clock.advance(lease_s - 1)
            if unary:
                left: worker_pb2.RenewReservationResponse = await call(
                    stub.RenewReservation, again, timeout_s=TIMEOUT_S
                )
                assert left.expires_in_ms == lease_s * 1000
            else:
                decode.decode_session.renew("r1", 1)
                await decode.decode_session.reserve(request([1], request_id="r2"), 1, timeout_s=TIMEOUT_S)  # in order
            assert decode.reservations.expire() == 0
        first = await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S)
        steps = await decode_all(decode, wanted, first.token_ids, first.source)
        tokens = [*first.token_ids, *(token for step in steps for token in step.token_ids)]
        assert tokens == reference(PROMPT, wanted.sampling)[0]
        with pytest.raises(LeaseExpired):
            await call(stub.RenewReservation, again, timeout_s=TIMEOUT_S)
        decode.decode_session.renew("r1", 1)  # a no-op
        decode.decode_session.release("r2", 1)
        await decode.idle()
        await prefill.idle()


async def test_a_source_that_died_is_a_lost_peer(router: str, decode: Worker) -> None:
    wanted = request(PROMPT)
    async with worker(WorkerRole.PREFILL, router) as prefill:
        ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
        first = await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S)
    with pytest.raises(PeerLost):
        await decode_all(decode, wanted, first.token_ids, first.source)
    await decode.idle()


async def test_a_restarted_source_is_a_lost_peer(prefill: Worker, decode: Worker) -> None:
    wanted = request(PROMPT)
    ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
    first = await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S)
    assert first.source is not None
    with pytest.raises(PeerLost, match="restarted"):
        await decode_all(decode, wanted, first.token_ids, replace(first.source, incarnation="of-a-past-life"))
    await decode.idle()
    await prefill.idle()


async def test_another_layout_is_refused(router: str, prefill: Worker) -> None:
    async with worker(WorkerRole.DECODE, router, engine=SimulatedEngine(model="other")) as decode:
        wanted = request(PROMPT)
        ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
        first = await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S)
        with pytest.raises(LayoutMismatch, match="model_fingerprint"):
            await decode_all(decode, wanted, first.token_ids, first.source)
        await decode.idle()
        await prefill.idle()


@pytest.mark.parametrize("role", [WorkerRole.PREFILL, WorkerRole.DECODE])
async def test_a_failing_engine_is_typed_and_leaks_nothing(prefill: Worker, decode: Worker, role: WorkerRole) -> None:
    (prefill if role is WorkerRole.PREFILL else decode).engine.failure = EngineFailed("boom")
    with pytest.raises(EngineFailed, match="boom"):
        await generate(prefill, decode, request(PROMPT))
    decode.decode_session.cancel("r1", 1)
    prefill.prefill_session.cancel("r1", 1)
    await prefill.idle()
    await decode.idle()
    again = await generate(prefill, decode, request(PROMPT), attempt=2)
    assert again.tokens == reference(PROMPT, request(PROMPT).sampling)[0]


# ---- refused at once ----


async def test_no_memory_to_reserve(router: str) -> None:
    async with worker(WorkerRole.DECODE, router, engine=SimulatedEngine(num_blocks=4)) as decode:
        await decode.decode_session.reserve(request(PROMPT), 1, timeout_s=TIMEOUT_S)
        with pytest.raises(KvExhausted) as refused:
            await decode.decode_session.reserve(request(PROMPT, request_id="r2"), 1, timeout_s=TIMEOUT_S)
        assert refused.value.retry_after_s is not None
        decode.decode_session.release("r1", 1)
        await decode.idle()


@pytest.mark.parametrize(
    ("prompt", "error"), [([], InvalidRequest), (list(range(128)), ContextTooLong), (list(range(90)), ContextTooLong)]
)
async def test_a_prompt_that_never_fits(router: str, prompt: list[int], error: type[SageError]) -> None:
    async with (
        worker(WorkerRole.PREFILL, router, engine=SimulatedEngine(num_blocks=20)) as prefill,
        worker(WorkerRole.DECODE, router, engine=SimulatedEngine(num_blocks=20)) as decode,
    ):
        with pytest.raises(error):
            await decode.decode_session.reserve(request(prompt), 1, timeout_s=TIMEOUT_S)
        ticket = await decode.decode_session.reserve(request(PROMPT, request_id="r2"), 1, timeout_s=TIMEOUT_S)
        with pytest.raises(error):
            await prefill.prefill_session.prefill(request(prompt), 1, ticket, timeout_s=TIMEOUT_S)
        decode.decode_session.release("r2", 1)
        await prefill.idle()
        await decode.idle()


async def test_a_resumed_sequence_that_has_outgrown_the_pool_never_fits(router: str) -> None:
    async with worker(WorkerRole.DECODE, router, engine=SimulatedEngine(num_blocks=4)) as decode:
        with pytest.raises(ContextTooLong, match="KV pool"):
            await decode_all(decode, request(PROMPT, max_new_tokens=20), [1, 2, 3], None)
        await decode.idle()


async def test_decode_with_a_source_needs_its_reservation(prefill: Worker, decode: Worker) -> None:
    wanted = request(PROMPT)
    ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
    first = await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S)
    decode.decode_session.release("r1", 1)
    with pytest.raises(LeaseExpired):
        await decode_all(decode, wanted, first.token_ids, first.source)
    await prefill.idle()
    await decode.idle()


async def test_a_draining_worker_finishes_what_it_promised(prefill: Worker, decode: Worker) -> None:
    wanted = request(PROMPT)
    ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
    first = await prefill.prefill_session.prefill(wanted, 1, ticket, timeout_s=TIMEOUT_S)
    draining = [asyncio.create_task(one.runtime.drain(TIMEOUT_S)) for one in (prefill, decode)]
    stubs = [worker_pb2_grpc.WorkerServiceStub(one.channel) for one in (prefill, decode)]
    await eventually(lambda: all(one.runtime.record.state == "draining" for one in (prefill, decode)))
    with pytest.raises(Draining):
        await decode.decode_session.reserve(request(PROMPT, request_id="r2"), 1, timeout_s=TIMEOUT_S)
    with pytest.raises(Draining):
        await prefill.prefill_session.prefill(request(PROMPT, request_id="r2"), 1, ticket, timeout_s=TIMEOUT_S)
    steps = await decode_all(decode, wanted, first.token_ids, first.source)
    assert [*first.token_ids, *(t for s in steps for t in s.token_ids)] == reference(PROMPT, wanted.sampling)[0]
    assert await asyncio.gather(*draining) == [0, 0]
    for stub in stubs:
        answer = await call(stub.Drain, worker_pb2.DrainRequest(), timeout_s=TIMEOUT_S)
        assert answer.unfinished_requests == 0


# ---- said twice ----


async def test_prefill_is_done_once_per_attempt(prefill: Worker, decode: Worker) -> None:
    wanted = request(PROMPT)
    ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
    prefill.engine.pause()
    stub = worker_pb2_grpc.PrefillServiceStub(prefill.channel)
    message = prefill_request(PROMPT, attempt=1)
    twins = [asyncio.create_task(call(stub.Prefill, message, timeout_s=TIMEOUT_S)) for _ in range(2)]
    await eventually(lambda: bool(prefill.engine.submitted))
    prefill.engine.resume()
    first, second = await asyncio.gather(*twins)
    later = await call(stub.Prefill, message, timeout_s=TIMEOUT_S)
    assert first == second == later
    assert len(prefill.engine.submitted) == 1
    assert ticket.epoch == attempt_of(first.source.epoch) == 1
    await call(stub.Cancel, worker_pb2.CancelRequest(request_id="r1", attempt=1), timeout_s=TIMEOUT_S)
    await prefill.idle()


async def test_a_higher_attempt_replaces_the_lower_one(prefill: Worker) -> None:
    prefill.engine.pause()
    stub = worker_pb2_grpc.PrefillServiceStub(prefill.channel)
    first = asyncio.create_task(call(stub.Prefill, prefill_request(PROMPT, attempt=1), timeout_s=TIMEOUT_S))
    await eventually(lambda: len(prefill.engine.submitted) == 1)
    second = asyncio.create_task(call(stub.Prefill, prefill_request(PROMPT, attempt=2), timeout_s=TIMEOUT_S))
    with pytest.raises(LeaseExpired, match="superseded"):
        await first
    with pytest.raises(LeaseExpired, match="superseded by attempt 2"):
        await call(stub.Prefill, prefill_request(PROMPT, attempt=1), timeout_s=TIMEOUT_S)
    prefill.engine.resume()
    assert attempt_of((await second).source.epoch) == 2
    assert len(prefill.leases) == 1
    await call(stub.Cancel, worker_pb2.CancelRequest(request_id="r1", attempt=2), timeout_s=TIMEOUT_S)
    await prefill.idle()


async def test_a_request_id_that_comes_back_with_another_prompt_is_another_request(
    prefill: Worker, decode: Worker
) -> None:
    """Its old lease may still stand: the ids are the clients', and a router may have died in between."""
    old = request(PROMPT)
    ticket = await decode.decode_session.reserve(old, 1, timeout_s=TIMEOUT_S)
    await prefill.prefill_session.prefill(old, 1, ticket, timeout_s=TIMEOUT_S)
    new = request([50, 51, 52], max_new_tokens=8)
    done = await generate(prefill, decode, new)
    assert done.tokens == reference([50, 51, 52], new.sampling)[0]
    await prefill.idle()
    await decode.idle()


async def test_reserving_twice_holds_the_blocks_once(decode: Worker) -> None:
    first = await decode.decode_session.reserve(request(PROMPT), 1, timeout_s=TIMEOUT_S)
    again = await decode.decode_session.reserve(request(PROMPT), 1, timeout_s=TIMEOUT_S)
    assert (first.transfer_id, first.epoch) == (again.transfer_id, again.epoch) == ("r1", 1)
    assert decode.engine.kv.get_utilization().used_blocks == 4
    newer = await decode.decode_session.reserve(request(PROMPT), 2, timeout_s=TIMEOUT_S)
    assert newer.epoch == 2
    assert decode.engine.kv.get_utilization().used_blocks == 4
    with pytest.raises(LeaseExpired):
        await decode.decode_session.reserve(request(PROMPT), 1, timeout_s=TIMEOUT_S)
    decode.decode_session.release("r1", 1)
    other = await decode.decode_session.reserve(request([9]), 2, timeout_s=TIMEOUT_S)
    assert len(other.block_table) == 1, "the id came back with another prompt: these must be its blocks"
    decode.decode_session.release("r1", 2)
    await decode.idle()


async def test_a_higher_attempt_takes_a_running_decode_over(decode: Worker) -> None:
    wanted = request(PROMPT, max_new_tokens=10)
    expected = reference(PROMPT, wanted.sampling)[0]
    decode.engine.pause()
    first = asyncio.create_task(decode_all(decode, wanted, expected[:1], None, attempt=1))
    await eventually(lambda: len(decode.engine.submitted) == 1)
    second = asyncio.create_task(decode_all(decode, wanted, expected[:3], None, attempt=2))
    with pytest.raises(LeaseExpired, match="superseded"):
        await first
    with pytest.raises(LeaseExpired, match="superseded"):
        await decode_all(decode, wanted, expected[:1], None, attempt=1)
    decode.engine.resume()
    assert [token for step in await second for token in step.token_ids] == expected[3:]
    await decode.idle()


# ---- one message per step ----


async def test_a_step_is_one_message_for_all_sequences(decode: Worker) -> None:
    decode.engine.pause()
    call_ = worker_pb2_grpc.DecodeServiceStub(decode.channel).Session(timeout=TIMEOUT_S)
    for i in range(5):
        message = worker_pb2.DecodeRequest(
            request_id=f"r{i}",
            attempt=1,
            prompt_token_ids=as_token_ids([i + 1]).tobytes(),
            emitted_token_ids=as_token_ids([1]).tobytes(),
            sampling=prefill_request(PROMPT, attempt=1).sampling,
        )
        await call_.write(worker_pb2.DecodeSessionRequest(decode=message))
    await eventually(lambda: len(decode.engine.submitted) == 5)
    decode.engine.resume()
    first = await call_.read()
    assert sorted(output.request_id for output in first.outputs) == [f"r{i}" for i in range(5)]
    await call_.done_writing()
    while await call_.read() is not grpc.aio.EOF:
        pass
    await decode.idle()


async def test_plain_calls_serve_other_clients(prefill: Worker, decode: Worker) -> None:
    prefills = worker_pb2_grpc.PrefillServiceStub(prefill.channel)
    decodes = worker_pb2_grpc.DecodeServiceStub(decode.channel)
    reserve = worker_pb2.ReserveRequest(
        request_id="r1", attempt=1, prompt_token_ids=as_token_ids(PROMPT).tobytes(), max_new_tokens=8
    )
    ticket = (await call(decodes.Reserve, reserve, timeout_s=TIMEOUT_S)).ticket
    message = prefill_request(PROMPT, attempt=1)
    message.ticket.CopyFrom(ticket)
    first = await call(prefills.Prefill, message, timeout_s=TIMEOUT_S)
    wanted = worker_pb2.DecodeRequest(
        request_id="r1",
        attempt=1,
        prompt_token_ids=message.prompt_token_ids,
        emitted_token_ids=first.token_ids,
        sampling=message.sampling,
        source=first.source,
    )
    packed = first.token_ids
    async for response in decodes.Decode(wanted, timeout=TIMEOUT_S):
        assert response.index == len(packed) // 4
        packed += response.token_ids
    assert as_token_ids(reference(PROMPT, SamplingParams(8))[0]).tobytes() == packed
    await prefill.idle()
    await decode.idle()


def prefill_request(prompt: list[int], attempt: int) -> worker_pb2.PrefillRequest:
    message = worker_pb2.PrefillRequest(
        request_id="r1", attempt=attempt, prompt_token_ids=as_token_ids(prompt).tobytes(), timeout_ms=10_000
    )
    message.sampling.max_new_tokens = 8
    message.sampling.top_p = message.sampling.repetition_penalty = 1.0
    return message
