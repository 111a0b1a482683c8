from __future__ import annotations

import numpy as np
import pytest

from sagellm_common.comm_backend.handoff import HandoffSource, HandoffTarget, attempt_of, last_epoch
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import Draining, LeaseExpired
from sagellm_common.core.kv import Allocation
from sagellm_common.core.kv_progress import KvProgress

TTL_S = 10.0


def blocks(*values: int) -> Allocation:
    return Allocation(np.array(values, dtype=np.int32))


class Fixture:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.freed: list[Allocation] = []
        self.source = HandoffSource(TTL_S, self.clock, self.freed.append)
        self.target = HandoffTarget(TTL_S, self.clock, self.freed.append)


@pytest.fixture
def it() -> Fixture:
    return Fixture()


# ---- source ----


def test_a_release_frees_once(it: Fixture) -> None:
    held = blocks(1, 2)
    assert it.source.pin("t", 1, held, 32) is held
    assert it.source.get("t", 1) == (held, 32)
    it.source.release("t", 1, committed=True)
    it.source.release("t", 1, committed=False)
    assert it.freed == [held]
    assert len(it.source) == 0
    assert it.source.outcomes == {"committed": 1}


def test_an_unknown_release_is_fine(it: Fixture) -> None:
    it.source.release("nobody", 1, committed=True)
    it.target.release("nobody", 1)
    assert it.freed == []


def test_a_higher_epoch_replaces_and_a_lower_is_fenced_off(it: Fixture) -> None:
    first, second, late = blocks(1), blocks(2), blocks(3)
    it.source.pin("t", 1, first, 4)
    it.source.pin("t", 2, second, 4)
    assert it.freed == [first]
    with pytest.raises(LeaseExpired, match="epoch 1 is fenced off by epoch 2"):
        it.source.pin("t", 1, late, 4)
    it.source.release("t", 1, committed=True)
    assert it.freed == [first], "neither the fenced pin nor the fenced release changes anything"
    it.source.release("t", 3, committed=False)
    assert it.freed == [first, second]


def test_the_same_pin_again_keeps_the_first(it: Fixture) -> None:
    first, again = blocks(1), blocks(2)
    it.source.pin("t", 1, first, 4)
    assert it.source.pin("t", 1, first, 4) is first
    assert it.freed == []
    assert it.source.pin("t", 1, again, 4) is first
    assert it.freed == [again]


def test_the_same_pin_after_its_time_is_a_new_one(it: Fixture) -> None:
    """Also when nobody has looked for expired leases since."""
    first, again = blocks(1), blocks(2)
    it.source.pin("t", 1, first, 4)
    it.clock.advance(TTL_S)
    assert it.source.pin("t", 1, again, 4) is again
    assert it.freed == [first]
    assert it.source.get("t", 1) == (again, 4)


def test_a_reservation_is_renewed_until_it_is_claimed(it: Fixture) -> None:
    held = blocks(1)
    it.target.reserve("r", 1, held)
    for _ in range(3):
        it.clock.advance(TTL_S - 1)
        assert it.target.renew("r", 1) == TTL_S
    with pytest.raises(LeaseExpired, match="epoch 1, not 2"):
        it.target.renew("r", 2)
    assert it.target.claim("r", 1) is held
    with pytest.raises(LeaseExpired):
        it.target.renew("r", 1)


def test_expiry_frees_at_the_end_of_the_time_and_renewal_starts_it_anew(it: Fixture) -> None:
    it.source.pin("t", 1, blocks(1), 4)
    it.clock.advance(TTL_S - 1)
    assert it.source.expire() == 0
    assert it.source.renew("t", 1) == TTL_S
    it.clock.advance(TTL_S - 1)
    assert it.source.expire() == 0
    it.clock.advance(1)
    with pytest.raises(LeaseExpired, match="ran out"):
        it.source.renew("t", 1)
    with pytest.raises(LeaseExpired), it.source.reading("t", 1, np.array([1])):
        pass
    assert it.source.expire() == 1
    assert len(it.freed) == 1


def test_readers_put_the_free_off_and_the_last_one_does_it(it: Fixture) -> None:
    held = blocks(1, 2, 3)
    it.source.pin("t", 1, held, 4)
    with it.source.reading("t", 1, np.array([1, 3])):
        with it.source.reading("t", 1, np.array([2])):
            it.source.release("t", 1, committed=True)
            assert len(it.source) == 1  # its blocks are still held: a drain must wait for them
            with pytest.raises(LeaseExpired), it.source.reading("t", 1, np.array([2])):
                pass
        assert it.freed == []
        assert len(it.source) == 1
    assert it.freed == [held]
    assert len(it.source) == 0


