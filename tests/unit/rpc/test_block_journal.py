from __future__ import annotations

from collections.abc import Mapping

import pytest

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.kv import BlockEvent, Tier
from sagellm_common.core.types import BlockHash
from sagellm_common.rpc import block_journal
from sagellm_common.rpc.block_journal import BlockChanges, BlockJournal
from tests.support.simulated_engine import SimulatedPool
from tests.support.topology import LAYOUT

A, B, C, D = (bytes([i]) * 16 for i in range(4))


class Journal:
    """A journal, and a pool that says what the test says."""

    def __init__(self, history_blocks: int = 100, home: Tier = Tier.DEVICE) -> None:
        self.pool, self.clock = SimulatedPool(LAYOUT, 4), ManualClock()
        self.journal = BlockJournal(self.pool, self.clock, history_blocks, home)

    def tell(self, **event: object) -> None:
        self.journal._on_event(BlockEvent(**event))  # type: ignore[arg-type]

    def after(self, seen: int) -> list[BlockChanges]:
        return list(self.journal.after(seen))


def test_who_knows_nothing_is_told_everything_and_then_what_changed() -> None:
    one = Journal(home=Tier.HOST)
    (first,) = one.after(0)
    assert first == BlockChanges(1, 0, snapshot=True)
    one.tell(stored=(A, B))
    assert one.after(1) == [BlockChanges(2, 1, tier=Tier.HOST, stored=A + B)]
    one.tell(removed=(B,))
    assert one.after(2) == [BlockChanges(3, 2, tier=Tier.HOST, removed=B)]
    assert one.after(3) == []


def test_the_last_state_of_each_block_is_told_in_the_order_of_the_changes() -> None:
    one = Journal()
    one.tell(stored=(A, B))
    one.tell(removed=(A,))
    one.tell(removed=(C,))
    one.tell(stored=(D, C))
    assert one.after(1) == [
        BlockChanges(5, 1, more=True, stored=B + D + C),
        BlockChanges(5, 1, removed=A),
    ]
    assert one.after(4) == [BlockChanges(5, 4, stored=D + C)]


def test_a_block_that_moves_is_told_where_it_is_before_it_is_told_where_it_was() -> None:
    one = Journal()
    one.tell(removed=(A,), tier=Tier.HOST)
    one.tell(stored=(A,), tier=Tier.DISK)
    assert one.after(1) == [
        BlockChanges(3, 1, more=True, tier=Tier.DISK, stored=A),
        BlockChanges(3, 1, tier=Tier.HOST, removed=A),
    ]


def test_who_has_missed_more_than_is_remembered_is_told_everything() -> None:
    one = Journal(history_blocks=2)
    one.tell(stored=(A,))
    one.tell(stored=(B,), tier=Tier.HOST)
    assert [part.since for part in one.after(1)] == [1, 1]
    one.tell(stored=(C,))  # A is forgotten, which came with revision 2
    assert one.after(1)[0].snapshot
    assert [part.snapshot for part in one.after(2)] == [False, False]
    one.tell(stored=(A, B, C, D))
    assert one.after(2)[0].snapshot
    assert one.after(4)[0].snapshot  # more in one event than is remembered
    assert one.after(5) == []
    assert one.after(6)[0].snapshot  # of another life


def test_without_a_history_everything_is_told_each_time() -> None:
    one = Journal(history_blocks=0)
    one.tell(stored=(A,))
    assert one.after(1)[0].snapshot
    assert one.after(2) == []


def test_much_comes_in_parts_its_end_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_journal, "PART_BLOCKS", 2)
    one = Journal()
    monkeypatch.setattr(one.pool, "cached_hashes", lambda: [A, B, C])
    assert one.after(0) == [
        BlockChanges(1, 0, snapshot=True, more=True, stored=C),
        BlockChanges(1, 0, stored=A + B),
    ]


def test_the_age_is_that_of_the_oldest_change() -> None:
    one = Journal()
    one.tell(stored=(A,))
    one.clock.advance(2.0)
    one.tell(stored=(B,))
    one.clock.advance(1.0)
    assert one.after(1)[0].age_s == 3.0
    assert one.after(2)[0].age_s == 1.0


def test_a_pool_of_several_tiers_says_which() -> None:
    class Tiered(SimulatedPool):
        def cached_by_tier(self) -> Mapping[Tier, list[BlockHash]]:
            return {Tier.HOST: [A], Tier.DISK: [A, B]}

    journal = BlockJournal(Tiered(LAYOUT, 4), ManualClock(), 10, Tier.HOST)
    assert [(part.snapshot, part.tier, part.stored) for part in journal.after(0)] == [
        (True, Tier.HOST, A),
        (False, Tier.DISK, A + B),
    ]
