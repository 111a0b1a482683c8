"""PrefixReuseIndex, compiled and in Python, against a naive model: what every worker holds in every tier, and an order
of use."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sagellm_common.core.kv import Tier
from sagellm_common.prefix_reuse import native
from sagellm_common.prefix_reuse.holder_table import HolderTable, NativeTable, PythonTable
from sagellm_common.prefix_reuse.index import PrefixReuseIndex

WORKERS = tuple("abcde")
BLOCKS = [bytes([i]) * 16 for i in range(10)]

workers = st.sampled_from(WORKERS)
tiers = st.sampled_from(Tier)
prefixes = st.lists(st.sampled_from(BLOCKS), max_size=7)


class Model:
    """Everything by definition, nothing fast."""

    def __init__(self, max_blocks: int) -> None:
        self.max_blocks = max_blocks
        self.held: dict[tuple[str, Tier], set[bytes]] = {(w, t): set() for w in WORKERS for t in Tier}
        self.used: list[bytes] = []
        """Least recently used first."""
        self.lookups = self.queried = self.matched = self.forgotten = 0

    def insert(self, worker: str, tier: Tier, blocks: list[bytes]) -> None:
        for block in reversed(blocks):
            self.held[worker, tier].add(block)
            self._use(block)
            if len(self.used) > self.max_blocks:
                oldest = self.used.pop(0)
                self.forgotten += 1
                for held in self.held.values():
                    held.discard(oldest)

    def remove(self, worker: str, tier: Tier, blocks: list[bytes]) -> None:
        self.held[worker, tier] -= set(blocks)
        self._tidy()

    def invalidate(self, worker: str) -> int:
        dropped = sum(len(self.held[worker, tier]) for tier in Tier)
        for tier in Tier:
            self.held[worker, tier].clear()
        self._tidy()
        return dropped

    def lookup(self, blocks: list[bytes]) -> dict[str, tuple[int, ...]]:
        depths = {}
        for worker in WORKERS:
            within = [set().union(*(self.held[worker, t] for t in Tier if t <= tier)) for tier in Tier]
            found = tuple(next((i for i, b in enumerate(blocks) if b not in some), len(blocks)) for some in within)
            if found[-1]:
                depths[worker] = found
        longest = max((found[-1] for found in depths.values()), default=0)
        for block in reversed(blocks[:longest]):
            self._use(block)
        self.lookups, self.queried, self.matched = (
            self.lookups + 1,
            self.queried + len(blocks),
            self.matched + longest,
        )
        return depths

    def _use(self, block: bytes) -> None:
        if block in self.used:
            self.used.remove(block)
        self.used.append(block)

    def _tidy(self) -> None:
        known = set().union(*self.held.values())
        self.used = [block for block in self.used if block in known]


class IndexMachine(RuleBasedStateMachine):
    def table(self, max_blocks: int) -> HolderTable:
        raise NotImplementedError

    @initialize(max_blocks=st.sampled_from([1, 2, 3, 5, 100]))
    def begin(self, max_blocks: int) -> None:
        self.index = PrefixReuseIndex(table=self.table(max_blocks))
        self.model = Model(max_blocks)

    @rule(worker=workers, tier=tiers, blocks=prefixes)
    def insert(self, worker: str, tier: Tier, blocks: list[bytes]) -> None:
        self.index.insert(worker, b"".join(blocks), tier)
        self.model.insert(worker, tier, blocks)

    @rule(worker=workers, tier=tiers, blocks=prefixes)
    def evict(self, worker: str, tier: Tier, blocks: list[bytes]) -> None:
        self.index.evict(worker, b"".join(blocks), tier)
        self.model.remove(worker, tier, blocks)

    @rule(worker=workers)
    def invalidate(self, worker: str) -> None:
        assert self.index.invalidate(worker) == self.model.invalidate(worker)

    @precondition(lambda self: len(self.model.used) > 1)
    @rule(data=st.data())
    def lookup_what_is_there(self, data: st.DataObject) -> None:
        self.lookup(data.draw(st.lists(st.sampled_from(self.model.used), max_size=5)))

    @rule(blocks=prefixes)
    def lookup(self, blocks: list[bytes]) -> None:
        assert self.index.lookup(b"".join(blocks)) == self.model.lookup(blocks)

    @invariant()
    def the_same_is_known(self) -> None:
        if not hasattr(self, "index"):
            return
        metrics, model = self.index.metrics, self.model
        assert len(self.index) == metrics.blocks == len(model.used)
        counted = (metrics.lookups, metrics.queried_blocks, metrics.matched_blocks, metrics.forgotten_blocks)
        assert counted == (model.lookups, model.queried, model.matched, model.forgotten)
        sets = {tuple(who for who, held in model.held.items() if block in held) for block in model.used}
        assert metrics.holder_sets >= len(sets)
        for worker in WORKERS:
            held = self.index.held(worker)
            assert all(held.get(tier, 0) == len(model.held[worker, tier]) for tier in Tier)


class CompiledMachine(IndexMachine):
    def table(self, max_blocks: int) -> HolderTable:
        library = native.library()
        assert library is not None
        return NativeTable(library, max_blocks)


class PythonMachine(IndexMachine):
    def table(self, max_blocks: int) -> HolderTable:
        return PythonTable(max_blocks, contextlib.nullcontext())


EXAMPLES = settings(max_examples=40, stateful_step_count=30, deadline=None)

TestPython = PythonMachine.TestCase
TestPython.settings = EXAMPLES
TestCompiled = pytest.mark.skipif(
    native.library() is None, reason="needs the compiled index: python -m sagellm_common.prefix_reuse.native"
)(CompiledMachine.TestCase)
TestCompiled.settings = EXAMPLES
