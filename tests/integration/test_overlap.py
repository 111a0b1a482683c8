"""Decode pulls while prefill computes, over real gRPC, the TCP byte path and real leases; only the engine is simulated.

A paused engine computes one layer of one chunk per `step()`: 14 prompt tokens in chunks of 8 are two chunks of two
layers, so the tests see each state of a prompt that is half computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sagellm_common.core import telemetry
from sagellm_common.core.errors import (
    Cancelled,
    EngineFailed,
    KvCorrupt,
    LayoutMismatch,
    LeaseExpired,
    PeerLost,
    SageError,
)
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import FinishReason, GenerationRequest, KvSource, SamplingParams, WorkerRole
from sagellm_common.rpc.sessions import DecodeStep, PrefillOutcome
from services.decode.ahead import Ahead
from tests.support.simulated_engine import SimulatedEngine, reference
from tests.support.topology_server import topology_server
from tests.support.waiting import TIMEOUT_S, eventually
from tests.support.workers import Worker, decode_all, request, test_config, worker

PROMPT = list(range(1, 15))
NUM_BLOCKS, NUM_LAYERS, NUM_CHUNKS = 4, 2, 2
ALWAYS = "transport.overlap_min_bytes=0"
EACH_LAYER = "transport.segment_min_bytes=1"
"""The blocks here are a few bytes: layers would be gathered until the chunk is done."""


@pytest.fixture
async def router() -> AsyncIterator[str]:
    async with topology_server(EmbeddedTopology()) as address:
        yield address


@asynccontextmanager
async def prefill_worker(router: str, *settings: str, engine: SimulatedEngine | None = None) -> AsyncIterator[Worker]:
    async with worker(
        WorkerRole.PREFILL, router, config=test_config(ALWAYS, EACH_LAYER, *settings), engine=engine
    ) as made:
        yield made


@pytest.fixture
async def prefill(router: str) -> AsyncIterator[Worker]:
    async with prefill_worker(router) as made:
        yield made


@pytest.fixture
async def decode(router: str) -> AsyncIterator[Worker]:
    async with worker(WorkerRole.DECODE, router) as made:
        yield made


@dataclass
class Overlapped:
    """A request whose prefill runs, and is announced, as the router does it."""

    wanted: GenerationRequest
    prefill: Worker
    decode: Worker
    attempt: int
    started: asyncio.Future[KvSource]
    prefilling: asyncio.Task[PrefillOutcome]

    async def rest(self) -> list[int]:
        """All its tokens, once it is let go on."""
        return await self.tokens_of(await self.prefilling)

    async def tokens_of(self, first: PrefillOutcome) -> list[int]:
        self.steps = await decode_all(self.decode, self.wanted, first.token_ids, first.source, self.attempt)
        return [*first.token_ids, *(token for step in self.steps for token in step.token_ids)]

    @property
    def first_step(self) -> DecodeStep:
        return self.steps[0]

    @property
    def began(self) -> bool:
        """Whether decode has begun to pull."""
        assert self.decode.aheads is not None
        return self.decode.aheads.find(self.wanted.request_id, self.attempt) is not None

    def here(self) -> int:
        """Bytes that decode has pulled of it so far."""
        assert self.decode.aheads is not None
        ahead = self.decode.aheads.find(self.wanted.request_id, self.attempt)
        return ahead.bytes_here if ahead is not None else 0

    async def step_until(self, num_bytes: int) -> None:
        """Computes layer by layer until so much has arrived."""
        while self.here() < num_bytes:
            before = self.here()
            self.prefill.engine.step()
            await eventually(lambda before=before: self.here() > before)  # type: ignore[misc]


async def begin(
    prefill: Worker, decode: Worker, wanted: GenerationRequest, attempt: int = 1, *, pull_ahead: bool = True
) -> Overlapped:
    """Reserves, and starts a prefill that stands still before its first layer."""
    ticket = await decode.decode_session.reserve(wanted, attempt, timeout_s=TIMEOUT_S)
    started: asyncio.Future[KvSource] = asyncio.get_running_loop().create_future()
    prefill.engine.pause()

    def on_started(source: KvSource) -> None:
        started.set_result(source)
        if pull_ahead:
            decode.decode_session.pull_ahead(wanted.request_id, attempt, source, timeout_s=TIMEOUT_S)

    prefilling = asyncio.create_task(
        prefill.prefill_session.prefill(wanted, attempt, ticket, timeout_s=TIMEOUT_S, on_started=on_started)
    )
    await eventually(lambda: bool(prefill.engine.submitted))
    return Overlapped(wanted, prefill, decode, attempt, started, prefilling)


def all_bytes(worker: Worker) -> int:
    return NUM_BLOCKS * worker.engine.kv.layout.block_bytes


# ---- the same tokens as one engine ----


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 7, 8, 9, 16, 31, 100])
@pytest.mark.parametrize("chunk", [8, 6, 1000], ids=["whole-blocks", "split-blocks", "one-chunk"])
async def test_tokens_equal_the_single_engine(router: str, decode: Worker, num_tokens: int, chunk: int) -> None:
    async with prefill_worker(router, engine=SimulatedEngine(max_prefill_tokens=chunk)) as prefill:
        prompt = [7 * i % 97 + 1 for i in range(num_tokens)]
        wanted = request(prompt, max_new_tokens=10)
        running = await begin(prefill, decode, wanted)
        prefill.engine.resume()
        assert await running.rest() == reference(prompt, wanted.sampling)[0]
        transfer = running.first_step.transfer
        assert transfer is not None
        assert transfer.bytes == -(-num_tokens // 4) * decode.engine.kv.layout.block_bytes
        assert transfer.began_ahead_ms > 0
        await prefill.idle()
        await decode.idle()


async def test_layers_arrive_as_they_are_computed(prefill: Worker, decode: Worker) -> None:
    running = await begin(prefill, decode, request(PROMPT))
    total = all_bytes(decode)
    source = await running.started
    assert (source.num_tokens, source.tokens_ready, len(source.block_table)) == (14, 0, NUM_BLOCKS)
    seen = []
    for _ in range(NUM_CHUNKS * NUM_LAYERS):
        before = running.here()
        prefill.engine.step()
        await eventually(lambda before=before: running.here() > before)  # type: ignore[misc]
        seen.append(running.here())
    # Two blocks of the first chunk, two of the second, layer after layer.
    assert seen == [total * (n + 1) // (NUM_CHUNKS * NUM_LAYERS) for n in range(NUM_CHUNKS * NUM_LAYERS)]
    prefill.engine.resume()
    assert await running.rest() == reference(PROMPT, running.wanted.sampling)[0]
    assert running.first_step.transfer is not None
    assert running.first_step.transfer.bytes_ahead == running.first_step.transfer.bytes == total
    await prefill.idle()
    await decode.idle()


async def test_blocks_that_prefill_has_cached_are_there_from_the_start(prefill: Worker, decode: Worker) -> None:
    first = await begin(prefill, decode, request(PROMPT))
    prefill.engine.resume()
    await first.rest()
    await decode.idle()
    decode.engine.kv.forget()
    running = await begin(prefill, decode, request(PROMPT, request_id="r2"))
    assert (await running.started).tokens_ready == 12
    await eventually(lambda: running.here() == all_bytes(decode) * 3 // 4)
    prefill.engine.resume()
    assert await running.rest() == reference(PROMPT, running.wanted.sampling)[0]
    await decode.idle()


async def test_blocks_that_decode_has_are_not_pulled(prefill: Worker, decode: Worker) -> None:
    first = await begin(prefill, decode, request(PROMPT))
    prefill.engine.resume()
    await first.rest()
    await decode.idle()
    prefill.engine.kv.forget()
    running = await begin(prefill, decode, request(PROMPT, request_id="r2"))
    prefill.engine.resume()
    assert await running.rest() == reference(PROMPT, running.wanted.sampling)[0]
    assert running.first_step.transfer is not None
    assert (running.first_step.transfer.blocks, running.first_step.transfer.blocks_reused) == (1, 3)
    await decode.idle()


async def test_many_at_once(prefill: Worker, decode: Worker) -> None:
    wanted = [request([i + 1, *PROMPT[: i % 14]], max_new_tokens=6, request_id=f"r{i}") for i in range(12)]
    running = [await begin(prefill, decode, one) for one in wanted]
    prefill.engine.resume()
    for one, tokens in zip(wanted, await asyncio.gather(*(r.rest() for r in running)), strict=True):
        assert tokens == reference(one.prompt_token_ids.tolist(), one.sampling)[0]
    await prefill.idle()
    await decode.idle()


# ---- when it is not done ----


@pytest.mark.parametrize("setting", ["transport.overlap=off", "transport.overlap_min_bytes=1000"])
async def test_not_worth_it_or_not_wanted(router: str, setting: str) -> None:
    async with prefill_worker(router, setting) as prefill, worker(WorkerRole.DECODE, router) as decode:
        running = await begin(prefill, decode, request(PROMPT))
        prefill.engine.resume()
        assert await running.rest() == reference(PROMPT, running.wanted.sampling)[0]
        assert not running.started.done()
        assert running.first_step.transfer is not None
        assert running.first_step.transfer.bytes_ahead == 0
        await prefill.idle()
        await decode.idle()


@pytest.mark.parametrize("stop", ["length", "stop"])
async def test_nothing_left_to_decode(prefill: Worker, decode: Worker, stop: str) -> None:
    """One token wanted is known beforehand; a stop token is not, and ends the pull."""
    first = reference(PROMPT, SamplingParams(1))[0][0]
    wanted = request(PROMPT, max_new_tokens=1) if stop == "length" else request(PROMPT, stop_token_ids=(first,))
    running = await begin(prefill, decode, wanted)
    prefill.engine.resume()
    outcome = await running.prefilling
    assert outcome.finish_reason is (FinishReason.LENGTH if stop == "length" else FinishReason.STOP)
    assert running.started.done() is (stop == "stop")
    assert outcome.source is None
    decode.decode_session.release("r1", 1)
    await prefill.idle()
    await decode.idle()


# ---- cancelled at every stage ----


async def reach(running: Overlapped, stage: str) -> None:
    """announced: nothing computed; half-way: half of it computed and pulled; computed: all of it, and answered."""
    await eventually(lambda: running.decode.load.reservations == 1 and running.began)
    if stage == "half-way":
        await running.step_until(all_bytes(running.decode) // 2)
    if stage == "computed":
        running.prefill.engine.resume()
        await running.prefilling
        await eventually(lambda: running.here() == all_bytes(running.decode))


STAGES = pytest.mark.parametrize("stage", ["announced", "half-way", "computed"])


@STAGES
@pytest.mark.parametrize("first", ["prefill", "decode"])
async def test_cancelled(prefill: Worker, decode: Worker, stage: str, first: str) -> None:
    """By the router, who tells both; each may hear of it first, and twice."""
    running = await begin(prefill, decode, request(PROMPT))
    await reach(running, stage)
    undo = {"prefill": prefill.prefill_session.cancel, "decode": decode.decode_session.release}
    undo[first]("r1", 1)
    if first == "prefill" and stage != "computed":
        with pytest.raises(Cancelled):
            await running.prefilling
    prefill.engine.resume()
    await (prefill if first == "prefill" else decode).idle()
    for _ in range(2):
        for cancel in undo.values():
            cancel("r1", 1)
    await asyncio.wait([running.prefilling])
    await prefill.idle()
    await decode.idle()


@STAGES
async def test_a_lost_router_leaves_nothing_behind(router: str, stage: str) -> None:
    config = test_config(ALWAYS, EACH_LAYER, "transport.lease_ttl_s=0.3")
    async with (
        worker(WorkerRole.PREFILL, router, config=config) as prefill,
        worker(WorkerRole.DECODE, router, config=config) as decode,
    ):
        running = await begin(prefill, decode, request(PROMPT))
        await reach(running, stage)
        await prefill.prefill_session.close()
        await decode.decode_session.close()
        await asyncio.wait([running.prefilling])
        prefill.engine.resume()
        await prefill.idle()
        await decode.idle()


@pytest.mark.parametrize("how", ["cancel", "session"])
async def test_cancelled_while_decode_waits_for_the_rest(prefill: Worker, decode: Worker, how: str) -> None:
    """A Decode call that came before all bytes did."""
    running = await begin(prefill, decode, request(PROMPT))
    await reach(running, "half-way")
    early = PrefillOutcome((1,), (), None, await running.started, 0, 0, 0.0, 0.0, 0.0)
    decoding = asyncio.create_task(running.tokens_of(early))
    await eventually(lambda: decode.load.waiting_requests == 1)
    if how == "cancel":
        decode.decode_session.cancel("r1", 1)
    else:
        await decode.decode_session.close()
    with pytest.raises(Cancelled if how == "cancel" else PeerLost):
        await decoding
    await decode.idle()
    prefill.prefill_session.cancel("r1", 1)
    prefill.engine.resume()
    await asyncio.wait([running.prefilling])
    await prefill.idle()
    await decode.idle()
    assert decode.engine.submitted == []


async def test_a_higher_attempt_takes_over(prefill: Worker, decode: Worker) -> None:
    """The first one's prefill and pull end; a late word of it changes nothing."""
    first = await begin(prefill, decode, request(PROMPT))
    await reach(first, "half-way")
    second = await begin(prefill, decode, request(PROMPT), attempt=2)
    with pytest.raises(LeaseExpired):
        await first.prefilling
    decode.decode_session.pull_ahead("r1", 1, await first.started, timeout_s=TIMEOUT_S)
    decode.decode_session.release("r1", 1)
    prefill.prefill_session.cancel("r1", 1)
    prefill.engine.resume()
    assert await second.rest() == reference(PROMPT, second.wanted.sampling)[0]
    assert second.first_step.transfer is not None
    assert second.first_step.transfer.began_ahead_ms > 0
    await prefill.idle()
    await decode.idle()


