"""Who is next, who gives way; and that nobody starves and tenants get alike."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_common.scheduler_ir.engine_policy import Order, SequenceView
from sagellm_common.scheduler_ir.fairness import TokenCounters
from sagellm_common.scheduler_ir.waiting import HEAD_START_TOKENS, PATIENCE_S, PATIENT_EVERY, Waiting, WaitingRoom

numbers = itertools.count()


def waiting(
    tenant: str = "", *, priority: int = 0, tokens: int = 100, arrived_s: float = 0.0, deadline_s: float = 1e9
) -> Waiting:
    number = next(numbers)
    view = SequenceView(str(number), number, priority, deadline_s, arrived_s=arrived_s)
    return Waiting(view, tenant, tokens)


def served(room: WaitingRoom, now_s: float = 0.0) -> list[Waiting]:
    return [one for one in iter(lambda: room.pop(now_s), None) if one is not None]


@given(
    st.sampled_from(get_args(Order)),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.floats(0.1, 60.0)), min_size=1, max_size=60),
    st.integers(0, 5),
)
def test_nobody_starves(order: Order, fair: bool, others: list[tuple[str, int, float]], before: int) -> None:
    """However many come later, with whatever priority and deadline: once patience is over, it has its turn soon."""
    room = WaitingRoom(order, fair=fair)
    for _ in range(before):
        room.push(waiting("meek", tokens=10**9))
    meek = waiting("meek", tokens=10**9, deadline_s=0.0)
    room.push(meek)
    turns, crowd = 0, itertools.cycle(others)
    now_s = PATIENCE_S
    while meek.view.request_id in room:
        for tenant, priority, due_s in itertools.islice(crowd, 2):  # more come than are served
            room.push(waiting(tenant, priority=priority, tokens=1, arrived_s=now_s, deadline_s=now_s + due_s))
        assert room.pop(now_s) is not None
        turns += 1
        now_s += 0.01
        assert turns <= PATIENT_EVERY * (before + 1)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=5), st.integers(1, 400))
def test_tenants_that_always_wait_get_alike_whatever_they_ask(sizes: list[int], turns: int) -> None:
    """None is ever ahead of another by more than the two largest requests."""
    room = WaitingRoom("on_time", fair=True)
    given_tokens = Counter({str(i): 0 for i in range(len(sizes))})
    for tenant, size in [*enumerate(sizes)] * 2:
        room.push(waiting(str(tenant), tokens=size))
    for _ in range(turns):
        one = room.pop(0.0)
        assert one is not None
        given_tokens[one.tenant] += one.tokens
        room.push(waiting(one.tenant, tokens=one.tokens))
    assert max(given_tokens.values()) - min(given_tokens.values()) <= 2 * max(sizes)


def test_a_flood_does_not_delay_the_others() -> None:
    room = WaitingRoom("on_time", fair=True)
    for _ in range(50):
        room.push(waiting("flood"))
    room.push(waiting("quiet"))
    assert [one.tenant for one in served(room)[:3]].count("quiet") == 1
    blind = WaitingRoom("fifo", fair=False)
    for tenant in ["flood"] * 50 + ["quiet"]:
        blind.push(waiting(tenant))
    assert served(blind)[-1].tenant == "quiet"


def test_idling_earns_no_credit() -> None:
    counters = TokenCounters()
    counters.enter("busy")
    counters.charge("busy", 10_000)
    counters.enter("back")
    assert counters["back"] == counters["busy"]
    for tenant in ("busy", "back"):
        counters.leave(tenant)
    counters.enter("late")  # nobody waits: level with who left last
    assert counters["late"] == 10_000


def test_a_priority_is_a_head_start_and_no_more() -> None:
    room = WaitingRoom("priority", fair=True)
    for _ in range(8):
        room.push(waiting("vip", priority=1, tokens=HEAD_START_TOKENS // 2))
        room.push(waiting("plain", tokens=1))
    order = [one.tenant for one in served(room)]
    assert order[:2] == ["vip", "vip"] and "plain" in order[:4]


def test_who_is_late_comes_after_who_is_not() -> None:
    room = WaitingRoom("feasible", fair=False)
    late, soon, later = (waiting(deadline_s=at) for at in (1.0, 3.0, 4.0))
    for one in (late, later, soon):
        room.push(one)
    assert served(room, now_s=2.0) == [soon, later, late]


def test_who_leaves_is_not_served() -> None:
    room = WaitingRoom("fifo", fair=True)
    gone, stays = waiting("a"), waiting("b")
    room.push(gone)
    room.push(stays)
    room.remove(gone.view.request_id)
    room.remove("nobody")
    assert served(room) == [stays] and len(room) == 0
    with pytest.raises(ValueError, match="waits already"):
        room.push(stays) or room.push(stays)  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("here", "newcomer", "leaves"),
    [
        ([("a", 0), ("a", 1)], ("b", 1), 0),  # the lower priority
        ([("a", 1), ("a", 0), ("a", 0)], ("a", 1), 2),  # of equals the latest
        ([("a", 0), ("a", 0), ("a", 0), ("b", 0)], ("b", 0), 2),  # who crowds the room
        ([("a", 0), ("a", 0), ("b", 0)], ("b", 0), None),  # would crowd it as much
        ([("a", 1), ("a", 1), ("a", 1)], ("b", 0), None),  # the lower priority is its own
    ],
)
def test_who_gives_way(here: list[tuple[str, int]], newcomer: tuple[str, int], leaves: int | None) -> None:
    room = WaitingRoom("on_time", fair=True)
    ones = [waiting(tenant, priority=priority) for tenant, priority in here]
    for one in ones:
        room.push(one)
    found = room.gives_way_to(waiting(newcomer[0], priority=newcomer[1]))
    assert found == (None if leaves is None else ones[leaves])
