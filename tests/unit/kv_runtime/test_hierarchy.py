"""Memory over a disk: what goes down, what comes up, and what nobody waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sagellm_common.core import failpoints
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import ConfigError, LayoutMismatch
from sagellm_common.core.kv import BlockEvent, Tier
from sagellm_common.kv_policy.cost_benefit import RecomputeCost
from sagellm_common.kv_policy.migration import MIN_COPIES, BlockFacts, ByCost, ByUses, Decision, MigrationPolicy
from sagellm_common.kv_runtime.backends.file import FileTier
from sagellm_common.kv_runtime.backends.file_directory import TierDirectory
from sagellm_common.kv_runtime.backends.host import HostKvPool
from sagellm_common.kv_runtime.backends.host_tier import HostTier, copy_blocks
from sagellm_common.kv_runtime.hierarchy import HierarchyManager, WriteMode
from sagellm_common.kv_runtime.migrator import KVMigrator, MigrationPlan
from tests.support.kv_channels import a_layout, random_region
from tests.support.kv_tiers import BLOCK_BYTES, LAYOUT, SLOT_BYTES, chain, content, file_tier, keys, read, write

PATIENCE_S = 10.0


@dataclass
class Stack:
    tiers: HierarchyManager
    directory: TierDirectory

    def put(self, num_blocks: int, first_token: int = 0, depths: Sequence[int] = ()) -> None:
        hashes, token_ids = chain(num_blocks, first_token)
        put = self.tiers.begin_put(hashes, token_ids, depths=depths)
        for key, block_id in zip(put.keys, put.allocation.block_ids.tolist(), strict=True):
            self.tiers.regions().block(block_id)[:] = content(key.hash)
        self.tiers.commit_put(put)

    def get(self, num_blocks: int, first_token: int = 0, timeout_s: float = PATIENCE_S) -> int:
        hashes, token_ids = chain(num_blocks, first_token)
        if self.tiers.below(hashes):
            self.tiers.promote(hashes, token_ids, timeout_s)
        got = self.tiers.get(hashes, token_ids)
        blocks = [bytes(self.tiers.regions().block(block_id)) for block_id in got.block_ids.tolist()]
        assert blocks == [content(block_hash) for block_hash in hashes[: len(blocks)]]
        self.tiers.free(got)
        return len(blocks)

    def where(self, num_blocks: int, first_token: int = 0) -> list[str]:
        return self.tiers.locate(chain(num_blocks, first_token)[0])

    def flush(self) -> None:
        assert self.tiers.flush(PATIENCE_S)


@contextmanager
def stack(
    path: Path,
    *,
    memory_blocks: int = 4,
    disk_blocks: int = 16,
    write: WriteMode = "through",
    policy: Callable[[int], MigrationPolicy] = ByUses,
) -> Iterator[Stack]:
    directory = TierDirectory(path, disk_blocks * SLOT_BYTES)
    pool = HostKvPool(memory_blocks * BLOCK_BYTES, ManualClock())
    tiers = HierarchyManager(pool, lambda layout: [directory.open(layout)], write=write, policy=policy)
    tiers.adopt(LAYOUT)
    try:
        yield Stack(tiers, directory)
    finally:
        tiers.close()
        directory.close()


def test_what_memory_gives_up_comes_back_from_the_disk(tmp_path: Path) -> None:
    with stack(tmp_path) as both:
        both.put(4)
        both.flush()
        both.put(3, 100)
        both.flush()
        assert both.where(4) == ["dram", "nvme", "nvme", "nvme"]
        assert both.tiers.lookup(chain(5)[0]) == 4
        assert both.tiers.below(chain(4)[0]) and not both.tiers.below(chain(3, 100)[0])
        assert not both.tiers.below(chain(1, 500)[0])
        assert both.get(5) == 4
        assert both.where(5) == ["dram"] * 4 + [""]
        dram, nvme = both.tiers.stats()
        assert (dram.hit_blocks, nvme.hit_blocks) == (1, 3)
        assert both.get(4) == 4
        dram, nvme = both.tiers.stats()
        assert (dram.hit_blocks, nvme.hit_blocks, nvme.dropped_blocks) == (5, 3, 0)
        assert both.tiers.get_utilization().total_blocks == 4


def test_contents_are_there_after_a_restart(tmp_path: Path) -> None:
    with stack(tmp_path) as both:
        for first_token in (0, 100):
            both.put(4, first_token)
            both.flush()
    with stack(tmp_path) as both:
        assert both.where(4) == ["nvme"] * 4
        assert sorted(both.tiers.cached_hashes()) == sorted([*chain(4)[0], *chain(4, 100)[0]])
        assert (both.get(4), both.get(4, 100)) == (4, 4)


def test_a_block_that_waits_for_a_slow_disk_is_lost_if_it_must_go_first(tmp_path: Path) -> None:
    with stack(tmp_path) as both:
        writing, go_on = threading.Event(), threading.Event()

        def slow() -> None:
            writing.set()
            assert go_on.wait(PATIENCE_S)

        with failpoints.armed("tier.writing", slow):
            both.put(2)
            assert writing.wait(PATIENCE_S)
            both.put(2, 100)  # waits its turn
            assert not both.tiers.flush(0.0)
            both.put(2, 200)  # takes the memory of what waits, not of what is being written
            assert both.where(2) == ["dram"] * 2
            assert both.where(2, 100) == [""] * 2
            go_on.set()
        both.flush()
        assert both.tiers.stats()[1].dropped_blocks == 2
        assert both.get(2, 200) == 2


def test_write_back_waits_until_half_of_memory_waits_or_for_the_end(tmp_path: Path) -> None:
    with stack(tmp_path, memory_blocks=8, write="back") as both:
        both.put(4)
        assert both.tiers.stats()[1].stored_blocks == 0
        both.put(1, 100)
        both.put(1, 200)
    tier, _ = file_tier(tmp_path, 16)
    assert (read(tier, keys(4)), read(tier, keys(1, 100)), read(tier, keys(1, 200))) == (4, 1, 1)
    tier.close()


def test_pressure_makes_write_back_write(tmp_path: Path) -> None:
    with stack(tmp_path, memory_blocks=4, write="back") as both:
        stored, told = threading.Event(), []

        def on_event(event: BlockEvent) -> None:
            told.append(event.tier)
            if event.tier is Tier.DISK:
                stored.set()

        both.tiers.watch(on_event)
        both.put(2)
        both.put(1, 100)
        assert stored.wait(PATIENCE_S)
        assert told[:2] == [Tier.HOST, Tier.HOST]


def test_the_policy_says_what_goes_down(tmp_path: Path) -> None:
    with stack(tmp_path, policy=lambda tiers: ByUses(tiers, demote_uses=2)) as both:
        both.put(2)
        both.put(2, 100)
        assert both.get(2) == 2  # used a second time: worth its place on the disk
        both.flush()
        both.put(4, 200)
        assert (both.where(2), both.where(2, 100)) == (["nvme"] * 2, [""] * 2)


def test_the_policy_says_what_comes_up(tmp_path: Path) -> None:
    with stack(tmp_path, policy=lambda tiers: ByUses(tiers, promote_on_use=3)) as both:
        both.put(2)
        both.flush()
        both.put(4, 100)
        both.flush()
        assert both.get(2) == 0
        assert both.get(2) == 2


def test_no_more_comes_up_than_memory_holds(tmp_path: Path) -> None:
    with stack(tmp_path, memory_blocks=4) as both:
        for first_token in (0, 100):
            both.put(4, first_token)
            both.flush()
        hashes, token_ids = chain(2, 100)
        held = both.tiers.get(hashes, token_ids)
        assert both.get(4) == 2
        both.tiers.free(held)
        assert both.get(4) == 4


def test_what_does_not_come_up_in_time_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stack(tmp_path) as both:
        both.put(2)
        both.flush()
        both.put(4, 100)
        both.flush()
        go_on, read_slots = threading.Event(), FileTier.read

        def slow(self: FileTier, *args: object) -> int:
            assert go_on.wait(PATIENCE_S)
            return read_slots(self, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(FileTier, "read", slow)
        assert both.get(2, timeout_s=0.0) == 0
        go_on.set()
        assert both.get(2) == 2


def test_torn_blocks_are_found_out_and_leave_the_index(tmp_path: Path) -> None:
    with stack(tmp_path) as both:
        both.put(4)
    extent = next(tmp_path.glob("*/extent-00000"))
    data = bytearray(extent.read_bytes())
    data[4096] ^= 1
    extent.write_bytes(data)
    with stack(tmp_path) as both:
        told: list[BlockEvent] = []
        both.tiers.watch(told.append)
        assert both.tiers.lookup(chain(4)[0]) == 4
        assert both.get(4) == 1
        assert both.tiers.lookup(chain(4)[0]) == 1
        assert both.tiers.stats()[1].torn_blocks == 1
        assert [event for event in told if event.removed] == [BlockEvent(removed=(chain(4)[0][1],), tier=Tier.DISK)]
        both.put(4)
        both.flush()
        everything = set(chain(4)[0])
        cached = both.tiers.cached_by_tier()
        assert {tier: set(hashes) for tier, hashes in cached.items()} == {Tier.HOST: everything, Tier.DISK: everything}


def test_layouts(tmp_path: Path) -> None:
    with stack(tmp_path) as both:
        both.tiers.adopt(LAYOUT)
        assert both.tiers.layout == LAYOUT
        with pytest.raises(LayoutMismatch):
            both.tiers.adopt(a_layout(128))


def test_a_disk_that_cannot_be_opened_is_tried_again(tmp_path: Path) -> None:
    directory = TierDirectory(tmp_path, 100)
    tiers = HierarchyManager(HostKvPool(4 * BLOCK_BYTES, ManualClock()), lambda layout: [directory.open(layout)])
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"kv_store\.disk\.budget_bytes"):
            tiers.adopt(LAYOUT)
    tiers.close()
    directory.close()


def test_without_lower_tiers_it_is_the_pool() -> None:
    tiers = HierarchyManager(HostKvPool(6 * BLOCK_BYTES, ManualClock()))
    tiers.adopt(LAYOUT)
    hashes, token_ids = chain(4)
    tiers.abort_put(tiers.begin_put(hashes, token_ids))
    tiers.commit_put(tiers.begin_put(hashes, token_ids))
    allocation = tiers.allocate(token_ids, 16)
    shared = tiers.share(allocation)
    assert allocation.num_shared_blocks == 3
    tiers.free(allocation)
    tiers.free(shared)
    assert (tiers.lookup(hashes), len(tiers.stats())) == (4, 1)
    tiers.close()
    tiers.close()


# ---- the migrator ----


def test_plans_are_carried_out_once_and_chunk_by_chunk(tmp_path: Path) -> None:
    disk, _ = file_tier(tmp_path)
    memory = HostTier(HostKvPool(8 * BLOCK_BYTES, ManualClock(), LAYOUT))
    write(memory, keys(7))
    migrator = KVMigrator([memory, disk], threads=1, chunk_bytes=2 * BLOCK_BYTES)
    plan = MigrationPlan(0, 1, tuple(keys(8)))  # of which one is nowhere
    for _ in range(2):
        migration = migrator.migrate(plan)
        assert migration.wait(PATIENCE_S)
        assert (migration.blocks_done, migration.blocks_present) == (8, 7)
    assert disk.stats().stored_blocks == 7
    assert read(disk, keys(7)) == 7
    assert migrator.migrate(MigrationPlan(0, 1, ())).wait(0.0)
    migrator.close()


def test_cancelled_plans_copy_no_further(tmp_path: Path) -> None:
    disk, _ = file_tier(tmp_path)
    memory = HostTier(HostKvPool(8 * BLOCK_BYTES, ManualClock(), LAYOUT))
    write(memory, keys(8))
    migrator = KVMigrator([memory, disk], threads=1, chunk_bytes=2 * BLOCK_BYTES)
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)

    with failpoints.armed("tier.writing", slow):
        migration = migrator.migrate(MigrationPlan(0, 1, tuple(keys(8))))
        assert begun.wait(PATIENCE_S)
        assert not migration.wait(0.0)
        migration.cancel()
        go_on.set()
        assert migration.wait(PATIENCE_S)
    assert (migration.blocks_done, migration.blocks_present) == (2, 2)
    migrator.close()
    with pytest.raises(RuntimeError):
        migrator.migrate(MigrationPlan(0, 1, tuple(keys(1))))


def test_between_tiers_of_which_neither_is_memory(tmp_path: Path) -> None:
    one, _ = file_tier(tmp_path / "one")
    other, _ = file_tier(tmp_path / "other")
    write(one, keys(5))
    migrator = KVMigrator([one, other])
    migration = migrator.migrate(MigrationPlan(0, 1, tuple(keys(6))))
    assert migration.wait(PATIENCE_S)
    assert migration.blocks_present == read(other, keys(5)) == 5
    migrator.close()


def test_a_chunk_that_fails_costs_its_blocks(caplog: pytest.LogCaptureFixture) -> None:
    memory = HostTier(HostKvPool(8 * BLOCK_BYTES, ManualClock(), LAYOUT))
    write(memory, keys(2))

    class Broken(HostTier):
        def write(self, *args: object) -> int:
            raise ValueError("broken")

    migrator = KVMigrator([memory, Broken(memory.pool)])
    migration = migrator.migrate(MigrationPlan(0, 1, tuple(keys(2))))
    assert migration.wait(PATIENCE_S)
    assert (migration.blocks_done, migration.blocks_present) == (2, 0)
    assert "were not copied" in caplog.text
    migrator.close()
    assert memory.pool.get_utilization().used_blocks == 0


def test_copies_of_scattered_blocks() -> None:
    rng = np.random.default_rng(0)
    source, target = random_region(16, 32), random_region(16, 32, seed=1)
    from_ids = rng.permutation(16)[:9].astype(np.int32)
    to_ids = np.array([3, 4, 5, 9, 8, 7, 0, 1, 15], dtype=np.int32)
    before = [bytes(target.block(n)) for n in range(16)]
    copy_blocks(source, from_ids, target, to_ids)
    for n in range(16):
        at = np.flatnonzero(to_ids == n)
        expected = bytes(source.block(int(from_ids[at[0]]))) if len(at) else before[n]
        assert bytes(target.block(n)) == expected
    copy_blocks(source, from_ids[:0], target, to_ids[:0])
    with pytest.raises(IndexError):
        copy_blocks(source, np.array([16]), target, np.array([0]))


def test_by_cost_what_is_sooner_computed_stays_off_the_disk_until_that_changes(tmp_path: Path) -> None:
    hashes, _ = chain(2)
    with stack(tmp_path, memory_blocks=16, policy=ByCost) as both:
        disk = both.tiers._tiers[1]
        for n in range(1, MIN_COPIES + 1):  # what copies take becomes known
            both.put(1, 100 * n)
            both.flush()
        both.tiers.recomputes_at(RecomputeCost(1e-15, 0.0))
        both.put(2)
        both.flush()
        assert disk.holds(hashes) == [False, False]
        both.tiers.recomputes_at(RecomputeCost(1e6, 0.0))
        assert both.get(2) == 2
        both.flush()
        assert disk.holds(hashes) == [True, True], "at its next use"
        both.tiers.pool.drop(hashes)
        assert (both.get(2), both.where(2)) == (2, ["dram", "dram"])
        both.tiers.pool.drop(hashes)
        both.tiers.recomputes_at(RecomputeCost(1e-15, 0.0))
        for _ in range(MIN_COPIES):
            both.tiers._policy.copied(1, 0, BLOCK_BYTES, 1.0)
        assert (both.get(2), both.where(2)) == (0, ["nvme", "nvme"]), "whoever asks computes them"
        assert both.tiers.migration == "ByCost"
        with pytest.raises(ConfigError, match="migration policy"):
            both.tiers.set_migration("whatever")
        both.tiers.set_migration("all")
        assert (both.get(2), both.tiers.migration) == (2, "all")


def test_policies_hear_where_in_its_sequence_a_block_is_and_what_it_costs(tmp_path: Path) -> None:
    heard: dict[int, BlockFacts] = {}

    class Listening(ByUses):
        def on_evict(self, block: BlockFacts) -> Decision:
            heard[block.depth] = block
            return super().on_evict(block)

    hashes, token_ids = chain(2)
    with stack(tmp_path, policy=Listening) as both:
        cost = RecomputeCost(1.0, 0.5)
        both.tiers.recomputes_at(cost)
        both.put(2, depths=[32, 33])
        assert {depth: facts.recompute_s for depth, facts in heard.items()} == {
            depth: cost.seconds(4 * depth, 4 * depth + 4) for depth in (32, 33)
        }
        both.put(1, 100)
        assert both.get(2) == 2
        assert [heard[depth].idle for depth in (32, 33)] == [0, 0]
        assert [heard[depth].uses for depth in (32, 33)] == [2, 2]
        both.flush()
        both.tiers.pool.drop(hashes)
        both.tiers._blocks[hashes[0]].depth = 0  # as after a restart
        both.tiers.promote(hashes, token_ids, PATIENCE_S, depths=[32, 33])
        assert [both.tiers.pool.cache[h].key.depth for h in hashes] == [32, 33]
        assert both.tiers._blocks[hashes[0]].depth == 32