async def test_pulling_ahead_without_a_reservation_is_a_no_op(prefill: Worker, decode: Worker) -> None:
    running = await begin(prefill, decode, request(PROMPT), pull_ahead=False)
    decode.decode_session.release("r1", 1)
    decode.decode_session.pull_ahead("r1", 1, await running.started, timeout_s=TIMEOUT_S)
    prefill.engine.resume()
    outcome = await running.prefilling
    with pytest.raises(LeaseExpired):
        await running.tokens_of(outcome)
    await prefill.idle()
    await decode.idle()


# ---- what goes wrong on the way ----


async def test_a_prefill_that_fails_half_way(prefill: Worker, decode: Worker) -> None:
    running = await begin(prefill, decode, request(PROMPT))
    await reach(running, "half-way")
    prefill.engine.failure = EngineFailed("boom")
    prefill.engine.step()
    with pytest.raises(EngineFailed, match="boom"):
        await running.prefilling
    await prefill.idle()
    again = await begin(prefill, decode, request(PROMPT), attempt=2)
    prefill.engine.resume()
    assert await again.rest() == reference(PROMPT, again.wanted.sampling)[0]
    await decode.idle()


async def test_a_prefill_worker_that_dies_half_way(router: str, decode: Worker) -> None:
    async with prefill_worker(router) as dying:
        running = await begin(dying, decode, request(PROMPT))
        await reach(running, "half-way")
        await dying.runtime.close()
        with pytest.raises(SageError):
            await running.prefilling
    async with prefill_worker(router) as other:
        again = await begin(other, decode, request(PROMPT), attempt=2)
        other.engine.resume()
        assert await again.rest() == reference(PROMPT, again.wanted.sampling)[0]
        await other.idle()
    await decode.idle()


