"""The heart of the prefill service: allocate → fetch what the store holds → submit → pin → answer.

Who owns the blocks on the way, and so who frees them when the request ends there:

    allocate ── this request ── submit ── the engine ── last output ── this request ── pin ── the lease table
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.core import failpoints
from sagellm_common.core.clock import Clock
from sagellm_common.core.errors import DeadlineExceeded, Draining
from sagellm_common.core.types import FinishReason, KvSource, TokenLogprob
from sagellm_common.engines.base import Engine, EngineRequest, SequenceOutput
from sagellm_common.engines.limits import check_fits
from sagellm_common.kv_runtime.owned_blocks import OwnedBlocks
from sagellm_common.rpc.kv_source import describe_source
from sagellm_common.rpc.worker_service import Load, WorkerView
from services.prefill.jobs import PrefillDone, PrefillJob
from services.prefill.store_fetch import StoreFetch


@dataclass(slots=True, eq=False)
class _Sequence:
    """What the engine has said of one sequence so far. `last` gets the output that ends it."""

    last: asyncio.Future[SequenceOutput]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class PrefillLoop:
    """Computes prompts. `on_step` is the engine's callback; `store` None goes without a kv_store."""

    def __init__(
        self,
        engine: Engine,
        leases: HandoffSource,
        worker: WorkerView,
        store: StoreFetch | None,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._pool = engine.kv
        self._leases = leases
        self._worker = worker
        self._store = store
        self._clock = clock
        self._sequences: dict[str, _Sequence] = {}
        self._numbers = itertools.count()
        self._in_flight = 0

    async def prefill(self, job: PrefillJob) -> PrefillDone:
        """Raises Draining, KvExhausted, InvalidRequest, ContextTooLong, DeadlineExceeded, EngineFailed."""
        self._worker.check_accepting()
        check_fits(self._engine, job.prompt)
        self._in_flight += 1
        try:
            async with asyncio.timeout(job.timeout_s):
                return await self._prefill(job)
        except TimeoutError:
            raise DeadlineExceeded(
                f"request {job.request_id}: prefill did not finish within its {job.timeout_s:g} s"
            ) from None
        finally:
            self._in_flight -= 1

    async def _prefill(self, job: PrefillJob) -> PrefillDone:
        began = self._clock.now()
        with OwnedBlocks(self._pool, self._pool.allocate(job.prompt, len(job.prompt), job.cache_salt)) as blocks:
            allocated = self._clock.now()
            store_tokens = await self._store.fetch(job, blocks.allocation) if self._store else 0
            fetched = self._clock.now()
            done = PrefillDone(
                token_ids=(),
                cached_tokens=blocks.allocation.num_cached_tokens,
                store_tokens=store_tokens,
                queue_ms=(allocated - began) * 1e3,
                store_fetch_ms=(fetched - allocated) * 1e3,
            )
            failpoints.hit("prefill.computing")
            sequence, finish_reason = await self._compute(job, blocks)
            done = replace(
                done,
                token_ids=tuple(sequence.token_ids),
                logprobs=tuple(sequence.logprobs),
                compute_ms=(self._clock.now() - fetched) * 1e3,
            )
            if finish_reason is not None:
                return replace(done, finish_reason=finish_reason)
            done = replace(done, source=self._pin(job, blocks))
            failpoints.hit("prefill.pinned")
            return done

    async def _compute(self, job: PrefillJob, blocks: OwnedBlocks) -> tuple[_Sequence, FinishReason | None]:
        """Runs the prompt through the engine and takes its blocks back; None when there is more to decode."""
        # Numbered, for a cancelled sequence may still be in the engine when its request comes again.
        engine_id = f"{job.request_id}/{job.attempt}#{next(self._numbers)}"
        sampling = job.sampling
        request = EngineRequest(
            request_id=engine_id,
            token_ids=job.prompt,
            sampling=replace(sampling, max_new_tokens=1, min_new_tokens=min(1, sampling.min_new_tokens)),
            allocation=blocks.allocation,
            cache_salt=job.cache_salt,
            hold_blocks=True,
        )
        sequence = _Sequence(asyncio.get_running_loop().create_future())
        self._sequences[engine_id] = sequence
        try:
            self._engine.submit(request)
        except BaseException:
            del self._sequences[engine_id]
            raise
        blocks.hand_over()
        try:
            output = await sequence.last
        except asyncio.CancelledError:
            # Either the engine has just let go and the blocks are ours again, or `on_step` frees them once it does.
            if sequence.last.cancelled():
                self._engine.cancel(engine_id)
            else:
                blocks.take(sequence.last.result().held)
            raise
        blocks.take(output.held)
        if output.error is not None:
            raise output.error
        if output.finish_reason is FinishReason.CANCELLED:
            raise Draining(f"request {job.request_id}: the engine of this worker was stopped")
        if output.finish_reason is FinishReason.LENGTH and self._more_to_decode(job):
            return sequence, None
        return sequence, output.finish_reason

    def _more_to_decode(self, job: PrefillJob) -> bool:
        """The engine reports LENGTH because it was asked for one token; the request may well want more."""
        wants_more = job.sampling.max_new_tokens > 1
        return wants_more and len(job.prompt) + 1 < self._engine.model.context_length_tokens

    def _pin(self, job: PrefillJob, blocks: OwnedBlocks) -> KvSource:
        """The lease table owns the blocks from here on: until decode has pulled them, or the lease runs out."""
        num_tokens = blocks.allocation.num_cached_tokens
        pinned = self._leases.pin(job.request_id, job.attempt, blocks.allocation, num_tokens)
        blocks.hand_over()
        return describe_source(
            self._worker.record,
            self._pool.layout,
            transfer_id=job.request_id,
            epoch=job.attempt,
            block_ids=pinned.block_ids,
            num_tokens=num_tokens,
            lease_ttl_s=self._leases.ttl_s,
        )

    def cancel(self, request_id: str, attempt: int) -> None:
        """Unpins what waits to be pulled. (A call that still runs is cancelled by cancelling it.)"""
        self._leases.release(request_id, attempt, committed=False)

    def on_step(self, outputs: Sequence[SequenceOutput]) -> None:
        """The engine's callback: collects tokens, and wakes whoever waits when a sequence ends."""
        for output in outputs:
            sequence = self._sequences[output.request_id]
            sequence.token_ids += output.token_ids
            sequence.logprobs += output.logprobs
            if output.finish_reason is None:
                continue
            del self._sequences[output.request_id]
            if not sequence.last.cancelled():
                sequence.last.set_result(output)
            elif output.held is not None:
                self._pool.free(output.held)

    def load(self) -> Load:
        running = self._engine.stats().running
        return Load(
            running_requests=running,
            waiting_requests=max(0, self._in_flight - running),
            pinned_transfers=len(self._leases),
        )
