"""Memory over a disk against two sets: what is said to be somewhere is read there, byte for byte, or was torn.

The process dies in between, with what it had in memory, and bytes of the disk are flipped or cut off.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.kv import Allocation, BlockEvent, Tier
from sagellm_common.core.types import BlockHash, TokenIds
from sagellm_common.kv_runtime.backends.file_directory import TierDirectory
from sagellm_common.kv_runtime.backends.file_slots import PAGE_BYTES
from sagellm_common.kv_runtime.backends.host import HostKvPool
from sagellm_common.kv_runtime.hierarchy import HierarchyManager
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from tests.support.kv_channels import a_layout

MEMORY_BLOCKS, DISK_BLOCKS = 4, 6
LAYOUT = a_layout(block_bytes=16, block_size_tokens=1)
RECORD_BYTES = 128
# One token per block out of two: prefixes of each other are common.
SEQUENCES = st.lists(st.integers(0, 1), max_size=5).map(lambda ids: np.array(ids, dtype=np.int32))
PATIENCE_S = 10.0


class Hierarchy(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="sagellm-test-"))
        self.flipped = False
        self.start()

    def start(self) -> None:
        self.directory = TierDirectory(self.path, DISK_BLOCKS * (PAGE_BYTES + RECORD_BYTES))
        self.tiers = HierarchyManager(
            HostKvPool(MEMORY_BLOCKS * 16, ManualClock()), lambda layout: [self.directory.open(layout)]
        )
        self.seen: dict[Tier, set[BlockHash]] = {Tier.HOST: set(), Tier.DISK: set()}
        self.held: list[tuple[Allocation, list[BlockHash]]] = []
        self.tiers.watch(self.follow)
        self.tiers.adopt(LAYOUT)

    def follow(self, event: BlockEvent) -> None:
        assert event.tier is not None
        seen = self.seen[event.tier]
        assert seen >= set(event.removed)
        assert seen.isdisjoint(event.stored)
        seen.difference_update(event.removed)
        seen.update(event.stored)

    def hashes(self, token_ids: TokenIds) -> list[BlockHash]:
        return block_hashes(token_ids, 1, root_hash(LAYOUT))

    def leading(self, hashes: list[BlockHash]) -> int:
        known = self.seen[Tier.HOST] | self.seen[Tier.DISK]
        return next((n for n, block_hash in enumerate(hashes) if block_hash not in known), len(hashes))

    def settle(self) -> None:
        assert self.tiers.flush(PATIENCE_S)

    @rule(token_ids=SEQUENCES)
    def put(self, token_ids: TokenIds) -> None:
        put = self.tiers.begin_put(self.hashes(token_ids), token_ids)
        for key, block_id in zip(put.keys, put.allocation.block_ids.tolist(), strict=True):
            self.tiers.regions().block(block_id)[:] = key.hash
        self.tiers.commit_put(put)
        self.settle()
        # Whatever memory had, the disk has the newest of.
        assert {key.hash for key in put.keys} <= self.seen[Tier.DISK]

    @rule(token_ids=SEQUENCES)
    def get(self, token_ids: TokenIds) -> None:
        hashes = self.hashes(token_ids)
        leading = self.leading(hashes)
        assert self.tiers.lookup(hashes) == leading
        room = MEMORY_BLOCKS - len({b for allocation, _ in self.held for b in allocation.block_ids.tolist()})
        torn_before = self.tiers.stats()[1].torn_blocks
        if self.tiers.below(hashes):
            self.tiers.promote(hashes, token_ids, PATIENCE_S)
        got = self.tiers.get(hashes, token_ids)
        count = len(got.block_ids)
        for block_hash, block_id in zip(hashes, got.block_ids.tolist(), strict=False):
            assert bytes(self.tiers.regions().block(block_id)) == block_hash
        if self.tiers.stats()[1].torn_blocks == torn_before:
            assert min(leading, room) <= count <= leading
        else:
            assert self.flipped
        self.held.append((got, hashes[:count]))
        self.settle()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        allocation, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.tiers.free(allocation)

    @rule(flip=st.none() | st.tuples(st.integers(0, DISK_BLOCKS - 1), st.integers(0, 15)), cut=st.booleans())
    def crash(self, flip: tuple[int, int] | None, cut: bool) -> None:
        """The process is gone, its memory too; the machine may have lost some of what was on its way to the disk."""
        on_disk = self.seen[Tier.DISK].copy()
        self.tiers.close()
        self.directory.close()
        (layout,) = (entry for entry in self.path.iterdir() if entry.is_dir())
        if flip is not None:
            slot, at = flip
            with (layout / "extent-00000").open("r+b") as extent:
                extent.seek(slot * PAGE_BYTES + at)
                byte = extent.read(1)
                extent.seek(slot * PAGE_BYTES + at)
                extent.write(bytes([byte[0] ^ 1]))
            self.flipped = True
        lost = 0
        table = layout / "table"
        if cut and table.stat().st_size:
            size = (table.stat().st_size - 1) // RECORD_BYTES * RECORD_BYTES + RECORD_BYTES // 2
            lost = 1
            with table.open("r+b") as file:
                file.truncate(size)
        self.start()
        recovered = self.seen[Tier.DISK]
        assert recovered <= on_disk
        assert len(on_disk - recovered) <= lost

    @invariant()
    def what_is_seen_is_there(self) -> None:
        assert self.tiers.cached_by_tier() == {tier: list(h) for tier, h in self.tiers.cached_by_tier().items()}
        for tier, hashes in self.tiers.cached_by_tier().items():
            assert set(hashes) == self.seen[tier]
        assert set(self.tiers.cached_hashes()) == self.seen[Tier.HOST] | self.seen[Tier.DISK]

    @invariant()
    def memory_is_accounted_for(self) -> None:
        stats = self.tiers.get_utilization()
        assert stats.balanced, stats
        assert stats.used_blocks == len({b for allocation, _ in self.held for b in allocation.block_ids.tolist()})
        for allocation, hashes in self.held:
            for block_id, block_hash in zip(allocation.block_ids.tolist(), hashes, strict=False):
                assert bytes(self.tiers.regions().block(block_id)) == block_hash

    def teardown(self) -> None:
        self.tiers.close()
        self.directory.close()
        shutil.rmtree(self.path)


TestHierarchy = Hierarchy.TestCase
TestHierarchy.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
