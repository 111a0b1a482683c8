"""The block manager against lists and dictionaries: references, accounts and places after any moves and copies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sagellm_common.core.errors import KvExhausted
from sagellm_common.kv_runtime.block_manager import BlockArray, BlockManager

NUM_BLOCKS = 8


class Blocks(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS)
        self.tables: list[tuple[BlockArray, list[str]]] = []
        """Each with what its blocks hold."""
        self.memory = [""] * NUM_BLOCKS
        """By slot."""
        self.accounts: dict[int, int] = {}
        self.writes = 0

    def held(self) -> set[int]:
        return {block for table, _ in self.tables for block in table.tolist()}

    @rule(count=st.integers(0, NUM_BLOCKS), account=st.integers(0, 2))
    def allocate(self, count: int, account: int) -> None:
        if count > NUM_BLOCKS - len(self.held()):
            with pytest.raises(KvExhausted):
                self.blocks.allocate(count, account)
            return
        table = self.blocks.allocate(count, account)
        assert self.held().isdisjoint(table.tolist())
        assert len(set(table.tolist())) == count
        self.accounts.update(dict.fromkeys(table.tolist(), account))
        self.tables.append((table, [self.memory[slot] for slot in self.blocks.slots(table)]))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table, contents = data.draw(st.sampled_from(self.tables))
        self.blocks.hold(table)
        self.tables.append((table.copy(), list(contents)))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        freed = self.blocks.release(table)
        assert set(freed.tolist()) == set(table.tolist()) - self.held()

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), first=st.integers(0, NUM_BLOCKS))
    def write(self, data: st.DataObject, first: int) -> None:
        """Copy on write, as explicit as it is: table, then copies, then references, then the write."""
        number = data.draw(st.integers(0, len(self.tables) - 1))
        table, contents = self.tables[number]
        try:
            cow = self.blocks.copy_on_write(table, first, account=1)
        except KvExhausted:
            return
        for source, target in zip(self.blocks.slots(cow.originals), self.blocks.slots(cow.copies), strict=True):
            self.memory[target] = self.memory[source]
        self.accounts.update(dict.fromkeys(cow.copies.tolist(), 1))
        self.blocks.release(cow.originals)
        self.writes += 1
        for position in range(first, len(table)):
            contents[position] = self.memory[self.blocks.slots(cow.table)[position]] = f"write {self.writes}"
        self.tables[number] = cow.table, contents

    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        free = self.blocks.slots(self.blocks.free_blocks()).tolist()
        used = sorted(set(range(NUM_BLOCKS)) - set(free))
        sources = data.draw(st.lists(st.sampled_from(used), unique=True, max_size=len(free)) if used else st.just([]))
        targets = data.draw(st.permutations(free))[: len(sources)]
        for source, target in zip(sources, targets, strict=True):
            self.memory[target], self.memory[source] = self.memory[source], "gone"
        self.blocks.move(np.array(sources, np.int64), np.array(targets, np.int64))

    @rule()
    def order_free(self) -> None:
        self.blocks.order_free()

    @invariant()
    def everybody_has_what_it_wrote(self) -> None:
        for table, contents in self.tables:
            assert [self.memory[slot] for slot in self.blocks.slots(table)] == contents

    @invariant()
    def the_books_are_right(self) -> None:
        held = self.held()
        assert self.blocks.problems() == []
        assert self.blocks.num_free == NUM_BLOCKS - len(held)
        counts = np.bincount(
            np.concatenate([np.empty(0, np.int64), *(t for t, _ in self.tables)]), minlength=NUM_BLOCKS
        )
        assert self.blocks.ref_counts.tolist() == counts.tolist()
        for account in range(3):
            assert self.blocks.charged(account) == sum(self.accounts[block] == account for block in held)


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
