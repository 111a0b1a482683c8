"""Each party fails at each point of the handoff: the client's tokens are the oracle's, and nothing stays held."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from sagellm_common.core.errors import (
    Cancelled,
    Draining,
    EngineFailed,
    InvalidRequest,
    KvCorrupt,
    KvExhausted,
    LeaseExpired,
    NoWorker,
    PeerLost,
    SageError,
)
from sagellm_common.core.types import FinishReason, SamplingParams, WorkerState, as_token_ids
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.rpc.carriers import Choice
from tests.support.router_harness import PROMPT, RouterHarness, router_harness
from tests.support.scripted_workers import LAYOUT, Action, ScriptedDecode, ScriptedPrefill, ScriptedWorker, oracle
from tests.support.waiting import eventually

GREEDY_6 = SamplingParams(max_new_tokens=6)
DECODE_POINTS = ["reserve", "reserved", "pull", "token:1", "token:2", "token:5"]
PREFILL_POINTS = ["prefill", "prefilled"]

FAULTS: dict[str, Callable[[ScriptedWorker], Action]] = {
    "dies": lambda worker: worker.die,
    "breaks its stream": lambda worker: worker.break_stream,
    "fails": lambda worker: worker.refuse(EngineFailed("scripted")),
    "is stopped": lambda worker: worker.refuse(Cancelled("scripted")),
    "drains": lambda worker: worker.refuse(Draining("scripted")),
}


@pytest.fixture(params=["framed", "grpc"])
def carried_by(request: pytest.FixtureRequest) -> Choice:
    return request.param  # type: ignore[no-any-return]


async def two_pairs(router: RouterHarness) -> tuple[list[ScriptedPrefill], list[ScriptedDecode]]:
    """Numbered so that the strategy picks number 0 of each first."""
    prefills = [await router.add(ScriptedPrefill(f"prefill-{i}")) for i in range(2)]
    decodes = [await router.add(ScriptedDecode(f"decode-{i}", prefills=prefills)) for i in range(2)]
    return prefills, decodes


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8}, {"temperature": 0.8, "seed": 3}], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("point", DECODE_POINTS)
async def test_another_decode_worker_takes_over(
    router: RouterHarness, point: str, fault: str, sampling: dict[str, float]
) -> None:
    prefills, decodes = await two_pairs(router)
    decodes[0].on(point, FAULTS[fault](decodes[0]))
    # A seed of the router's may sample the stop token before the fault comes.
    generated = await router.generate(ignore_eos=True, **sampling)
    seed = decodes[1].requests[0].sampling.seed if sampling else None
    temperature = sampling.get("temperature", 0.0)
    expected = SamplingParams(6, temperature=temperature, seed=seed, ignore_eos=True)
    assert generated.tokens == oracle(PROMPT, expected)
    assert generated.summary.decode_worker_id == "decode-1"
    # Right after the pull the router cannot know that the KV is gone at its source, and asks for it once more; unless
    # the engine failed, which only sees a request after the pull. That a worker drains is nobody's failure.
    failures = 2 if point == "token:1" and fault != "fails" else 1
    assert generated.summary.attempts == 1 + failures - (fault == "drains")
    await router.assert_nothing_held()
    assert not any(prefill.pins for prefill in prefills)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_first_token_whose_kv_is_never_pinned_is_gone_on_with(
    router: RouterHarness, fault: str, sampling: dict[str, float]
) -> None:
    prefills, decodes = await two_pairs(router)
    prefills[0].tells_token = True
    prefills[0].on("told", FAULTS[fault](prefills[0]))
    generated = await router.generate(ignore_eos=True, **sampling)
    temperature, seed = sampling.get("temperature", 0.0), sampling.get("seed")
    expected = SamplingParams(6, temperature=temperature, seed=seed, ignore_eos=True)
    assert generated.tokens == oracle(PROMPT, expected)
    assert [request.HasField("source") for decode in decodes for request in decode.requests] == [False]
    await router.assert_nothing_held()
    assert not any(prefill.pins for prefill in prefills)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("point", PREFILL_POINTS)
async def test_another_prefill_worker_takes_over(router: RouterHarness, point: str, fault: str) -> None:
    prefills, decodes = await two_pairs(router)
    prefills[0].on(point, FAULTS[fault](prefills[0]))
    generated = await router.generate()
    assert generated.tokens == oracle(PROMPT, GREEDY_6)
    assert generated.summary.prefill_worker_id == "prefill-1"
    assert generated.summary.attempts == (1 if fault == "drains" else 2)
    await router.assert_nothing_held()
    assert [attempt for decode in decodes for attempt in decode.released] == [("r", 1)]


@pytest.mark.parametrize("point", PREFILL_POINTS)
async def test_decode_stands_in_for_the_only_prefill_worker(router: RouterHarness, point: str) -> None:
    prefill, _ = await router.pair()
    prefill.on(point, prefill.die)
    generated = await router.generate()
    assert generated.tokens == oracle(PROMPT, GREEDY_6)
    assert generated.summary.prefill_worker_id == ""
    await router.assert_nothing_held()


@pytest.mark.parametrize("fault", ["breaks its stream", "fails"])
@pytest.mark.parametrize("point", DECODE_POINTS)
async def test_the_only_decode_worker_gets_another_chance(router: RouterHarness, point: str, fault: str) -> None:
    _, decode = await router.pair()
    decode.on(point, FAULTS[fault](decode))
    assert (await router.generate()).tokens == oracle(PROMPT, GREEDY_6)
    await router.assert_nothing_held()


async def test_kv_that_nobody_pulled_is_pulled_by_the_next_decode_worker(router: RouterHarness) -> None:
    prefills, decodes = await two_pairs(router)
    decodes[0].on("pull", decodes[0].die)
    generated = await router.generate()
    assert generated.tokens == oracle(PROMPT, GREEDY_6)
    assert [len(prefill.requests) for prefill in prefills] == [1, 0]
    assert decodes[1].requests[0].source.worker_id == "prefill-0"
    assert generated.summary.kv_bytes_transferred > 0
    await router.assert_nothing_held()


@pytest.mark.parametrize("error", [PeerLost("scripted"), KvCorrupt("scripted"), LeaseExpired("scripted")], ids=repr)
async def test_kv_that_cannot_be_pulled_is_recomputed(router: RouterHarness, error: SageError) -> None:
    _, decodes = await two_pairs(router)
    decodes[0].on("pull", decodes[0].refuse(error))
    generated = await router.generate()
    assert generated.tokens == oracle(PROMPT, GREEDY_6)
    last = [request for decode in decodes for request in decode.requests if request.attempt == 2]
    assert len(last) == 1 and not last[0].HasField("source") and len(last[0].emitted_token_ids) == 4
    await router.assert_nothing_held()


async def test_a_prefill_worker_that_dies_before_the_pull(router: RouterHarness) -> None:
    prefills, decodes = await two_pairs(router)

    async def find_prefill_dead() -> None:
        prefills[0].kill()
        raise PeerLost("connection refused")

    decodes[0].on("pull", find_prefill_dead)
    generated = await router.generate()
    assert generated.tokens == oracle(PROMPT, GREEDY_6)
    await router.assert_nothing_held()


async def test_a_decode_worker_that_skips_a_token_is_not_believed(router: RouterHarness) -> None:
    _, decodes = await two_pairs(router)
    decodes[0].index_error = 1
    generated = await router.generate()
    assert generated.tokens == oracle(PROMPT, GREEDY_6)
    assert generated.summary.decode_worker_id == "decode-1"
    await router.assert_nothing_held()


async def test_three_workers_may_fail_a_request_but_not_a_fourth_attempt(router: RouterHarness) -> None:
    _, decode = await router.pair()
    decode.on("token:3", *[decode.refuse(EngineFailed("scripted"))] * 3)
    with pytest.raises(EngineFailed, match="scripted"):
        await router.generate()
    assert [request.attempt for request in decode.requests] == [1, 2, 3]
    await router.assert_nothing_held()
    assert router.metric("sagellm_router_requests_total", code="ENGINE_FAILED") == 1


async def test_all_tokens_came_but_the_word_that_it_is_finished_did_not(router: RouterHarness) -> None:
    _, decode = await router.pair()
    decode.on("last", decode.break_stream)
    generated = await router.generate()
    assert generated.tokens == oracle(PROMPT, GREEDY_6)
    assert generated.finish_reason is FinishReason.LENGTH and len(decode.requests) == 1
    await router.assert_nothing_held()


async def test_a_worker_that_only_ever_stops_is_draining_for_the_client(router: RouterHarness) -> None:
    _, decode = await router.pair()
    decode.on("token:3", *[decode.refuse(Cancelled("scripted"))] * 3)
    with pytest.raises(Draining):
        await router.generate()


async def test_an_error_that_no_retry_helps_is_final(router: RouterHarness) -> None:
    _, decodes = await two_pairs(router)
    decodes[0].on("reserve", decodes[0].refuse(InvalidRequest("scripted")))
    with pytest.raises(InvalidRequest, match="scripted"):
        await router.generate()
    assert not decodes[1].reached["reserve"].is_set()
    await router.assert_nothing_held()


async def test_a_full_decode_worker_makes_the_request_wait_not_fail(router: RouterHarness) -> None:
    _, decode = await router.pair()
    decode.on("reserve", *[decode.refuse(KvExhausted("full", retry_after_s=0.1))] * 5)
    generated = await router.generate()
    assert generated.tokens == oracle(PROMPT, GREEDY_6)
    assert generated.summary.attempts == 1
    await router.assert_nothing_held()


async def test_room_that_never_comes_is_kv_exhausted_at_the_deadline(router: RouterHarness) -> None:
    _, decode = await router.pair()
    decode.on("reserve", *[decode.refuse(KvExhausted("full", retry_after_s=0.1))] * 100)
    with pytest.raises(KvExhausted):
        await router.generate(timeout_s=1.0)
    await router.assert_nothing_held()


async def test_the_only_decode_worker_dies_and_nobody_comes(router: RouterHarness) -> None:
    _, decode = await router.pair()
    decode.on("token:3", decode.die)
    with pytest.raises(NoWorker) as caught:
        await router.generate()
    assert caught.value.retry_after_s
    await router.assert_nothing_held()


async def test_a_restarted_decode_worker_resumes_the_stream() -> None:
    async with router_harness(resume_grace_s=10.0) as router:
        _, decode = await router.pair()
        decode.on("token:3", decode.die)
        call = asyncio.create_task(router.generate())
        await decode.reached["token:3"].wait()
        await decode.leave()
        again = ScriptedDecode("decode-0", prefills=decode.prefills.values())
        await router.add(again, ready=False)
        assert (await call).tokens == oracle(PROMPT, GREEDY_6)
        assert [len(again.requests[0].emitted_token_ids) // 4] == [3]


async def test_a_draining_worker_gets_no_new_requests(router: RouterHarness) -> None:
    _, decodes = await two_pairs(router)
    await decodes[0].set_state(WorkerState.DRAINING)
    await eventually(lambda: router.link(decodes[0]).record.state is WorkerState.DRAINING)
    for turn in range(3):
        assert (await router.generate(request_id=f"r{turn}")).summary.decode_worker_id == "decode-1"


async def test_a_worker_that_drops_out_of_the_topology_for_a_moment_loses_nothing(router: RouterHarness) -> None:
    _, decode = await router.pair()
    go_on = asyncio.Event()
    decode.on("token:3", decode.wait_for(go_on))
    call = asyncio.create_task(router.generate())
    await decode.reached["token:3"].wait()
    link = router.link(decode)
    await decode.leave()
    await eventually(lambda: link.departed)
    await decode.rejoin(router.topology)
    await eventually(lambda: link.usable)
    go_on.set()
    generated = await call
    assert generated.tokens == oracle(PROMPT, GREEDY_6) and generated.summary.attempts == 1
    assert router.link(decode) is link


async def test_a_worker_that_leaves_may_finish_what_it_has(router: RouterHarness) -> None:
    _, decodes = await two_pairs(router)
    go_on = asyncio.Event()
    decodes[0].on("token:3", decodes[0].wait_for(go_on))
    call = asyncio.create_task(router.generate())
    await decodes[0].reached["token:3"].wait()
    await decodes[0].leave()
    await eventually(lambda: router.link(decodes[0]).departed)
    go_on.set()
    generated = await call
    assert generated.tokens == oracle(PROMPT, GREEDY_6) and generated.summary.attempts == 1
    await eventually(lambda: router.link(decodes[0]) is None)


async def test_a_full_worker_with_the_prefix_does_not_keep_the_request_from_an_idle_one(router: RouterHarness) -> None:
    hashes = block_hashes(as_token_ids(PROMPT), LAYOUT.block_size_tokens, root_hash(LAYOUT))
    prefill = await router.add(ScriptedPrefill())
    decodes = [ScriptedDecode(f"decode-{i}", prefills=[prefill]) for i in range(2)]
    decodes[0].cached_hashes = hashes
    decodes[0].on("reserve", *[decodes[0].refuse(KvExhausted("full", retry_after_s=0.1))] * 100)
    for decode in decodes:
        await router.add(decode)
    generated = await router.generate()
    assert (generated.tokens, generated.summary.decode_worker_id) == (oracle(PROMPT, GREEDY_6), "decode-1")
    await router.assert_nothing_held()
