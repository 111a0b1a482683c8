"""The undisturbed life of a request."""

from __future__ import annotations

import asyncio

import pytest

from sagellm_common.core.errors import (
    ContextTooLong,
    InvalidRequest,
    KvExhausted,
    NoWorker,
    UnknownModel,
)
from sagellm_common.core.types import FinishReason, SamplingParams, as_token_ids
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.rpc import codec
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2, plan_pb2, topology_pb2
from tests.support.router_harness import PROMPT, Generated, RouterHarness
from tests.support.scripted_workers import (
    LAYOUT,
    MODEL,
    STOP_TOKEN,
    ScriptedDecode,
    ScriptedPrefill,
    next_token,
    oracle,
)
from tests.support.waiting import eventually

GREEDY_6 = SamplingParams(max_new_tokens=6)


async def test_tokens_come_from_prefill_and_decode_and_nothing_is_kept(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    generated = await router.generate()
    assert generated.tokens == oracle(PROMPT, GREEDY_6)
    assert generated.finish_reason is FinishReason.LENGTH
    summary = generated.summary
    assert (summary.prefill_worker_id, summary.decode_worker_id) == ("prefill-0", "decode-0")
    assert (summary.prompt_tokens, summary.completion_tokens, summary.attempts) == (9, 6, 1)
    assert summary.kv_bytes_transferred == 3 * LAYOUT.block_bytes
    assert summary.transport == "tcp" and summary.transfer_ms == 0.5
    assert summary.ttft_ms > 0 and summary.reserve_ms > 0 and summary.prefill_ms > 0
    assert (summary.prefill_compute_ms, summary.prefill_engine_ms, summary.decode_engine_ms) == (1.0, 0.75, 2.5)
    await router.assert_nothing_held()
    assert not prefill.cancelled and not decode.cancelled and not decode.released
    assert router.metric("sagellm_router_requests_total", code="OK") == 1


async def test_decode_hears_where_to_pull_before_prefill_is_done(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    prefill.announces, go_on = True, asyncio.Event()
    prefill.on("prefill", prefill.wait_for(go_on))
    generating = asyncio.create_task(router.generate())
    await eventually(lambda: decode.pulling_ahead)
    assert not decode.requests and not prefill.pins
    go_on.set()
    generated = await generating
    assert generated.tokens == oracle(PROMPT, GREEDY_6)
    (early,), (request,) = decode.pulling_ahead, decode.requests
    assert early.source == request.source
    stages = [event.stage for event in (await router.explain()).events]
    assert stages.index("pull ahead") < stages.index("prefill") < stages.index("transfer")
    await router.assert_nothing_held()


async def test_prefill_is_asked_before_decode_has_reserved(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    prefill.announces, go_on = True, asyncio.Event()
    decode.on("reserve", decode.wait_for(go_on))
    generating = asyncio.create_task(router.generate())
    await eventually(lambda: prefill.pins)
    assert not decode.reservations and not decode.pulling_ahead, "nobody pulls into what is not reserved"
    assert not prefill.requests[0].HasField("ticket")
    go_on.set()
    generated = await generating
    assert generated.tokens == oracle(PROMPT, GREEDY_6) and decode.pulling_ahead
    await router.assert_nothing_held()


async def test_a_refused_reservation_ends_the_prefill_and_the_next_one_comes_first(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    never = asyncio.Event()
    prefill.on("prefill", prefill.wait_for(never))
    decode.on("reserve", decode.refuse(KvExhausted("scripted")))
    generated = await router.generate()
    assert generated.tokens == oracle(PROMPT, GREEDY_6)
    assert prefill.cancelled == [("r", 1)]
    assert [request.HasField("ticket") for request in prefill.requests] == [False, True]
    assert generated.summary.attempts == 1
    await router.assert_nothing_held()


async def test_a_full_decode_worker_reserves_first(router: RouterHarness) -> None:
    prefill = await router.add(ScriptedPrefill())
    decode = ScriptedDecode(prefills=[prefill])
    decode.total_blocks, decode.running = 3, {("another", 1)}  # the prompt needs three
    await router.add(decode)
    decode.on("reserve", lambda: _nobody_asked(prefill))
    assert (await router.generate()).tokens == oracle(PROMPT, GREEDY_6)
    assert prefill.requests[0].HasField("ticket")


async def _nobody_asked(prefill: ScriptedPrefill) -> None:
    assert not prefill.requests


async def test_the_first_token_does_not_wait_for_its_kv_to_be_pinned(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    prefill.tells_token, go_on = True, asyncio.Event()
    prefill.on("told", prefill.wait_for(go_on))
    generated, call = Generated(), router.call()
    async for response in call:
        generated.add(codec.decode_output(response))
        if not go_on.is_set():
            assert generated.tokens == oracle(PROMPT, GREEDY_6)[:1] and not prefill.pins and not decode.requests
            go_on.set()
    assert generated.tokens == oracle(PROMPT, GREEDY_6)
    await router.assert_nothing_held()


async def test_one_new_token_needs_no_decode_and_the_reservation_is_released(router: RouterHarness) -> None:
    _, decode = await router.pair()
    generated = await router.generate(max_new_tokens=1)
    assert generated.tokens == oracle(PROMPT, SamplingParams(max_new_tokens=1))
    assert generated.finish_reason is FinishReason.LENGTH
    await router.assert_nothing_held()
    assert decode.released == [("r", 1)] and not decode.requests


def prompt_stopping_after(num_tokens: int) -> list[int]:
    """A prompt whose generation is `num_tokens` long and then stops."""
    candidates = ([first, second] for first in range(1000) for second in range(1000))
    return next(p for p in candidates if len(oracle(p, SamplingParams(max_new_tokens=num_tokens + 1))) == num_tokens)


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
async def test_a_stop_token_ends_the_stream_and_is_not_in_it(router: RouterHarness, num_tokens: int) -> None:
    await router.pair()
    prompt = prompt_stopping_after(num_tokens)
    generated = await router.generate(prompt, max_new_tokens=20)
    assert generated.tokens == oracle(prompt, SamplingParams(max_new_tokens=20))
    assert len(generated.tokens) == num_tokens
    assert generated.finish_reason is FinishReason.STOP
    assert next_token(prompt + generated.tokens, GREEDY_6) == STOP_TOKEN
    await router.assert_nothing_held()


async def test_without_a_prefill_worker_decode_computes_the_prompt(router: RouterHarness) -> None:
    decode = await router.add(ScriptedDecode())
    generated = await router.generate()
    assert generated.tokens == oracle(PROMPT, GREEDY_6)
    assert generated.summary.prefill_worker_id == ""
    assert [(node.kind, node.worker_id) for node in generated.plan.nodes] == [
        (plan_pb2.PLAN_NODE_KIND_PREFILL, "decode-0"),
        (plan_pb2.PLAN_NODE_KIND_DECODE, "decode-0"),
    ]
    assert "no prefill worker" in generated.plan.reason
    assert not decode.requests[0].HasField("source") and not decode.requests[0].emitted_token_ids


async def test_an_unseeded_sampled_request_gets_one_seed_for_all_its_workers(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    generated = await router.generate(temperature=1.0)
    seed = prefill.requests[0].sampling.seed
    assert decode.requests[0].sampling.seed == seed
    assert generated.tokens == oracle(PROMPT, SamplingParams(max_new_tokens=6, temperature=1.0, seed=seed))


async def test_a_seed_of_the_client_is_kept(router: RouterHarness) -> None:
    await router.pair()
    generated = await router.generate(temperature=1.0, seed=5)
    assert generated.tokens == oracle(PROMPT, SamplingParams(max_new_tokens=6, temperature=1.0, seed=5))


async def test_the_plan_is_in_the_summary_and_can_be_explained(router: RouterHarness) -> None:
    await router.pair()
    generated = await router.generate(request_id="explained")
    assert [node.kind for node in generated.plan.nodes] == [
        plan_pb2.PLAN_NODE_KIND_PREFILL,
        plan_pb2.PLAN_NODE_KIND_TRANSFER,
        plan_pb2.PLAN_NODE_KIND_DECODE,
    ]
    explained = await router.explain("explained")
    assert explained.plan == generated.plan
    stages = [event.stage for event in explained.events]
    assert stages == ["admit", "match", "plan", "reserve", "prefill", "prompt KV", "transfer", "decode", "release"]


async def test_a_cached_prefix_draws_the_request_and_shortens_the_plan(router: RouterHarness) -> None:
    hashes = block_hashes(as_token_ids(PROMPT), LAYOUT.block_size_tokens, root_hash(LAYOUT))
    prefills = [ScriptedPrefill("prefill-0"), ScriptedPrefill("prefill-1")]
    prefills[1].cached_hashes = hashes
    for prefill in prefills:
        await router.add(prefill)
    await router.add(ScriptedDecode(prefills=prefills))
    for turn in range(3):
        generated = await router.generate(request_id=f"r{turn}")
        assert generated.summary.prefill_worker_id == "prefill-1"
        assert (generated.plan.nodes[0].start_token, generated.plan.nodes[0].end_token) == (8, 9)
    other = await router.generate([1, 2, 3], request_id="other")
    assert other.summary.prefill_worker_id == "prefill-0"


async def test_what_another_cache_has_more_of_is_fetched_from_there(router: RouterHarness) -> None:
    """A prefill worker that is taken for other reasons, here that it is the only one left, hears of who has the KV."""
    hashes = block_hashes(as_token_ids(PROMPT), LAYOUT.block_size_tokens, root_hash(LAYOUT))
    prefill = ScriptedPrefill()
    decode = ScriptedDecode(prefills=[prefill])
    prefill.cached_hashes, decode.cached_hashes = hashes[:1], hashes
    for one in (prefill, decode):
        await router.add(one)
    generated = await router.generate()
    assert generated.tokens == oracle(PROMPT, GREEDY_6)
    fetch, compute = generated.plan.nodes[:2]
    assert (fetch.kind, fetch.worker_id, fetch.source_id) == (plan_pb2.PLAN_NODE_KIND_FETCH, "prefill-0", "decode-0")
    assert (fetch.start_token, fetch.end_token, compute.start_token) == (4, 8, 8)
    (request,) = prefill.requests
    peer = request.peer
    assert (peer.worker_id, peer.cached_tokens, peer.incarnation) == ("decode-0", 8, decode.incarnation)
    assert peer.control_address == decode.record.address

    prefill.cached_hashes = hashes
    await router.generate([9, 9, 9, 9, 9], request_id="unknown")
    assert not prefill.requests[-1].HasField("peer")


async def test_equal_workers_take_turns(router: RouterHarness) -> None:
    prefills = [await router.add(ScriptedPrefill(f"prefill-{i}")) for i in range(2)]
    decodes = [await router.add(ScriptedDecode(f"decode-{i}", prefills=prefills)) for i in range(2)]
    for turn in range(4):
        assert (await router.generate(request_id=f"r{turn}")).tokens == oracle(PROMPT, GREEDY_6)
    assert [len(worker.requests) for worker in [*prefills, *decodes]] == [2, 2, 2, 2]


async def test_list_models(router: RouterHarness) -> None:
    await router.pair()
    models = (await router.stub.ListModels(inference_pb2.ListModelsRequest(), timeout=5)).models
    assert [(model.name, model.context_length_tokens) for model in models] == [(MODEL.name, 256)]


async def test_the_topology_shows_live_kv_numbers(router: RouterHarness) -> None:
    prefill, _ = await router.pair()
    prefill.pins.add(("someone", 1))
    snapshot = await router.topology_stub.Get(topology_pb2.GetTopologyRequest(), timeout=5)
    by_id = {status.record.worker_id: status.kv for status in snapshot.workers}
    assert (by_id["prefill-0"].used_blocks, by_id["prefill-0"].total_blocks) == (1, 64)
    assert by_id["decode-0"].free_blocks == 64
    prefill.pins.clear()


async def test_an_empty_request_id_is_replaced(router: RouterHarness) -> None:
    await router.pair()
    generated = await router.generate(request_id="")
    assert len({output.request_id for output in generated.outputs}) == 1 and generated.outputs[0].request_id


@pytest.mark.parametrize(
    ("prompt", "kwargs", "error", "says"),
    [
        ([], {}, InvalidRequest, "prompt"),
        ([1, 1000], {}, InvalidRequest, "1000"),
        ([-1], {}, InvalidRequest, "-1"),
        (PROMPT, {"temperature": float("nan")}, InvalidRequest, "temperature"),
        (PROMPT, {"max_new_tokens": 0}, InvalidRequest, "max_new_tokens"),
        (PROMPT, {"max_new_tokens": -4}, InvalidRequest, "max_new_tokens"),
        (PROMPT, {"max_new_tokens": 300}, ContextTooLong, "256"),
        (PROMPT, {"top_p": 3.0}, InvalidRequest, "top_p"),
        (PROMPT, {"model": "gpt"}, UnknownModel, MODEL.name),
        (PROMPT, {"request_id": "r" * 1000}, InvalidRequest, "1000 characters"),
    ],
)
async def test_bad_input_is_refused_and_the_router_goes_on(
    router: RouterHarness, prompt: list[int], kwargs: dict[str, object], error: type[Exception], says: str
) -> None:
    prefill, decode = await router.pair()
    with pytest.raises(error, match=says):
        await router.generate(prompt, **kwargs)
    assert not prefill.requests and not decode.reached["reserve"].is_set()
    assert (await router.generate()).tokens == oracle(PROMPT, GREEDY_6)
    await router.assert_nothing_held()


async def test_without_any_worker_no_worker_says_when_to_come_back(router: RouterHarness) -> None:
    with pytest.raises(NoWorker) as caught:
        await router.generate()
    assert caught.value.retry_after_s


async def test_prefill_alone_is_no_worker(router: RouterHarness) -> None:
    await router.add(ScriptedPrefill())
    with pytest.raises(NoWorker, match="decode"):
        await router.generate()


async def test_a_request_waits_for_a_worker_that_is_about_to_join(router: RouterHarness) -> None:
    await router.pair()
    first = router.workers[1]
    await first.leave()
    await eventually(lambda: router.topology.snapshot().find("decode-0") is None)
    call = router.call()
    await eventually(lambda: router.pipeline.in_flight == 1)
    await router.add(ScriptedDecode("decode-1", prefills=[router.workers[0]]), ready=False)  # type: ignore[list-item]
    tokens = [token async for message in call for token in message.token_ids]
    assert len(tokens) == 4 * 6


async def test_a_reservation_is_renewed_while_its_prompt_is_computed(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    decode.lease_ttl_ms = 150
    computed = asyncio.Event()
    prefill.on("prefill", prefill.wait_for(computed))
    call = asyncio.create_task(router.generate())
    await eventually(lambda: len(decode.renewed) >= 3)  # each a third of the lease: it would be over without them
    computed.set()
    assert (await call).tokens == oracle(PROMPT, SamplingParams(max_new_tokens=6))
    assert set(decode.renewed) == {("r", 1)}


async def test_explaining_an_unknown_request_is_refused(router: RouterHarness) -> None:
    with pytest.raises(Exception, match="not among the latest"):
        await router.explain("never")


async def test_the_clients_trace_goes_on_to_every_worker(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    await router.generate(metadata=[("traceparent", f"00-{trace_id}-b7ad6b7169203331-01")])
    carriers = [*prefill.trace_contexts, *decode.trace_contexts]
    assert len(carriers) == 2 and all(trace_id in carrier["traceparent"] for carrier in carriers)


async def test_metrics_tell_of_a_request(router: RouterHarness) -> None:
    await router.pair()
    await router.generate()
    assert router.metric("sagellm_router_prompt_tokens_total") == len(PROMPT)
    assert router.metric("sagellm_router_generated_tokens_total") == 6
    assert router.metric("sagellm_router_kv_transfer_bytes_total") == 3 * LAYOUT.block_bytes
    assert router.metric("sagellm_router_ttft_seconds_count") == 1
    assert router.metric("sagellm_router_tpot_seconds_count") == 1
