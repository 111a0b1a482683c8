"""Our block manager, prefix store and eviction in LMDeploy's scheduler, put there by the hooks and without them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from sagellm_common.core.types import as_token_ids
from sagellm_common.engines.lmdeploy import hooks
from sagellm_common.engines.lmdeploy.kv_manager import SequencePrefix

BLOCK, NUM_BLOCKS = 4, 8
ROOT = b"root"


def make_scheduler() -> Any:
    from lmdeploy.pytorch.config import CacheConfig, SchedulerConfig
    from lmdeploy.pytorch.messages import SequenceMeta
    from lmdeploy.pytorch.paging.scheduler import Scheduler
    from lmdeploy.pytorch.strategies.ar.sequence import ARSequenceStrategy

    return Scheduler(
        SchedulerConfig(max_batches=4, max_session_len=64),
        CacheConfig(4, BLOCK, 0, NUM_BLOCKS, device_type="cpu", num_state_caches=0),
        seq_meta=SequenceMeta(BLOCK, strategy=ARSequenceStrategy()),
    )


@pytest.fixture(params=["hooks", "assigned"])
def scheduler(request: pytest.FixtureRequest) -> Iterator[Any]:
    """LMDeploy's scheduler with our objects in it."""
    from sagellm_common.engines.lmdeploy.block_manager import manager_of

    if request.param == "hooks":
        request.getfixturevalue("hooked")
        hooks.enable()
        made = make_scheduler()
        ours = made.block_manager, made.seq_manager.prefix_store, made.eviction_helper
        manager_of(made)
        assert (made.block_manager, made.seq_manager.prefix_store, made.eviction_helper) == ours
    else:
        request.getfixturevalue("stock_hooks")
        made = make_scheduler()
        manager_of(made)
    yield made


def add(scheduler: Any, session_id: int, tokens: list[int], computed: int = 0) -> Any:
    """A waiting sequence; with `computed` tokens it has its blocks, and KV of so many."""
    scheduler.block_manager.cache.prefixes[session_id] = SequencePrefix(ROOT)
    seq = scheduler.add_session(session_id).add_sequence(np.array(tokens))
    scheduler.add_sequence(seq)
    if computed:
        scheduler.block_manager.allocate(seq)
        seq.set_step(computed)
    return seq


def test_all_three_are_ours(scheduler: Any) -> None:
    from sagellm_common.engines.lmdeploy.block_manager import KvBlockManager, KvEviction

    assert isinstance(scheduler.block_manager, KvBlockManager)
    assert scheduler.block_trie is scheduler.block_manager.cache
    assert isinstance(scheduler.eviction_helper, KvEviction)
    assert scheduler.eviction_helper.block_manager is scheduler.block_manager


def test_what_lmdeploy_schedules_comes_from_our_cache_and_goes_back_to_it(scheduler: Any) -> None:
    cache = scheduler.block_manager.cache
    first = add(scheduler, 1, list(range(10)), computed=9)
    cache.allocate(first)
    assert len(cache.hashes()) == 2  # blocks that are full and computed
    second = add(scheduler, 2, [*range(8), 99, 98])
    assert scheduler.schedule(is_prefill=True).running == [first, second]
    assert second.num_history_ids == 8
    assert second.logical_blocks.get_real_blocks()[:2].tolist() == first.logical_blocks.get_real_blocks()[:2].tolist()
    assert len(cache.hashes()) == 2  # scheduled is not computed
    for session_id in (1, 2):
        scheduler.end_session(session_id)
    assert len(cache.blocks()) == 2
    assert scheduler.block_manager.get_num_free_gpu_blocks() == NUM_BLOCKS - 2


def test_blocks_freed_once_too_often_raise_and_stay_free_once(scheduler: Any) -> None:
    books = scheduler.block_manager.blocks
    blocks = books.allocate(2)
    books.release(blocks)
    with pytest.raises(ValueError, match="nobody holds"):
        books.release(blocks)
    assert sorted(books.allocate(NUM_BLOCKS).tolist()) == list(range(NUM_BLOCKS))


def test_eviction_takes_cached_blocks_first_and_no_more_victims_than_needed(scheduler: Any) -> None:
    manager = scheduler.block_manager
    done = add(scheduler, 1, list(range(8)), computed=8)
    manager.cache.allocate(done)
    scheduler.end_session(1)  # two cached blocks that nobody uses
    victims = [add(scheduler, n, [n] * 8, computed=7) for n in (2, 3)]
    newcomer = add(scheduler, 4, [4] * 16)  # four blocks, two are free
    assert manager.get_num_free_gpu_blocks() == 2
    assert scheduler.eviction_helper.evict_for_seq(newcomer, list(victims), 0)
    assert manager.cache.hashes() == []
    assert [victim.num_blocks for victim in victims] == [2, 2]
    manager.allocate(newcomer)
    another = add(scheduler, 5, [5] * 5)
    assert scheduler.eviction_helper.evict_for_seq(another, list(victims), 0)
    assert [(victim.num_blocks, victim.num_history_ids) for victim in victims] == [(0, 0), (2, 7)]


def test_eviction_that_cannot_help_takes_nothing(scheduler: Any) -> None:
    manager = scheduler.block_manager
    cached = add(scheduler, 1, list(range(4)), computed=4)
    manager.cache.allocate(cached)
    scheduler.end_session(1)
    victim = add(scheduler, 2, [2] * 8, computed=7)
    held = manager.blocks.allocate(4)
    newcomer = add(scheduler, 3, [3] * 20)  # five blocks: one is free, one is cached, two are the victim's
    assert not scheduler.eviction_helper.evict_for_seq(newcomer, [victim], 0)
    assert (victim.num_blocks, victim.num_history_ids, len(manager.cache.hashes())) == (2, 7, 1)
    manager.blocks.release(held[:1])
    assert scheduler.eviction_helper.evict_for_seq(newcomer, [victim], 0)
    assert (victim.num_blocks, len(manager.cache.hashes())) == (0, 0)


@pytest.mark.usefixtures("hooked")
def test_processes_that_lmdeploy_spawns_find_the_plugin_beside_those_of_others() -> None:
    with mock.patch.dict(os.environ, {hooks.VARIABLE: "others.module:function"}):
        hooks.enable()
        hooks.enable()
        assert os.environ[hooks.VARIABLE] == f"others.module:function,{hooks.PLUGIN}"


def test_token_ids_of_a_cached_block_are_compared(scheduler: Any) -> None:
    cache = scheduler.block_manager.cache
    cache.allocate(add(scheduler, 1, list(range(5)), computed=4))
    (key,) = cache.hashes()
    cache[key].key = replace(cache[key].key, token_bytes=b"a collision of hashes")
    assert cache.lookup(as_token_ids(list(range(5))), ROOT)[0] == []
