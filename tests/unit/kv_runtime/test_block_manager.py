from __future__ import annotations

import numpy as np
import pytest

from sagellm_common.core.errors import KvExhausted
from sagellm_common.kv_runtime.block_manager import BlockManager


def test_what_is_freed_last_is_allocated_first_in_the_same_order() -> None:
    blocks = BlockManager(6)
    assert blocks.allocate(4).tolist() == [0, 1, 2, 3]
    blocks.release(np.array([1, 2, 3]))
    assert blocks.allocate(4).tolist() == [1, 2, 3, 4]


def test_what_is_not_there_is_not_given() -> None:
    blocks = BlockManager(2)
    with pytest.raises(KvExhausted, match="3 KV blocks wanted, 2 of 2 free"):
        blocks.allocate(3)
    assert blocks.num_free == 2


@pytest.mark.parametrize("change", ["hold", "release"])
def test_a_block_that_nobody_holds_cannot_be_shared_or_freed(change: str) -> None:
    blocks = BlockManager(4)
    held = blocks.allocate(1)
    with pytest.raises(ValueError, match="nobody holds some of them"):
        getattr(blocks, change)(np.append(held, 3))
    assert blocks.ref_counts.tolist() == [1, 0, 0, 0]


def test_a_writer_gets_copies_of_what_others_hold_and_keeps_the_rest() -> None:
    blocks = BlockManager(8)
    mine = blocks.allocate(3)
    blocks.hold(mine[:2])  # somebody else's, too
    cow = blocks.copy_on_write(mine, first=1)
    assert cow.originals.tolist() == [1]
    assert cow.table.tolist() == [0, cow.copies[0], 2]
    assert blocks.ref_counts[1] == 2  # until it is copied
    blocks.release(cow.originals)
    assert blocks.ref_counts[[0, 1, 2, 3]].tolist() == [2, 1, 1, 1]
    full = BlockManager(2)
    table = full.allocate(2)
    full.hold(table)
    with pytest.raises(KvExhausted):
        full.copy_on_write(table, first=1)
    assert full.ref_counts.tolist() == [2, 2]


def test_a_moved_block_keeps_its_number_and_has_another_slot() -> None:
    blocks = BlockManager(6)
    table = blocks.allocate(3)
    blocks.move(np.array([0, 2]), np.array([5, 3]))
    assert blocks.slots(table).tolist() == [5, 1, 3]
    assert blocks.blocks_at(np.array([5, 1, 3])).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="somebody holds"):
        blocks.move(np.array([1]), np.array([3]))
    blocks.order_free()
    assert blocks.slots(blocks.allocate(3)).tolist() == [0, 2, 4]
    assert blocks.problems() == []


def test_blocks_are_charged_to_who_allocated_them_until_they_are_free() -> None:
    blocks = BlockManager(8)
    one, two = blocks.allocate(3, account=1), blocks.allocate(2, account=4)
    assert [blocks.charged(n) for n in (0, 1, 4, 9)] == [0, 3, 2, 0]
    blocks.hold(one)
    blocks.release(one)
    assert blocks.charged(1) == 3
    blocks.release(one)
    blocks.release(two[:1])
    assert [blocks.charged(n) for n in (1, 4)] == [0, 1]


def test_wrong_books_are_noticed() -> None:
    blocks = BlockManager(4)
    blocks.allocate(2)
    blocks.ref_counts[3] = 1
    assert blocks.problems() == [
        "the free blocks are not those that nobody holds",
        "accounts are charged [2] blocks, but hold [3]",
    ]
    blocks = BlockManager(4)
    blocks._free[0] = blocks._free[1]
    assert "a block is free twice" in blocks.problems()
    blocks = BlockManager(4)
    blocks._slot_of[0] = 1
    assert blocks.problems() == ["two blocks share a slot of memory"]
