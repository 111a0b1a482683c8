from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from sagellm_common.comm_backend.handoff import HandoffSource, Party, last_epoch
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import Cancelled, Internal, KvExhausted, LeaseExpired
from sagellm_common.core.kv import Allocation
from sagellm_common.core.types import KvSource, SamplingParams, as_token_ids
from services.prefill import attempts
from services.prefill.attempts import IdempotentPrefill
from services.prefill.jobs import PrefillDone, PrefillJob
from tests.support.waiting import eventually

JOB = PrefillJob("r1", 1, as_token_ids([1, 2, 3]), SamplingParams(4), timeout_s=5.0)


class FakePrefill:
    """Ends when told to, and pins like the loop does."""

    def __init__(self) -> None:
        self.freed: list[Allocation] = []
        self.leases = HandoffSource(30.0, ManualClock(), self.freed.append)
        self.calls: list[PrefillJob] = []
        self.cancelled: list[int] = []
        self.go = asyncio.Event()
        self.fail: Callable[[], None] = lambda: None
        self.on_done: Callable[[], object] = lambda: None

    async def prefill(self, job: PrefillJob) -> PrefillDone:
        self.calls.append(job)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(job.attempt)
            raise
        self.fail()
        table, epoch = as_token_ids([len(self.calls)]), self.leases.new_epoch(job.attempt)
        self.leases.pin(job.request_id, epoch, Allocation(table), 3)
        asyncio.get_running_loop().call_soon(self.on_done)
        source = KvSource(job.request_id, epoch, "prefill-0", "life-1", "host:1", "host:2", "tcp", table, 3, 30_000)
        return PrefillDone((len(self.calls),), source=source)

    def cancel(self, request_id: str, attempt: int, by: Party = "router") -> None:
        self.leases.release(request_id, last_epoch(attempt), committed=False)


@pytest.fixture
async def inner() -> FakePrefill:
    return FakePrefill()


@pytest.fixture
async def prefill(inner: FakePrefill) -> IdempotentPrefill:
    return IdempotentPrefill(inner, inner.leases)


async def started(inner: FakePrefill, prefill: IdempotentPrefill, job: PrefillJob) -> asyncio.Task[PrefillDone]:
    task = asyncio.create_task(prefill.prefill(job))
    before = len(inner.calls)
    await eventually(lambda: len(inner.calls) > before)
    return task


async def test_it_ends_only_when_the_last_waiter_has_gone(inner: FakePrefill, prefill: IdempotentPrefill) -> None:
    first = await started(inner, prefill, JOB)
    second = asyncio.create_task(prefill.prefill(JOB))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    assert inner.cancelled == []
    second.cancel()
    await asyncio.wait([second])
    await prefill.close()
    assert inner.cancelled == [1]


async def test_an_answer_nobody_got_is_unpinned(inner: FakePrefill, prefill: IdempotentPrefill) -> None:
    """The caller went away in the very moment the answer was there."""
    waiting = await started(inner, prefill, JOB)
    inner.on_done = waiting.cancel
    inner.go.set()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    await prefill.close()
    assert len(inner.leases) == 0
    assert len(inner.freed) == 1


async def test_the_answer_is_remembered_as_long_as_its_blocks(inner: FakePrefill, prefill: IdempotentPrefill) -> None:
    inner.go.set()
    first = await prefill.prefill(JOB)
    assert await prefill.prefill(JOB) is first
    inner.leases.release("r1", last_epoch(1), committed=True)
    assert await prefill.prefill(JOB) is not first
    assert len(inner.calls) == 2


async def test_a_failed_attempt_may_be_tried_again(inner: FakePrefill, prefill: IdempotentPrefill) -> None:
    def exhausted() -> None:
        raise KvExhausted("no blocks")

    inner.go.set()
    inner.fail = exhausted
    with pytest.raises(KvExhausted):
        await prefill.prefill(JOB)
    inner.fail = lambda: None
    assert (await prefill.prefill(JOB)).token_ids == (2,)


async def test_an_untyped_failure_shows_no_text(inner: FakePrefill, prefill: IdempotentPrefill) -> None:
    def broken() -> None:
        raise ZeroDivisionError("secret")

    inner.go.set()
    inner.fail = broken
    with pytest.raises(Internal) as failed:
        await prefill.prefill(JOB)
    assert "secret" not in failed.value.message


async def test_a_lower_attempt_is_fenced_off(inner: FakePrefill, prefill: IdempotentPrefill) -> None:
    inner.go.set()
    await prefill.prefill(replace(JOB, attempt=3))
    with pytest.raises(LeaseExpired, match="superseded by attempt 3"):
        await prefill.prefill(replace(JOB, attempt=2))
    assert len(inner.calls) == 1


async def test_other_work_under_the_same_id_is_done_anew(inner: FakePrefill, prefill: IdempotentPrefill) -> None:
    inner.go.set()
    first = await prefill.prefill(JOB)
    other = await prefill.prefill(replace(JOB, prompt=as_token_ids([9, 9])))
    assert other is not first
    assert len(inner.freed) == 1
    assert len(inner.leases) == 1


async def test_cancel_reaches_who_waits(inner: FakePrefill, prefill: IdempotentPrefill) -> None:
    waiting = await started(inner, prefill, replace(JOB, attempt=2))
    prefill.cancel("r1", 1)  # an older one: nothing of the kind runs
    await asyncio.sleep(0)
    assert not waiting.done()
    prefill.cancel("r1", 2)
    with pytest.raises(Cancelled):
        await waiting
    await prefill.close()
    assert inner.cancelled == [2]


async def test_close_ends_everything(inner: FakePrefill, prefill: IdempotentPrefill) -> None:
    waiting = await started(inner, prefill, JOB)
    await prefill.close()
    with pytest.raises(Cancelled):
        await waiting
    assert inner.cancelled == [1]


async def test_old_answers_are_forgotten_and_running_ones_are_not(
    inner: FakePrefill, prefill: IdempotentPrefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "REMEMBERED_ANSWERS", 3)
    running = await started(inner, prefill, replace(JOB, request_id="running"))
    inner.go.set()
    inner.go = asyncio.Event()
    inner.go.set()
    answers = [await prefill.prefill(replace(JOB, request_id=f"r{i}")) for i in range(5)]
    await running
    assert await prefill.prefill(replace(JOB, request_id="r4")) is answers[4]
    assert await prefill.prefill(replace(JOB, request_id="r0")) is not answers[0]
