from __future__ import annotations

import asyncio

import pytest

from sagellm_common.core.errors import Cancelled, InvalidRequest, LeaseExpired
from services.decode.running import RunningRequests


async def run(running: RunningRequests, attempt: int, ends: list[str] | None = None) -> None:
    with running.enter("r1", attempt):
        try:
            await asyncio.Event().wait()
        finally:
            if ends is not None:
                ends.append(f"attempt {attempt} cleaned up")


async def started(running: RunningRequests, attempt: int, ends: list[str] | None = None) -> asyncio.Task[None]:
    task = asyncio.create_task(run(running, attempt, ends))
    await asyncio.sleep(0)
    return task


async def test_cancel_becomes_an_error_after_the_cleanup() -> None:
    running, ends = RunningRequests(), list[str]()
    task = await started(running, 2, ends)
    running.cancel("r1", 1)  # older than what runs
    running.cancel("other", 9)
    await asyncio.sleep(0)
    assert not task.done()
    running.cancel("r1", 2)
    running.cancel("r1", 2)
    with pytest.raises(Cancelled):
        await task
    assert ends == ["attempt 2 cleaned up"]
    assert len(running) == 0


async def test_the_newest_attempt_runs() -> None:
    running = RunningRequests()
    first = await started(running, 1)
    second = await started(running, 2)
    with pytest.raises(LeaseExpired, match="superseded by 2"):
        await first
    assert len(running) == 1, "the end of the first must not take the second's place"
    with pytest.raises(LeaseExpired, match="superseded by attempt 2"):
        await run(running, 1)
    with pytest.raises(InvalidRequest, match="already"):
        await run(running, 2)
    running.cancel("r1", 2)
    with pytest.raises(Cancelled):
        await second


async def test_the_tasks_own_cancellation_stays_one() -> None:
    running = RunningRequests()
    task = await started(running, 1)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert len(running) == 0


async def test_both_at_once_stay_a_cancellation() -> None:
    """A session that ends while one of its requests is cancelled: the task must not survive."""
    running = RunningRequests()
    task = await started(running, 1)
    running.cancel("r1", 1)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_a_timeout_around_it_still_works() -> None:
    running = RunningRequests()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await run(running, 1)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