async def test_a_decode_worker_that_dies_half_way(router: str, prefill: Worker, decode: Worker) -> None:
    """What was pinned for it serves the next attempt's decode worker, as a whole."""
    async with worker(WorkerRole.DECODE, router, worker_id="decode-1") as dying:
        running = await begin(prefill, dying, request(PROMPT))
        await reach(running, "half-way")
        await dying.runtime.close()
    prefill.engine.resume()
    outcome = await running.prefilling
    await decode.decode_session.reserve(running.wanted, 2, timeout_s=TIMEOUT_S)
    steps = await decode_all(decode, running.wanted, outcome.token_ids, outcome.source, attempt=2)
    tokens = [*outcome.token_ids, *(token for step in steps for token in step.token_ids)]
    assert tokens == reference(PROMPT, running.wanted.sampling)[0]
    assert steps[0].transfer is not None
    assert (steps[0].transfer.blocks, steps[0].transfer.bytes_ahead) == (NUM_BLOCKS, 0)
    await prefill.idle()
    await decode.idle()


async def test_a_corrupt_segment_is_an_error_of_the_decode_call(
    prefill: Worker, decode: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next attempt, computed anew, is right."""
    running = await begin(prefill, decode, request(PROMPT))
    await running.step_until(all_bytes(decode) // 4)
    with monkeypatch.context() as patch:
        patch.setattr("sagellm_common.comm_backend.backends.tcp_source.segment_digest", lambda views: bytes(8))
        assert decode.aheads is not None
        ahead = decode.aheads.find("r1", 1)
        assert ahead is not None
        prefill.engine.step()
        await asyncio.wait([ahead.task])
    prefill.engine.resume()
    with pytest.raises(KvCorrupt, match=r"layers 1\.\.1 of blocks 0\.\.1"):
        await running.rest()
    decode.decode_session.cancel("r1", 1)
    await prefill.idle()
    again = await begin(prefill, decode, request(PROMPT), attempt=2)
    prefill.engine.resume()
    assert await again.rest() == reference(PROMPT, again.wanted.sampling)[0]
    await prefill.idle()
    await decode.idle()


@pytest.mark.parametrize("why", ["connection", "moved"])
async def test_a_pull_ahead_that_fails_is_made_up_for(prefill: Worker, decode: Worker, why: str) -> None:
    """The connection broke, or the engine computed in other blocks: the Decode call pulls all of it."""
    running = await begin(prefill, decode, request(PROMPT))
    await reach(running, "half-way")
    assert decode.aheads is not None
    ahead = decode.aheads.find("r1", 1)
    assert ahead is not None
    if why == "connection":
        prefill.break_connections()
    else:
        prefill.leases.progress("r1", ahead.job.source.epoch)[1].fail(LeaseExpired("moved"))
    await asyncio.wait([ahead.task])
    prefill.engine.resume()
    assert await running.rest() == reference(PROMPT, running.wanted.sampling)[0]
    transfer = running.first_step.transfer
    assert transfer is not None
    assert (transfer.bytes, transfer.bytes_ahead) == (all_bytes(decode), 0)
    await prefill.idle()
    await decode.idle()


async def test_a_source_of_another_epoch_is_not_taken_for_the_pulled_one(prefill: Worker, decode: Worker) -> None:
    """What was pulled ahead counts for exactly the source that the Decode call names."""
    running = await begin(prefill, decode, request(PROMPT))
    prefill.engine.resume()
    outcome = await running.prefilling
    await reach(running, "computed")
    assert outcome.source is not None
    with pytest.raises(LeaseExpired):
        await running.tokens_of(replace(outcome, source=replace(outcome.source, epoch=7)))
    prefill.prefill_session.cancel("r1", 1)
    await prefill.idle()
    await decode.idle()


async def test_blocks_of_another_size_are_transcoded_along(router: str, prefill: Worker) -> None:
    """The first chunk is two blocks there and one here: it is here before the second is computed."""
    async with worker(WorkerRole.DECODE, router, engine=SimulatedEngine(block_size_tokens=8)) as decode:
        running = await begin(prefill, decode, request(PROMPT))
        for _ in range(NUM_LAYERS):
            prefill.engine.step()
        await eventually(lambda: running.here() == all_bytes(prefill) // 2)
        assert not running.prefilling.done()
        prefill.engine.resume()
        assert await running.rest() == reference(PROMPT, running.wanted.sampling)[0]
        transfer = running.first_step.transfer
        assert transfer is not None
        assert (transfer.bytes, transfer.blocks, transfer.blocks_reused) == (all_bytes(prefill), 2, 0)
        assert transfer.bytes_ahead >= all_bytes(prefill) // 2
        assert transfer.conversion is None
        await prefill.idle()
        await decode.idle()


async def test_another_layout_is_refused(router: str, prefill: Worker) -> None:
    async with worker(WorkerRole.DECODE, router, engine=SimulatedEngine(model="other")) as decode:
        running = await begin(prefill, decode, request(PROMPT))
        prefill.engine.resume()
        with pytest.raises(LayoutMismatch, match="model_fingerprint"):
            await running.rest()
        await prefill.idle()
        await decode.idle()


# ---- what it tells ----


async def test_the_trace_shows_the_overlap(prefill: Worker, decode: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("test"))
    with telemetry.span("request") as root:
        running = await begin(prefill, decode, request(PROMPT))
        await reach(running, "computed")
        await running.rest()
        await decode.idle()
    names = {"prefill", "pull_ahead", "transfer", "decode"}
    spans = {span.name: span for span in exporter.get_finished_spans() if span.name in names}
    assert {span.context.trace_id for span in spans.values()} == {root.get_span_context().trace_id}
    ahead, transfer, computed = spans["pull_ahead"], spans["transfer"], spans["prefill"]
    assert ahead.start_time < computed.end_time, "the pull began after prefill had ended"
    assert ahead.attributes is not None
    assert ahead.attributes["bytes"] == all_bytes(decode)
    assert transfer.attributes is not None
    assert transfer.attributes["bytes_ahead"] == all_bytes(decode)
    assert transfer.attributes["exposed_ms"] >= 0


# ---- as planned ----


@pytest.mark.parametrize(("planned", "segment_bytes"), [(True, 1 << 20), (True, 1), (False, 0)])
async def test_the_plan_decides_where_the_configuration_does_not(
    router: str, decode: Worker, planned: bool, segment_bytes: int
) -> None:
    async with worker(WorkerRole.PREFILL, router) as prefill:
        wanted = request(PROMPT)
        ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
        started: list[KvSource] = []

        def on_started(source: KvSource) -> None:
            started.append(source)
            decode.decode_session.pull_ahead(wanted.request_id, 1, source, timeout_s=TIMEOUT_S)

        first = await prefill.prefill_session.prefill(
            wanted,
            1,
            ticket,
            timeout_s=TIMEOUT_S,
            on_started=on_started,
            overlap=planned,
            segment_bytes=segment_bytes,
        )
        steps = await decode_all(decode, wanted, first.token_ids, first.source, 1)
        tokens = [*first.token_ids, *(token for step in steps for token in step.token_ids)]
        assert tokens == reference(PROMPT, wanted.sampling)[0]
        assert bool(started) == planned
        await prefill.idle()
        await decode.idle()


@pytest.mark.parametrize(("segment_bytes", "segments"), [(1, NUM_CHUNKS * NUM_LAYERS), (1 << 20, NUM_CHUNKS)])
async def test_segments_are_as_large_as_planned(
    router: str, decode: Worker, monkeypatch: pytest.MonkeyPatch, segment_bytes: int, segments: int
) -> None:
    """Layer by layer, or whole chunks, whatever the worker is configured to."""
    sent: list[object] = []
    count_bytes = Ahead.count

    def count(self: Ahead, num_bytes: int) -> None:
        sent.append(num_bytes)
        count_bytes(self, num_bytes)

    monkeypatch.setattr(Ahead, "count", count)
    async with worker(WorkerRole.PREFILL, router, config=test_config(ALWAYS)) as prefill:
        wanted = request(PROMPT)
        ticket = await decode.decode_session.reserve(wanted, 1, timeout_s=TIMEOUT_S)
        prefill.engine.pause()
        begun = asyncio.create_task(
            prefill.prefill_session.prefill(
                wanted,
                1,
                ticket,
                timeout_s=TIMEOUT_S,
                on_started=lambda source: decode.decode_session.pull_ahead(
                    wanted.request_id, 1, source, timeout_s=TIMEOUT_S
                ),
                segment_bytes=segment_bytes,
            )
        )
        await eventually(lambda: decode.aheads is not None and decode.aheads.find(wanted.request_id, 1))
        per_step = segments // NUM_CHUNKS
        for step in range(1, NUM_CHUNKS * NUM_LAYERS + 1):
            prefill.engine.step()
            due = step // NUM_LAYERS if per_step == 1 else step
            await eventually(lambda due=due: len(sent) == due)  # type: ignore[misc]
        prefill.engine.resume()
        first = await begun
        await decode_all(decode, wanted, first.token_ids, first.source, 1)
        await prefill.idle()
        await decode.idle()
    assert len(sent) == segments
