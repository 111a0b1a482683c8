"""A repeated prompt is served from the store after the prefill worker, and its cache with it, was restarted; and from
the store's disk after the store itself was killed."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from sagellm_common.client.aio import AsyncClient
from sagellm_common.core.types import KvTierStats
from tests.integration.test_token_equality import complete_all
from tests.support.checks import all_serving, assert_nothing_leaked
from tests.support.cluster import RunningCluster
from tests.support.kv_channels import missing
from tests.support.oracle import greedy
from tests.support.waiting import eventually


@pytest.mark.parametrize("transport", ["tcp", "mooncake"])
async def test_prompts_outlive_the_worker_that_computed_them(tiny_llama: Path, tmp_path: Path, transport: str) -> None:
    if why := missing(transport):
        pytest.skip(why)
    rng = random.Random(3)
    prompts = [[rng.randrange(3, 250) for _ in range(n)] for n in (15, 16, 32, 64, 65, 100)]
    expected = [greedy(tiny_llama, prompt, 12) for prompt in prompts]
    with RunningCluster(
        f"transport.backend={transport}",
        f"kv_store.disk.path={tmp_path}",
        "kv_store.disk.migration=all",  # this model computes so little that a disk would hardly be worth it
        "kv_store.fetch=always",
        "router.peer_fetch=false",  # what decode's cache has is to come from the store
        model=tiny_llama,
    ) as cluster:
        done = await complete_all(cluster, prompts, 12)
        assert [list(d.token_ids) for d in done] == expected
        assert [d.summary.store_tokens for d in done] == [0] * len(prompts)
        await assert_nothing_leaked(cluster)  # the offloads are through
        await the_next_turn_reuses_what_was_generated(cluster, tiny_llama)
        await asyncio.to_thread(cluster.restart, "prefill-0")
        await all_serving(cluster)
        done = await complete_all(cluster, prompts, 12)
        assert [list(d.token_ids) for d in done] == expected
        # Whole blocks of 16, and one token at least is computed.
        assert [d.summary.store_tokens for d in done] == [0, 0, 16, 48, 64, 96]
        await assert_nothing_leaked(cluster)
        if transport != "tcp":
            return  # what follows has no bytes to move that the others did not
        await eventually(lambda: disk(cluster).used_blocks == memory(cluster).used_blocks > 0)
        stored = disk(cluster).used_blocks
        cluster.kill("kv-store-0")
        await asyncio.to_thread(cluster.restart, "kv-store-0")
        await asyncio.to_thread(cluster.restart, "prefill-0")
        await all_serving(cluster)
        await eventually(lambda: tiers_of(cluster))  # whose blocks they are, it learns from the workers
        assert disk(cluster).recovered_blocks == disk(cluster).used_blocks == stored
        done = await complete_all(cluster, prompts, 12)
        assert [list(d.token_ids) for d in done] == expected
        assert [d.summary.store_tokens for d in done] == [0, 0, 16, 48, 64, 96]
        assert (disk(cluster).hit_blocks, disk(cluster).torn_blocks) == (sum([0, 0, 1, 3, 4, 6]), 0)
        assert [d.summary.kv_origins["store_disk"] for d in done] == [0, 0, 16, 48, 64, 96]
        await assert_nothing_leaked(cluster)


async def test_what_is_kept_in_fewer_bytes_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    """After the store was killed, all that it has is on its disk."""
    rng = random.Random(4)
    prompts = [[rng.randrange(3, 250) for _ in range(n)] for n in (65, 100)]
    settings = (f"kv_store.disk.path={tmp_path}", "kv_store.disk.dtype=int8", "kv_store.disk.migration=all")
    with RunningCluster(*settings, model=tiny_llama) as cluster:
        done = await complete_all(cluster, prompts, 12)
        assert [d.summary.store_conversion for d in done] == [None, None]
        await assert_nothing_leaked(cluster)
        await eventually(lambda: disk(cluster).used_blocks == memory(cluster).used_blocks == 4 + 6)
        assert disk(cluster).used_bytes < memory(cluster).used_bytes / 2
        cluster.kill("kv-store-0")
        await asyncio.to_thread(cluster.restart, "kv-store-0")
        await asyncio.to_thread(cluster.restart, "prefill-0")
        await all_serving(cluster)
        await eventually(lambda: tiers_of(cluster))
        for answer in await complete_all(cluster, prompts, 12):
            lost = answer.summary.store_conversion
            assert lost is not None and lost.wire_dtype == "int8/float32"
            assert 0 < lost.relative_rms_error < 0.02
        assert disk(cluster).inexact_hit_blocks == disk(cluster).hit_blocks == 4 + 6
        await assert_nothing_leaked(cluster)
        async with AsyncClient(cluster.router_address) as client:
            for name in ("", "cost"):
                told = await client.set_eviction("", migration=name)
                assert {w.worker_id: w.migration for w in told if w.migration} == {"kv-store-0": name or "all"}


async def the_next_turn_reuses_what_was_generated(cluster: RunningCluster, model: Path) -> None:
    """Prefill has the first turn's prompt still, the store the answer, too."""
    turn = [7, 8, 9] * 20
    (first,) = await complete_all(cluster, [turn], 36)
    await assert_nothing_leaked(cluster)
    turn = [*turn, *first.token_ids, 3, 4, 5]
    (second,) = await complete_all(cluster, [turn], 12)
    assert list(second.token_ids) == greedy(model, turn, 12)
    # Of 60 tokens that prefill computed three blocks are full, and of 95 that have KV in the end five.
    found = {origin: tokens for origin, tokens in second.summary.kv_origins.items() if tokens}
    assert found == {"computed": len(turn) - 80, "prefill_cache": 48, "store": 32}
    assert second.summary.decode_cached_tokens == 80
    await assert_nothing_leaked(cluster)


def memory(cluster: RunningCluster) -> KvTierStats:
    return tiers_of(cluster)[0]


def disk(cluster: RunningCluster) -> KvTierStats:
    return tiers_of(cluster)[1]


def tiers_of(cluster: RunningCluster) -> tuple[KvTierStats, ...]:
    stats = next(worker.kv for worker in cluster.status().workers if worker.record.worker_id == "kv-store-0")
    assert stats is not None
    return stats.tiers
