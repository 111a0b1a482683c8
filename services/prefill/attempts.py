"""request_id + attempt make prefill idempotent: the wire may repeat a call, the work happens once."""

from __future__ import annotations

import asyncio
import itertools
import logging
from dataclasses import dataclass

import xxhash

from sagellm_common.comm_backend.handoff import HandoffSource, Party
from sagellm_common.core.errors import Cancelled, Internal, LeaseExpired, SageError
from sagellm_common.core.types import pack_int32
from services.prefill.jobs import Prefill, PrefillDone, PrefillJob

log = logging.getLogger(__name__)

REMEMBERED_ANSWERS = 512


@dataclass(slots=True, eq=False)
class _Attempt:
    """`work` stands for the job: prompts are too long to be remembered with their answers."""

    request_id: str
    number: int
    work: bytes
    outcome: asyncio.Future[PrefillDone]
    task: asyncio.Task[None] | None = None
    waiters: int = 0

    def fail(self, err: SageError) -> None:
        """Whoever waits gets `err`, unless there is an answer already."""
        if not self.outcome.done():
            self.outcome.set_exception(err)

    def end(self, err: SageError) -> None:
        """As `fail`; and what runs is cancelled and gives everything back."""
        self.fail(err)
        if self.task is not None:
            self.task.cancel()


class IdempotentPrefill:
    """A repeated call gets the same answer, while it is computed and as long as its blocks stay pinned.

    A higher attempt cancels the lower one, a lower one raises LeaseExpired. An attempt that nobody waits for any more
    is cancelled.
    """

    def __init__(self, inner: Prefill, leases: HandoffSource) -> None:
        self._inner = inner
        self._leases = leases
        self._attempts: dict[str, _Attempt] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def prefill(self, job: PrefillJob) -> PrefillDone:
        attempt = self._attempt(job)
        attempt.waiters += 1
        try:
            return await asyncio.shield(attempt.outcome)
        except asyncio.CancelledError:
            if attempt.waiters == 1 and self._attempts.get(job.request_id) is attempt:
                self.cancel(job.request_id, job.attempt)
            raise
        finally:
            attempt.waiters -= 1

    def cancel(self, request_id: str, attempt: int, by: Party = "router") -> None:
        known = self._attempts.get(request_id)
        if known is not None and known.number <= attempt:
            del self._attempts[request_id]
            known.end(Cancelled(f"request {request_id} was cancelled"))
        self._inner.cancel(request_id, attempt, by)

    async def close(self) -> None:
        """Cancels what runs and waits until it has given everything back. Idempotent."""
        for attempt in self._attempts.values():
            attempt.end(Cancelled("this prefill worker was stopped"))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _attempt(self, job: PrefillJob) -> _Attempt:
        """The running or answered attempt this call is about, else a new one. Raises LeaseExpired."""
        known, work = self._attempts.pop(job.request_id, None), _fingerprint(job)
        if known is not None and self._alive(known):
            if known.number > job.attempt:
                self._attempts[job.request_id] = known
                raise LeaseExpired(
                    f"request {job.request_id} attempt {job.attempt} was superseded by attempt {known.number}"
                )
            if known.number == job.attempt and known.work == work:
                self._attempts[job.request_id] = known  # now the youngest
                return known
            known.end(LeaseExpired(f"request {job.request_id} attempt {known.number} was superseded"))
            self._inner.cancel(job.request_id, known.number)
        attempt = _Attempt(job.request_id, job.attempt, work, asyncio.get_running_loop().create_future())
        attempt.outcome.add_done_callback(_mark_retrieved)
        attempt.task = asyncio.create_task(self._run(job, attempt), name=f"prefill-{job.request_id}/{job.attempt}")
        self._tasks.add(attempt.task)
        attempt.task.add_done_callback(self._tasks.discard)
        self._attempts[job.request_id] = attempt
        self._forget_old_answers()
        return attempt

    def _alive(self, attempt: _Attempt) -> bool:
        """Whether its answer is still to come or still good."""
        if not attempt.outcome.done():
            return True
        if attempt.outcome.exception() is not None or (source := attempt.outcome.result().source) is None:
            return False
        try:
            self._leases.get(source.transfer_id, source.epoch)
        except LeaseExpired:
            return False
        return True

    async def _run(self, job: PrefillJob, attempt: _Attempt) -> None:
        try:
            done = await self._inner.prefill(job)
        except SageError as err:
            attempt.fail(err)
        except asyncio.CancelledError:
            attempt.fail(Cancelled(f"request {job.request_id} was cancelled"))
            raise
        except Exception:
            log.exception("prefill of request %s failed", job.request_id)
            attempt.fail(Internal(f"request {job.request_id}: internal error of the prefill worker, see its log"))
        else:
            if attempt.outcome.done():  # cancelled in the very moment it finished
                self._inner.cancel(job.request_id, job.attempt)
            else:
                attempt.outcome.set_result(done)

    def _forget_old_answers(self) -> None:
        surplus = len(self._attempts) - REMEMBERED_ANSWERS
        answered = (request_id for request_id, a in self._attempts.items() if a.outcome.done())
        for request_id in list(itertools.islice(answered, max(0, surplus))):
            del self._attempts[request_id]


def _fingerprint(job: PrefillJob) -> bytes:
    """Request ids are the clients': one may come back with another prompt."""
    digest = xxhash.xxh3_128(pack_int32(job.prompt))
    digest.update(repr((job.sampling, job.cache_salt)).encode())
    return digest.digest()


def _mark_retrieved(outcome: asyncio.Future[PrefillDone]) -> None:
    """An error nobody waits for any more is no news: asyncio would log it."""
    outcome.exception()