def test_a_reader_of_a_replaced_epoch_frees_the_old_blocks_only(it: Fixture) -> None:
    old, new = blocks(1), blocks(1)
    it.source.pin("t", 1, old, 4)
    with it.source.reading("t", 1, np.array([1])):
        it.source.pin("t", 2, new, 4)
        with it.source.reading("t", 2, np.array([1])):
            pass
        assert it.freed == []
    assert it.freed == [old]


def test_a_reader_that_fails_gives_back_too(it: Fixture) -> None:
    it.source.pin("t", 1, blocks(1), 4)
    with pytest.raises(ConnectionResetError), it.source.reading("t", 1, np.array([1])):
        it.source.release("t", 1, committed=False)
        raise ConnectionResetError
    assert len(it.freed) == 1


def test_only_pinned_blocks_can_be_read(it: Fixture) -> None:
    it.source.pin("t", 1, blocks(1, 2), 4)
    with pytest.raises(LeaseExpired, match="does not hold all"), it.source.reading("t", 1, np.array([1, 9])):
        pass
    it.source.release("t", 1, committed=True)
    assert len(it.freed) == 1, "a refused reader holds nothing"


@pytest.mark.parametrize("side", ["source", "target"])
def test_close_frees_all_and_refuses_more(it: Fixture, side: str) -> None:
    table = getattr(it, side)
    add = (
        (lambda key, a: it.source.pin(key, 1, a, 4))
        if side == "source"
        else lambda key, a: it.target.reserve(key, 1, a)
    )
    held = [blocks(1), blocks(2)]
    for n, allocation in enumerate(held):
        add(f"t{n}", allocation)
    table.close()
    table.close()
    assert it.freed == held
    mine = blocks(3)
    with pytest.raises(Draining):
        add("late", mine)
    assert it.freed == held, "what was refused still belongs to the caller"


def test_epochs_never_come_again(it: Fixture) -> None:
    """Neither after a restart: what a late receiver holds must not fit another pin."""
    mine, restarted = it.source, HandoffSource(TTL_S, it.clock, it.freed.append)
    epochs = [table.new_epoch(attempt) for table in (mine, restarted) for attempt in (1, 1, 2)]
    assert len(set(epochs)) == 6
    assert [attempt_of(epoch) for epoch in epochs] == [1, 1, 2, 1, 1, 2]
    assert epochs[0] < epochs[1] < last_epoch(1) < epochs[2] < last_epoch(2)


# ---- source, while it is computed ----


def progress() -> KvProgress:
    return KvProgress(32, 0, 16)


def test_computing_then_pinned_keeps_the_first_allocation(it: Fixture) -> None:
    early, late, growing = blocks(1, 2), blocks(1, 2), progress()
    with it.source.computing("t", 1, early, growing) as held:
        assert held is early
        assert it.source.progress("t", 1) == (early, growing)
        it.clock.advance(10 * TTL_S)
        assert it.source.expire() == 0, "it has no time while it is computed"
        assert it.source.renew("t", 1) == TTL_S
        it.clock.advance(10 * TTL_S)
        with it.source.reading("t", 1, early.block_ids[:1]):
            assert it.source.pin("t", 1, late, 32) is early
        growing.complete()
    assert it.freed == [late]
    assert it.source.get("t", 1) == (early, 32)
    it.clock.advance(TTL_S)
    assert it.source.expire() == 1
    assert it.freed == [late, early]


def test_computed_in_other_blocks_after_all(it: Fixture) -> None:
    early, late, growing = blocks(1, 2), blocks(3, 4), progress()
    with it.source.computing("t", 1, early, growing):
        assert it.source.pin("t", 1, late, 32) is late
    assert it.freed == [early]
    assert growing.failed
    with pytest.raises(LeaseExpired, match="not announced"):
        it.source.progress("t", 1)


def test_left_without_a_pin_it_ends_and_says_so(it: Fixture) -> None:
    early, growing = blocks(1, 2), progress()
    with pytest.raises(ZeroDivisionError), it.source.computing("t", 1, early, growing):
        raise ZeroDivisionError
    assert it.freed == [early]
    assert len(it.source) == 0
    with pytest.raises(LeaseExpired, match="without KV"):
        growing.wait(None, 0)


