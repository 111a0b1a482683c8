"""Who pulls first when all turns are taken, and who is turned away."""

from __future__ import annotations

import asyncio
from dataclasses import fields

import numpy as np
import pytest

from sagellm_common.comm_backend.protocol import Encoding, Pull, PullAlong, TransferResult
from sagellm_common.comm_backend.pull_queue import PullQueue
from sagellm_common.core.errors import PeerLost, QueueFull
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.types import BlockIds, KvSource

NONE: BlockIds = np.array([], dtype=np.int32)


class Slow:
    """A byte path whose pulls go on until they are let go, in the order in which they began."""

    name, pulls_along, encodes, address = "slow", True, False, ""

    def __init__(self) -> None:
        self.running: dict[str, asyncio.Future[None]] = {}
        self.began: list[str] = []
        self.left_s: dict[str, float] = {}

    async def pull(self, asked: Pull | PullAlong) -> TransferResult:
        name = asked.source.transfer_id
        self.began.append(name)
        self.left_s[name] = asked.timeout_s
        self.running[name] = asyncio.get_running_loop().create_future()
        try:
            await self.running[name]
        finally:
            del self.running[name]
        return TransferResult(0, 0.0, 0)

    pull_along = pull


class Pulls:
    def __init__(self, max_pulls: int = 1, max_waiting: int = 8) -> None:
        self.slow = Slow()
        self.queue = PullQueue(self.slow, max_pulls, max_waiting)  # type: ignore[arg-type]
        self.tasks: dict[str, asyncio.Task[TransferResult]] = {}

    async def ask(self, name: str, priority: int = 0, timeout_s: float = 30.0) -> None:
        source = KvSource(name, 1, "w", "i", "c", "d", "slow", NONE, 0, 1000)
        pull = self.queue.pull(Pull(source, NONE, NONE, timeout_s=timeout_s, priority=priority))
        self.tasks[name] = asyncio.create_task(pull)
        await settle()

    async def end(self, name: str, error: Exception | None = None) -> None:
        if error is None:
            self.slow.running[name].set_result(None)
        else:
            self.slow.running[name].set_exception(error)
        await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def drained(pulls: Pulls) -> None:
    while pulls.slow.running:
        await pulls.end(next(iter(pulls.slow.running)))


async def test_no_more_than_the_limit_at_a_time() -> None:
    pulls = Pulls(max_pulls=3)
    for n in range(7):
        await pulls.ask(str(n))
    assert pulls.slow.began == ["0", "1", "2"]
    await pulls.end("1")
    assert pulls.slow.began == ["0", "1", "2", "3"]
    await drained(pulls)
    assert pulls.slow.began == [str(n) for n in range(7)]


async def test_the_more_urgent_first_and_equal_ones_as_they_came() -> None:
    pulls = Pulls()
    for name, priority in [("a", 0), ("low", -1), ("b", 0), ("high", 5), ("c", 0), ("higher", 9)]:
        await pulls.ask(name, priority)
    await drained(pulls)
    assert pulls.slow.began == ["a", "higher", "high", "b", "c", "low"]


async def test_a_pull_that_fails_passes_its_turn_on() -> None:
    pulls = Pulls()
    await pulls.ask("a")
    await pulls.ask("b")
    await pulls.end("a", PeerLost("gone"))
    with pytest.raises(PeerLost, match="gone"):
        await pulls.tasks["a"]
    assert pulls.slow.began == ["a", "b"]
    await drained(pulls)


async def test_the_least_urgent_is_turned_away_when_too_many_wait() -> None:
    pulls = Pulls(max_waiting=2)
    for name, priority in [("a", 0), ("b", 1), ("c", 1)]:
        await pulls.ask(name, priority)
    await pulls.ask("late", 1)
    with pytest.raises(QueueFull, match=r"transport\.max_pulls: 2 more urgent"):
        await pulls.tasks["late"]
    await pulls.ask("urgent", 2)
    with pytest.raises(QueueFull) as caught:
        await pulls.tasks["c"]
    assert caught.value.retryable and caught.value.retry_after_s
    await drained(pulls)
    assert pulls.slow.began == ["a", "urgent", "b"]


async def test_waiting_counts_towards_the_timeout() -> None:
    pulls = Pulls()
    await pulls.ask("a")
    await pulls.ask("never", timeout_s=0.01)
    with pytest.raises(QueueFull, match="within 0.01 s"):
        await pulls.tasks["never"]
    await pulls.ask("b", timeout_s=50.0)
    await asyncio.sleep(0.01)
    await pulls.end("a")
    assert pulls.slow.left_s["b"] < 50.0
    await drained(pulls)
    assert pulls.slow.began == ["a", "b"]


@pytest.mark.parametrize("granted", [False, True])
async def test_a_cancelled_pull_takes_nobodys_turn(granted: bool) -> None:
    pulls = Pulls()
    for name in "abc":
        await pulls.ask(name)
    if granted:
        pulls.slow.running["a"].set_result(None)  # and before `b` runs:
        await asyncio.sleep(0)
    pulls.tasks["b"].cancel()
    if not granted:
        await pulls.end("a")
    await settle()
    assert pulls.tasks["b"].cancelled()
    assert pulls.slow.began[-1] == "c"
    await drained(pulls)
    await pulls.ask("d")
    assert pulls.slow.began[-1] == "d", "a turn was lost"
    await drained(pulls)


async def test_pulls_along_have_turns_of_their_own() -> None:
    pulls = Pulls()
    source = KvSource("along", 1, "w", "i", "c", "d", "slow", NONE, 0, 1000)
    along = asyncio.create_task(
        pulls.queue.pull_along(PullAlong(source, 0, NONE, timeout_s=9.0, on_bytes=lambda _: None))
    )
    await settle()
    await pulls.ask("a")
    assert pulls.slow.began == ["along", "a"]
    await drained(pulls)
    await along


async def test_the_byte_path_gets_all_that_was_asked_for() -> None:
    calls: list[Pull | PullAlong] = []

    class Recording(Slow):
        async def pull(self, asked: Pull | PullAlong) -> TransferResult:
            calls.append(asked)
            return TransferResult(0, 0.0, 0)

        pull_along = pull

    queue = PullQueue(Recording(), 1, 0)  # type: ignore[arg-type]
    source = KvSource("t", 1, "w", "i", "c", "d", "slow", NONE, 0, 1000)
    into, encoding = KvRegion(memoryview(bytearray(16)), 16, 1), Encoding("int8", 16, 4)
    pull = Pull(source, NONE, NONE, timeout_s=9.0, into=into, encoding=encoding, priority=3)
    along = PullAlong(source, 3, NONE, timeout_s=9.0, on_bytes=print, into=into, encoding=encoding, priority=2)
    await queue.pull(pull)
    await queue.pull_along(along)
    for asked, got in zip((pull, along), calls, strict=True):
        for field in fields(asked):
            if field.name != "timeout_s":
                assert getattr(got, field.name) is getattr(asked, field.name)
        assert 0 < got.timeout_s <= 9.0
