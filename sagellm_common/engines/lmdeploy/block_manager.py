"""Our KV management where LMDeploy has its own: block manager, prefix store and eviction, made for one scheduler.

    with the hooks     LMDeploy's scheduler makes these objects itself (`hooks.register`)
    without            `manager_of` puts them into a scheduler that has made LMDeploy's own, before its first sequence

They are the same objects either way. The pool (`kv_manager.LmdeployKvPool`) is what the services see of them.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from lmdeploy.pytorch.paging.block_manager.base_block_manager import LogicalAllocator
from lmdeploy.pytorch.paging.block_manager.default_block_manager import DefaultBlockManager
from lmdeploy.pytorch.paging.eviction_helper.base_eviction_helper import BaseEvictionHelper

from sagellm_common.engines.lmdeploy.kv_manager import BlockArray, PrefixCache


class CheckedAllocator(LogicalAllocator):
    """LMDeploy's allocator; what is freed once too often raises, and does not end up in two sequences."""

    def free(self, blocks: BlockArray) -> None:
        if np.any(self.get_ref_count(blocks) < 1):
            raise ValueError(f"blocks {blocks.tolist()} are to be freed, but nobody holds some of them")
        super().free(blocks)


class KvBlockManager(DefaultBlockManager):
    """LMDeploy's block manager over an allocator that the prefix cache and the services' pool share, under one lock."""

    def __init__(self, cache_config: Any) -> None:
        super().__init__(cache_config.num_gpu_blocks, cache_config.num_cpu_blocks)
        self.lock = threading.RLock()
        self.allocator = CheckedAllocator(cache_config.num_cpu_blocks, cache_config.num_gpu_blocks)
        self.cache = PrefixCache(self.allocator, cache_config.block_size, cache_config.num_gpu_blocks)

    def num_required_blocks(self, obj: Any, prealloc_size: int = 0) -> int:
        """What LMDeploy asks first of each sequence it looks at."""
        self.cache.at_work = obj
        return int(super().num_required_blocks(obj, prealloc_size))


class KvEviction(BaseEvictionHelper):
    """Makes room for a sequence: cached blocks that nobody uses go first, then the victims' in the given order, and
    no more of either than needed. LMDeploy's own takes victims first, also when all of them together are not enough.
    """

    def evict_for_seq(self, seq: Any, evictable_seqs: list[Any], prealloc_size: int) -> bool:
        manager = self.block_manager
        cache: PrefixCache = manager.cache
        required = manager.num_required_blocks(seq, prealloc_size)

        def missing() -> int:
            return int(required - manager.get_num_free_gpu_blocks())

        if missing() <= 0:
            return True
        victims = [victim for victim in evictable_seqs if victim.num_blocks]
        if self._obtainable(victims) < required:
            return False
        cache.evict(missing())
        for victim in victims:
            if missing() <= 0:
                break
            manager.free(victim)
            victim.set_step(0)
            cache.used(cache.prefixes[victim.session_id].hashes)
            if missing() > 0:
                cache.evict(missing())
        return missing() <= 0

    def _obtainable(self, victims: list[Any]) -> int:
        """Free blocks, if the victims and the prefix cache gave up theirs."""
        manager = self.block_manager
        references = manager.allocator.get_ref_count(np.arange(manager.num_gpu_blocks)).copy()
        for victim in victims:
            references[victim.logical_blocks.get_real_blocks()] -= 1
        references[manager.cache.blocks()] -= 1
        return int(np.count_nonzero(references <= 0))


def manager_of(scheduler: Any) -> KvBlockManager:
    """The block manager of LMDeploy's scheduler; put there now where the hooks have not done it."""
    manager = scheduler.block_manager
    if not isinstance(manager, KvBlockManager):
        manager = scheduler.block_manager = KvBlockManager(scheduler.cache_config)
    if scheduler.block_trie is not manager.cache:
        scheduler.block_trie = manager.cache
    if not isinstance(scheduler.eviction_helper, KvEviction):
        scheduler.eviction_helper = KvEviction(scheduler)
    return manager