@pytest.mark.parametrize("end", ["release", "replace", "close"])
def test_ended_by_others_it_is_freed_once_and_a_successor_stays(it: Fixture, end: str) -> None:
    early, next_one, growing = blocks(1), blocks(2), progress()
    with it.source.computing("t", 1, early, growing):
        if end == "release":
            it.source.release("t", 1, committed=False)
            it.source.pin("t", 1, next_one, 16)
        elif end == "replace":
            it.source.pin("t", 2, next_one, 16)
        else:
            it.source.close()
        assert it.freed == [early]
    assert it.freed == [early]
    assert len(it.source) == (0 if end == "close" else 1)
    assert growing.failed


def test_a_release_tells_whoever_waits_for_the_computation(it: Fixture) -> None:
    growing = progress()
    with it.source.computing("t", 1, blocks(1), growing):
        it.source.release("t", 1, committed=False)
        with pytest.raises(LeaseExpired, match="cancelled before it was computed"):
            growing.wait(None, 0)


def test_blocks_that_are_read_outlive_the_computation(it: Fixture) -> None:
    early = blocks(1, 2)
    with it.source.computing("t", 1, early, progress()):
        reading = it.source.reading("t", 1, early.block_ids)
        reading.__enter__()
    assert it.freed == []
    assert len(it.source) == 1
    reading.__exit__(None, None, None)
    assert it.freed == [early]


def test_after_close_nothing_is_computed_for_others(it: Fixture) -> None:
    it.source.close()
    with pytest.raises(Draining), it.source.computing("t", 1, blocks(1), progress()):
        pass
    assert it.freed == [], "the caller still owns it"


# ---- target ----


def test_a_claim_hands_the_blocks_over(it: Fixture) -> None:
    held = blocks(1)
    assert it.target.reserve("r", 1, held) is held
    assert it.target.claim("r", 1) is held
    with pytest.raises(LeaseExpired):
        it.target.claim("r", 1)
    it.target.release("r", 1)
    it.clock.advance(TTL_S)
    assert it.target.expire() == 0
    assert it.freed == [], "the claimer frees"


def test_a_reservation_nobody_claims_expires(it: Fixture) -> None:
    held = blocks(1)
    it.target.reserve("r", 1, held)
    it.clock.advance(TTL_S)
    with pytest.raises(LeaseExpired, match="ran out"):
        it.target.claim("r", 1)
    assert it.target.expire() == 1
    assert it.freed == [held]


def test_attempts_fence_reservations(it: Fixture) -> None:
    first, second = blocks(1), blocks(2)
    it.target.reserve("r", 1, first)
    it.target.reserve("r", 2, second)
    assert it.freed == [first]
    with pytest.raises(LeaseExpired):
        it.target.reserve("r", 1, blocks(3))
    with pytest.raises(LeaseExpired, match="epoch 2, not 1"):
        it.target.claim("r", 1)
    it.target.release("r", 1)
    assert it.target.claim("r", 2) is second


def test_blocks_reserved_for_another_prompt_are_not_claimed(it: Fixture) -> None:
    old, new = blocks(1), blocks(2)
    it.target.reserve("r", 1, old, b"old")
    assert it.target.reserve("r", 1, new, b"new") is new
    assert it.freed == [old]
    with pytest.raises(LeaseExpired, match="another prompt"):
        it.target.claim("r", 1, b"old")
    assert it.target.claim("r", 1, b"new") is new


@pytest.mark.parametrize("end", ["release", "replace", "close"])
def test_what_is_written_is_freed_after_the_writer(it: Fixture, end: str) -> None:
    held = blocks(1)
    it.target.reserve("r", 1, held)
    with it.target.writing("r", 1) as mine:
        assert mine is held
        it.clock.advance(10 * TTL_S)
        assert it.target.expire() == 0
        with pytest.raises(LeaseExpired, match="being written"):
            it.target.claim("r", 1)
        with pytest.raises(LeaseExpired, match="written already"), it.target.writing("r", 1):
            pass
        if end == "release":
            it.target.release("r", 1)
        elif end == "replace":
            it.target.reserve("r", 2, blocks(2))
        else:
            it.target.close()
        assert it.freed == []
    assert it.freed == [held]
    assert len(it.target) == (1 if end == "replace" else 0)


def test_the_time_of_what_was_written_begins_when_it_is(it: Fixture) -> None:
    it.target.reserve("r", 1, blocks(1))
    with it.target.writing("r", 1):
        it.clock.advance(10 * TTL_S)
    assert it.target.holds("r", 1)
    it.clock.advance(TTL_S)
    assert not it.target.holds("r", 1)
    assert it.target.expire() == 1
