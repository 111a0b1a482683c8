"""Our KV management where LMDeploy has its own: block manager, prefix store and eviction, made for one scheduler.

    with the hooks     LMDeploy's scheduler makes these objects itself (`hooks.register`)
    without            `manager_of` puts them into a scheduler that has made LMDeploy's own, before its first sequence

They are the same objects either way. The pool (`kv_manager.LmdeployKvPool`) is what the services see of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from lmdeploy.pytorch.paging.block_manager.default_block_manager import DefaultBlockManager
from lmdeploy.pytorch.paging.eviction_helper.base_eviction_helper import BaseEvictionHelper

from sagellm_common.engines.lmdeploy.kv_manager import EnginePrefixCache
from sagellm_common.kv_runtime.block_manager import BlockArray, BlockManager


class KvBlockManager(DefaultBlockManager):
    """LMDeploy's block manager over the `BlockManager` that the services' pool allocates from, too, under one lock.

    What LMDeploy calls logical blocks are its blocks, and physical ones their slots.
    """

    def __init__(self, cache_config: Any) -> None:
        super().__init__(cache_config.num_gpu_blocks, cache_config.num_cpu_blocks)
        self.allocator = None  # LMDeploy's own: nothing may be allocated beside the pool
        self.lock = threading.RLock()
        self.cache = EnginePrefixCache(BlockManager(cache_config.num_gpu_blocks), cache_config.block_size)
        self.make_room: Callable[[int, int], object] = lambda count, account: self.cache.evict(
            count - self.blocks.num_free
        )
        """Evicts cached blocks for so many blocks on that account, as the pool's quotas have it."""
        self.borrows: Callable[[int], bool] = lambda account: False

    @property
    def blocks(self) -> BlockManager:
        return self.cache.book

    def account_of(self, seq: Any) -> int:
        return self.cache.prefixes[seq.session_id].account

    # ---- what LMDeploy calls ----

    def num_required_blocks(self, obj: Any, prealloc_size: int = 0) -> int:
        """What LMDeploy asks first of each sequence it looks at."""
        self.cache.at_work = obj
        return int(super().num_required_blocks(obj, prealloc_size))

    def allocate_msg(self, msg: Any, prealloc_size: int = 0) -> None:
        required = self.num_required_blocks(msg, prealloc_size)
        if required > 0:
            msg.logical_blocks.append(self.blocks.allocate(required, self.account_of(msg)))

    def free(self, msg: Any) -> None:
        self.cache.release(msg.logical_blocks.get_real_blocks())
        msg.logical_blocks.reset()

    def get_block_table(self, msg: Any) -> BlockArray:
        return self.blocks.slots(msg.logical_blocks.get_real_blocks())

    def get_num_free_gpu_blocks(self) -> int:
        return self.blocks.num_free

    def get_num_free_cpu_blocks(self) -> int:
        return 0

    def on_device(self, msg: Any, device: str) -> bool:
        return device == "gpu" and msg.num_blocks > 0


class KvEviction(BaseEvictionHelper):
    """Makes room for a sequence: cached blocks that nobody uses go first, then the victims' in the given order, those
    of tenants that borrow before others', and no more of either than needed. LMDeploy's own takes victims first, also
    when all of them together are not enough.
    """

    def evict_for_seq(self, seq: Any, evictable_seqs: list[Any], prealloc_size: int) -> bool:
        manager: KvBlockManager = self.block_manager
        required, account = manager.num_required_blocks(seq, prealloc_size), manager.account_of(seq)
        if required <= manager.blocks.num_free:
            return True
        victims = [victim for victim in evictable_seqs if victim.num_blocks]
        victims.sort(key=lambda victim: not manager.borrows(manager.account_of(victim)))
        if self._obtainable(victims) < required:
            return False
        manager.make_room(required, account)
        for victim in victims:
            if required <= manager.blocks.num_free:
                break
            manager.free(victim)
            victim.set_step(0)
            manager.make_room(required, account)
        return required <= manager.blocks.num_free

    def _obtainable(self, victims: list[Any]) -> int:
        """Free blocks, if the victims and the prefix cache gave up theirs."""
        manager: KvBlockManager = self.block_manager
        references = manager.blocks.ref_counts.copy()
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
