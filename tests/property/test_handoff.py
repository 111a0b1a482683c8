"""Leases under any interleaving: nothing freed twice, nothing lost, nothing freed while it is read."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sagellm_common.comm_backend.handoff import HandoffSource, HandoffTarget
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import LeaseExpired
from sagellm_common.core.kv import Allocation

TTL_S = 5
KEYS = st.sampled_from(["a", "b"])
EPOCHS = st.integers(1, 3)


class Leases(RuleBasedStateMachine):
    """The oracle is a dict of what must be held: key → (epoch, allocation, end of its time)."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.made: list[Allocation] = []
        self.freed: list[int] = []
        self.given: set[int] = set()
        """Allocations that belong to a caller: refused or claimed ones."""
        self.reads: list[tuple[AbstractContextManager[None], Allocation]] = []
        self.source = HandoffSource(TTL_S, self.clock, self.free)
        self.target = HandoffTarget(TTL_S, self.clock, self.free)
        self.pinned: dict[str, tuple[int, Allocation, float]] = {}
        self.reserved: dict[str, tuple[int, Allocation, float]] = {}

    def free(self, allocation: Allocation) -> None:
        assert id(allocation) not in self.freed, "freed twice"
        assert id(allocation) not in self.given, "freed what belongs to a caller"
        assert all(allocation is not read for _, read in self.reads), "freed what is being read"
        self.freed.append(id(allocation))

    def new(self) -> Allocation:
        allocation = Allocation(np.array([len(self.made)], dtype=np.int32))
        self.made.append(allocation)
        return allocation

    @rule(key=KEYS, epoch=EPOCHS, source=st.booleans())
    def enter(self, key: str, epoch: int, source: bool) -> None:
        allocation, held = self.new(), self.pinned if source else self.reserved
        try:
            if source:
                self.source.pin(key, epoch, allocation, 0)
            else:
                self.target.reserve(key, epoch, allocation)
        except LeaseExpired:
            assert held[key][0] > epoch
            self.given.add(id(allocation))
            return
        if key not in held or held[key][0] < epoch or held[key][2] <= self.clock.now():
            held[key] = (epoch, allocation, self.clock.now() + TTL_S)

    @rule(key=KEYS, epoch=EPOCHS, source=st.booleans(), committed=st.booleans())
    def release(self, key: str, epoch: int, source: bool, committed: bool) -> None:
        held = self.pinned if source else self.reserved
        if source:
            self.source.release(key, epoch, committed)
        else:
            self.target.release(key, epoch)
        if key in held and held[key][0] <= epoch:
            del held[key]

    @rule(key=KEYS, epoch=EPOCHS)
    def read(self, key: str, epoch: int) -> None:
        live = key in self.pinned and self.pinned[key][0] == epoch and self.pinned[key][2] > self.clock.now()
        block_ids = self.pinned[key][1].block_ids if key in self.pinned else np.array([0])
        reading = self.source.reading(key, epoch, block_ids)
        try:
            reading.__enter__()
        except LeaseExpired:
            assert not live
            return
        assert live
        self.reads.append((reading, self.pinned[key][1]))

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def finish_read(self, data: st.DataObject) -> None:
        reading, _ = self.reads.pop(data.draw(st.integers(0, len(self.reads) - 1)))
        reading.__exit__(None, None, None)

    @rule(key=KEYS, epoch=EPOCHS)
    def renew(self, key: str, epoch: int) -> None:
        held = self.pinned.get(key)
        try:
            self.source.renew(key, epoch)
        except LeaseExpired:
            assert held is None or held[0] != epoch or held[2] <= self.clock.now()
            return
        assert held is not None and held[0] == epoch
        self.pinned[key] = (epoch, held[1], self.clock.now() + TTL_S)

    @rule(key=KEYS, attempt=EPOCHS)
    def claim(self, key: str, attempt: int) -> None:
        held = self.reserved.get(key)
        try:
            allocation = self.target.claim(key, attempt)
        except LeaseExpired:
            assert held is None or held[0] != attempt or held[2] <= self.clock.now()
            return
        assert held is not None and allocation is held[1]
        del self.reserved[key]
        self.given.add(id(allocation))

    @rule(seconds=st.integers(0, 4))
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule()
    def expire(self) -> None:
        expired = self.source.expire() + self.target.expire()
        before = len(self.pinned) + len(self.reserved)
        for held in (self.pinned, self.reserved):
            for key in [key for key, (_, _, end_s) in held.items() if end_s <= self.clock.now()]:
                del held[key]
        assert expired == before - len(self.pinned) - len(self.reserved)

    @invariant()
    def nothing_is_lost(self) -> None:
        held = {id(allocation) for _, allocation, _ in [*self.pinned.values(), *self.reserved.values()]}
        read = {id(allocation) for _, allocation in self.reads}
        pinned = {id(allocation) for _, allocation, _ in self.pinned.values()}
        assert (len(self.source), len(self.target)) == (len(pinned | read), len(self.reserved))
        assert held.isdisjoint(self.freed)
        assert {id(a) for a in self.made} == held | read | set(self.freed) | self.given

    def teardown(self) -> None:
        self.source.close()
        self.target.close()
        while self.reads:
            self.reads.pop()[0].__exit__(None, None, None)
        assert {id(a) for a in self.made} == set(self.freed) | self.given


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
