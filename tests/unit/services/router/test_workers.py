"""Following the topology and the workers' own words."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest

from sagellm_common.core.types import BlockHash, KvLayout, SamplingParams, as_token_ids
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from sagellm_common.rpc.gen.sagellm.v1 import plan_pb2, topology_pb2
from tests.support.router_harness import PATIENCE_S, PROMPT, RouterHarness, router_harness
from tests.support.scripted_workers import LAYOUT, MODEL, ScriptedDecode, ScriptedPrefill, oracle
from tests.support.waiting import eventually

GREEDY_6 = SamplingParams(max_new_tokens=6)
HASHES = block_hashes(as_token_ids(PROMPT), LAYOUT.block_size_tokens, root_hash(LAYOUT))


def matched(router: RouterHarness) -> dict[str, int]:
    """Tokens of the prompt that each worker is said to hold."""
    return router.router.workers.matched(b"".join(HASHES), LAYOUT.block_size_tokens)


async def test_a_newcomer_with_another_layout_is_named_and_not_used(
    router: RouterHarness, caplog: pytest.LogCaptureFixture
) -> None:
    await router.pair()
    odd = replace(MODEL, kv_layout=replace(LAYOUT, dtype="int8", block_bytes=256))
    with caplog.at_level(logging.ERROR):
        stranger = await router.add(ScriptedPrefill("prefill-odd", model=odd))
    message = next(r.getMessage() for r in caplog.records if "prefill-odd" in r.getMessage())
    assert "dtype 'int8' != 'float32'" in message and "block_bytes" in message
    for turn in range(3):
        assert (await router.generate(request_id=f"r{turn}")).summary.prefill_worker_id == "prefill-0"
    assert not stranger.requests
    assert router.router.workers.models() == {MODEL.name: MODEL}


async def test_workers_with_other_block_sizes_are_used_and_each_matched_by_its_own(router: RouterHarness) -> None:
    larger = replace(LAYOUT, block_size_tokens=8, block_bytes=1024)
    prefills = [await router.add(ScriptedPrefill(f"prefill-{i}")) for i in range(2)]
    await router.add(ScriptedDecode(prefills=prefills, model=replace(MODEL, kv_layout=larger)))
    prompt = [*PROMPT, *range(30, 40)]  # 19 tokens: 4 blocks of 4, 2 of 8

    def stored(layout: KvLayout) -> list[BlockHash]:
        return block_hashes(as_token_ids(prompt), layout.block_size_tokens, root_hash(layout))

    prefills[1].publish(2, stored=stored(LAYOUT)[:3])
    router.workers[2].publish(2, stored=stored(larger))
    await eventually(lambda: router.router.workers.matched(b"".join(stored(LAYOUT)), 4) == {"prefill-1": 12})
    await eventually(lambda: router.router.workers.matched(b"".join(stored(larger)), 8) == {"decode-0": 16})
    generated = await router.generate(prompt)
    assert generated.tokens == oracle(prompt, GREEDY_6)
    assert generated.summary.prefill_worker_id == "prefill-1"
    starts = {node.kind: node.start_token for node in generated.plan.nodes}
    assert starts[plan_pb2.PLAN_NODE_KIND_FETCH] == 12  # four tokens more, of decode's blocks
    assert starts[plan_pb2.PLAN_NODE_KIND_PREFILL] == 16
    assert starts[plan_pb2.PLAN_NODE_KIND_TRANSFER] == 16


async def test_with_the_last_worker_of_a_layout_gone_the_other_layout_counts(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    odd = replace(MODEL, kv_layout=replace(LAYOUT, dtype="int8", block_bytes=256))
    other = await router.add(ScriptedDecode("decode-odd", model=odd))
    await prefill.leave()
    await decode.leave()
    await eventually(lambda: router.link(decode) is None)
    assert (await router.generate()).summary.decode_worker_id == other.worker_id


async def test_another_model_has_its_own_workers(router: RouterHarness) -> None:
    await router.pair()
    other = replace(MODEL, name="other", kv_layout=replace(LAYOUT, model_fingerprint="other"))
    await router.add(ScriptedDecode("decode-other", model=other))
    assert (await router.generate(model="other")).summary.decode_worker_id == "decode-other"
    assert (await router.generate()).summary.decode_worker_id == "decode-0"


async def test_block_events_move_requests_to_where_the_prefix_is(router: RouterHarness) -> None:
    prefills = [await router.add(ScriptedPrefill(f"prefill-{i}")) for i in range(2)]
    await router.add(ScriptedDecode(prefills=prefills))

    async def chosen(request_id: str) -> str:
        return (await router.generate(request_id=request_id)).summary.prefill_worker_id

    assert await chosen("a") == "prefill-0"
    prefills[0].publish(2, stored=HASHES)
    await eventually(lambda: matched(router) == {"prefill-0": 8})
    assert await chosen("b") == "prefill-0"
    prefills[0].publish(3, removed=HASHES[1:])
    await eventually(lambda: matched(router) == {"prefill-0": 4})
    prefills[0].publish(4, removed=HASHES)
    await eventually(lambda: matched(router) == {})
    assert await chosen("c") == "prefill-1"


async def test_a_gap_in_block_events_asks_for_everything_again(router: RouterHarness) -> None:
    prefill, _ = await router.pair()
    prefill.cached_hashes = HASHES[:1]
    prefill.publish(9, stored=HASHES)
    await eventually(lambda: matched(router) == {"prefill-0": 4})


async def test_a_watch_that_broke_is_taken_up_where_it_stopped(router: RouterHarness) -> None:
    prefill, _ = await router.pair()
    prefill.publish(2, stored=HASHES)
    await eventually(lambda: matched(router) == {"prefill-0": 8})
    router.router.workers.suspect(router.link(prefill))
    assert matched(router) == {}
    await eventually(lambda: len(prefill.watches) == 2)
    asked = [(watch.from_revision, watch.incarnation) for watch in prefill.watches]
    assert asked == [(0, prefill.incarnation), (2, prefill.incarnation)]
    assert all(0 < watch.max_interval_ms <= 1000 for watch in prefill.watches)


async def test_a_silent_workers_blocks_do_not_count(router: RouterHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill, _ = await router.pair()
    prefill.publish(2, stored=HASHES)
    await eventually(lambda: matched(router) == {"prefill-0": 8})

    async def indexed() -> dict[str, tuple[int, bool]]:
        snapshot = await router.topology_stub.Get(topology_pb2.GetTopologyRequest(), timeout=PATIENCE_S)
        return {w.record.worker_id: (w.indexed.blocks, w.indexed.credited) for w in snapshot.workers}

    assert await indexed() == {"prefill-0": (2, True), "decode-0": (0, True)}
    monkeypatch.setattr(router.router.workers._cached, "_max_staleness_s", 0.0)
    assert matched(router) == {}
    assert await indexed() == {"prefill-0": (2, False), "decode-0": (0, False)}


async def test_a_lost_workers_blocks_are_forgotten(router: RouterHarness) -> None:
    prefill = ScriptedPrefill()
    prefill.cached_hashes = HASHES
    await router.add(prefill)
    decode = await router.add(ScriptedDecode(prefills=[prefill]))
    prefill.on("prefill", prefill.die)
    assert (await router.generate()).tokens == oracle(PROMPT, GREEDY_6)
    assert matched(router) == {}
    assert router.link(decode).reachable


async def test_another_incarnation_at_a_known_address_is_not_the_worker(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    port = int(decode.record.address.rpartition(":")[2])
    decode.on("token:2", decode.die)
    call = asyncio.create_task(router.generate())
    await decode.reached["token:2"].wait()
    await eventually(lambda: not router.link(decode).reachable)
    with pytest.raises(Exception, match="no decode worker"):
        await call
    again = ScriptedDecode("decode-0", prefills=[prefill])
    await decode.leave()
    await router.add(again, port=port)
    assert (await router.generate()).tokens == oracle(PROMPT, GREEDY_6)
    assert router.link(decode) is None


async def test_no_task_is_left_when_the_router_closes() -> None:
    before = asyncio.all_tasks()
    async with router_harness() as router:
        await router.pair()
        await router.generate()
    left = {task for task in asyncio.all_tasks() - before if not task.done()}
    assert not {task.get_name() for task in left if "grpc" not in repr(task)}


@pytest.mark.parametrize("carried_by", ["framed", "grpc"])
async def test_status_says_what_carries_the_sessions(router: RouterHarness, carried_by: str) -> None:
    await router.pair()

    async def sessions() -> list[str]:
        snapshot = await router.topology_stub.Get(topology_pb2.GetTopologyRequest(), timeout=PATIENCE_S)
        return [worker.session for worker in snapshot.workers]

    assert await sessions() == ["", ""]
    await router.generate()
    assert await sessions() == [carried_by, carried_by]
