"""The bound, the queue before the workers, who gives way, and when to come again."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from sagellm_common.core.clock import SystemClock
from sagellm_common.core.errors import Cancelled, DeadlineExceeded, QueueFull
from sagellm_common.core.types import GenerationRequest, SamplingParams
from services.router.admission import RETRY_AFTER_S, Admission, Slot


def request(request_id: str, *, tenant: str = "t", priority: int = 0, prompt: int = 10) -> GenerationRequest:
    tokens = np.arange(prompt, dtype=np.int32)
    return GenerationRequest(request_id, "m", tokens, SamplingParams(max_new_tokens=10), tenant, priority)


class House:
    """Requests that come, stay until told to go, and in which order they got their turn."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.turns: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._may_go: dict[str, asyncio.Event] = {}

    async def comes(self, one: GenerationRequest, within_s: float = 60.0) -> None:
        """Returns when it is in, or waits, or was turned away."""
        self._may_go[one.request_id] = asyncio.Event()
        self.tasks[one.request_id] = asyncio.create_task(self._serve(one, within_s))
        await asyncio.sleep(0)

    async def goes(self, request_id: str) -> None:
        self._may_go[request_id].set()
        await self.tasks[request_id]
        await asyncio.sleep(0)

    async def _serve(self, one: GenerationRequest, within_s: float) -> None:
        with self.admission.admit(one, math.inf) as slot:
            if not self.admission.enter(slot):
                await self.admission.turn(slot, within_s)
            self.turns.append(one.request_id)
            await self._may_go[one.request_id].wait()
            slot.emitted_tokens = 4


def admission(max_in_flight: int = 4, max_running: int = 1, **how: object) -> Admission:
    return Admission(max_in_flight, SystemClock(), max_running=max_running, **how)  # type: ignore[arg-type]


async def test_who_finds_no_place_waits_for_one() -> None:
    house = House(admission())
    for name in "abc":
        await house.comes(request(name))
    assert house.turns == ["a"] and house.admission.waiting == 2 and len(house.admission) == 3
    await house.goes("a")
    assert house.turns == ["a", "b"]
    for name in "bc":
        await house.goes(name)
    assert house.turns == ["a", "b", "c"] and len(house.admission) == 0


async def test_priority_and_fairness_order_those_who_wait() -> None:
    house = House(admission(8, order="priority", fair=False))
    for name, priority in (("a", 0), ("b", 0), ("c", 5)):
        await house.comes(request(name, priority=priority))
    await house.goes("a")
    assert house.turns == ["a", "c"]

    house = House(admission(8, order="on_time", fair=True))
    for name in ("flood-1", "flood-2", "flood-3", "flood-4", "other"):
        await house.comes(request(name, tenant=name.partition("-")[0]))
    for name in ("flood-1", "flood-2"):
        await house.goes(name)
    assert house.turns == ["flood-1", "flood-2", "other"]


async def test_a_full_queue_turns_the_newcomer_away_or_who_counts_for_less() -> None:
    house = House(admission(2, order="priority"))
    await house.comes(request("running"))
    await house.comes(request("low"))
    await house.comes(request("same"))
    with pytest.raises(QueueFull, match=r"router\.max_queue\); try again later") as error:
        await house.tasks["same"]
    assert error.value.retry_after_s == RETRY_AFTER_S
    await house.comes(request("high", priority=1))
    with pytest.raises(QueueFull, match="another came before"):
        await house.tasks["low"]
    await house.goes("running")
    assert house.turns == ["running", "high"]


async def test_when_to_come_again_is_when_a_place_is_free() -> None:
    """Two places, 4 tokens an answer, 3 s a token: one leaves every 6 s, and no two are sent for the same place."""
    house = House(admission(2, 2, lifetime=lambda tokens: 3.0 * tokens))
    await house.comes(request("first"))
    await house.goes("first")
    for name in "ab":
        await house.comes(request(name))
    for turned_away, expected_s in enumerate((6.0, 12.0, 18.0)):
        await house.comes(request(f"late-{turned_away}"))
        with pytest.raises(QueueFull) as error:
            await house.tasks[f"late-{turned_away}"]
        assert error.value.retry_after_s == pytest.approx(expected_s)
    await house.goes("a")
    assert house.admission.retry_after_s() == pytest.approx(3.0 * 4 / 1)


async def test_waiting_ends_at_the_deadline_and_when_cancelled() -> None:
    house = House(admission())
    await house.comes(request("a"))
    await house.comes(request("late"), within_s=0.0)
    with pytest.raises(DeadlineExceeded, match="waited for its turn"):
        await house.tasks["late"]
    await house.comes(request("unwanted"))
    assert house.admission.cancel("unwanted")
    with pytest.raises(Cancelled):
        await house.tasks["unwanted"]
    await house.comes(request("gone"))
    house.tasks["gone"].cancel()
    with pytest.raises(asyncio.CancelledError):
        await house.tasks["gone"]
    assert house.admission.waiting == 0
    await house.comes(request("b"))
    await house.goes("a")
    assert house.turns == ["a", "b"]


async def test_a_changed_order_is_that_of_those_who_wait_already() -> None:
    house = House(admission(8))
    for name, priority in (("a", 0), ("b", 0), ("c", 5)):
        await house.comes(request(name, priority=priority))
    house.admission.go_by("priority", fair=False)
    await house.goes("a")
    assert house.turns == ["a", "c"]


@contextmanager
def admitted(house: Admission, *names: str) -> Iterator[list[Slot]]:
    with ExitStack() as stack:
        yield [stack.enter_context(house.admit(request(name), math.inf)) for name in names]


async def test_without_a_bound_at_the_workers_nobody_waits() -> None:
    house = admission(3, 0)
    with admitted(house, "a", "b", "c") as slots:
        assert all(house.enter(slot) for slot in slots) and all(slot.running for slot in slots)
