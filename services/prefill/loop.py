"""The heart of the prefill service: allocate → fetch what others hold → announce → submit → tell the token → pin →
answer.

Who owns the blocks on the way, and so who frees them when the request ends there:

    allocate ── this request ── submit ── the engine ── last output ── this request ── pin ── the lease table
                    └ share ── the lease table, from the announcement on: decode pulls while the engine computes
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from sagellm_common.comm_backend import OverlapRule
from sagellm_common.comm_backend.handoff import HandoffSource, Party, last_epoch
from sagellm_common.core import failpoints
from sagellm_common.core.clock import Clock
from sagellm_common.core.errors import DeadlineExceeded
from sagellm_common.core.kv import Allocation
from sagellm_common.core.kv_progress import KvProgress
from sagellm_common.core.types import FinishReason, KvSource, WorkerRole
from sagellm_common.engines.base import Engine, EngineRequest, SequenceOutput
from sagellm_common.engines.limits import check_fits
from sagellm_common.engines.sequences import Sequences
from sagellm_common.kv_runtime.owned_blocks import OwnedBlocks
from sagellm_common.rpc.kv_source import describe_source
from sagellm_common.rpc.peer_fetch import PeerFetch
from sagellm_common.rpc.store_fetch import StoreFetch
from sagellm_common.rpc.worker_service import WorkerView
from services.prefill.fetch_costs import FetchCosts
from services.prefill.jobs import PrefillDone, PrefillJob


class PrefillLoop:
    """Computes prompts, in `sequences` of the engine. `store` None goes without a kv_store, `peers` without other
    workers' caches. `fetch_costs` None asks them for every prompt.

    Prompts whose KV is worth handing over meanwhile, says `overlap`, are announced before they are computed.
    """

    def __init__(
        self,
        engine: Engine,
        sequences: Sequences,
        leases: HandoffSource,
        worker: WorkerView,
        store: StoreFetch | None,
        clock: Clock,
        overlap: OverlapRule,
        fetch_costs: FetchCosts | None = None,
        peers: PeerFetch | None = None,
    ) -> None:
        self._engine = engine
        self._pool = engine.kv
        self._leases = leases
        self._worker = worker
        self._store = store
        self._clock = clock
        self._overlap = overlap
        self._fetch_costs = fetch_costs
        self._peers = peers
        self._sequences = sequences
        self._in_flight = 0

    def in_flight(self) -> int:
        return self._in_flight

    async def prefill(self, job: PrefillJob) -> PrefillDone:
        """Raises Draining, KvExhausted, InvalidRequest, ContextTooLong, DeadlineExceeded, EngineFailed."""
        self._worker.check_accepting(WorkerRole.PREFILL)
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
        allocation = self._pool.allocate(job.prompt, len(job.prompt), job.cache_salt, job.tenant)
        with OwnedBlocks(self._pool, allocation) as blocks:
            while blocks.allocation.more_below:
                await asyncio.to_thread(self._pool.bring_back, blocks.allocation, job.prompt, job.cache_salt)
            allocated = self._clock.now()
            store_tokens = await self._fetch(job, blocks.allocation)
            fetched = self._clock.now()
            done = PrefillDone(
                token_ids=(),
                cached_tokens=blocks.allocation.num_cached_tokens,
                store_tokens=store_tokens,
                queue_ms=(allocated - began) * 1e3,
                store_fetch_ms=(fetched - allocated) * 1e3,
                store_conversion=blocks.allocation.conversion,
                origins=blocks.allocation.origins,
            )
            epoch = self._leases.new_epoch(job.attempt)
            with self._announced(job, epoch, blocks.allocation) as progress:
                failpoints.hit("prefill.computing")
                outputs, finish_reason = await self._compute(job, blocks, progress)
                if self._fetch_costs is not None:
                    self._fetch_costs.computed(done.cached_tokens, len(job.prompt), self._clock.now() - fetched)
                done = replace(
                    done,
                    token_ids=tuple(token for output in outputs for token in output.token_ids),
                    logprobs=tuple(logprob for output in outputs for logprob in output.logprobs),
                    compute_ms=(self._clock.now() - fetched) * 1e3,
                    engine_ms=sum(output.engine_s for output in outputs) * 1e3,
                )
                if finish_reason is not None:
                    return replace(done, finish_reason=finish_reason)
                done = replace(done, source=self._pin(job, epoch, blocks))
                if progress is not None:
                    progress.complete()
            failpoints.hit("prefill.pinned")
            return done

    async def _fetch(self, job: PrefillJob, allocation: Allocation) -> int:
        """Fills blocks with what another worker or the kv_stores hold, where that is worth it; the number of tokens
        gained from the stores. The plan names a worker where it holds more than these."""
        if await self._fetch_from_peer(job, allocation):
            return 0
        return await self._fetch_from_store(job, allocation)

    async def _fetch_from_peer(self, job: PrefillJob, allocation: Allocation) -> int:
        peer, cached, costs = job.peer, allocation.num_cached_tokens, self._fetch_costs
        if self._peers is None or peer is None or cached >= (end := self._peers.end_token(job.prompt, peer)):
            return 0
        if costs is not None and not costs.worth_asking(job.request_id, cached, end, peer.worker_id):
            return 0
        began = self._clock.now()
        gained = await self._peers.fetch(
            job.request_id,
            job.prompt,
            allocation,
            peer,
            timeout_s=job.timeout_s,
            cache_salt=job.cache_salt,
            priority=job.priority,
        )
        if costs is not None:
            costs.fetched(cached, cached + gained, self._clock.now() - began, peer.worker_id)
        return gained

    async def _fetch_from_store(self, job: PrefillJob, allocation: Allocation) -> int:
        size, cached = self._pool.layout.block_size_tokens, allocation.num_cached_tokens
        end = (len(job.prompt) - 1) // size * size
        costs = self._fetch_costs
        if self._store is None or cached >= end:
            return 0
        if costs is not None and not costs.worth_asking(job.request_id, cached, end):
            return 0
        began = self._clock.now()
        gained = await self._store.fetch(
            job.request_id,
            job.prompt,
            allocation,
            timeout_s=job.timeout_s,
            cache_salt=job.cache_salt,
            priority=job.priority,
        )
        if costs is not None:
            costs.fetched(cached, cached + gained, self._clock.now() - began)
        return gained

    @contextmanager
    def _announced(self, job: PrefillJob, epoch: int, allocation: Allocation) -> Iterator[KvProgress | None]:
        """For the time of the block the prompt's KV can be pulled as far as it is computed; None: not worth it."""
        if job.announce is None or not self._worth_pulling_ahead(job):
            yield None
            return
        size, num_tokens = self._pool.layout.block_size_tokens, len(job.prompt)
        progress = KvProgress(num_tokens, allocation.num_cached_tokens, size, job.segment_bytes)
        with ExitStack() as lease:
            with OwnedBlocks(self._pool, self._pool.share(allocation)) as shared:
                computing = self._leases.computing(job.request_id, epoch, shared.allocation, progress)
                pinned = lease.enter_context(computing)
                shared.hand_over()
            job.announce(self._describe(job, epoch, pinned, num_tokens, tokens_ready=allocation.num_cached_tokens))
            yield progress

    def _worth_pulling_ahead(self, job: PrefillJob) -> bool:
        if not self._more_to_decode(job):
            return False
        layout = self._pool.layout
        num_blocks = -(-len(job.prompt) // layout.block_size_tokens)
        missing = num_blocks - job.receiver_cached_tokens // layout.block_size_tokens
        return missing > 0 and self._overlap.worth(missing * layout.block_bytes, job.overlap)

    async def _compute(
        self, job: PrefillJob, blocks: OwnedBlocks, progress: KvProgress | None
    ) -> tuple[list[SequenceOutput], FinishReason | None]:
        """Runs the prompt through the engine and takes its blocks back; None when there is more to decode."""
        sampling = job.sampling
        request = EngineRequest(
            request_id=f"{job.request_id}/{job.attempt}",
            token_ids=job.prompt,
            sampling=replace(sampling, max_new_tokens=1, min_new_tokens=min(1, sampling.min_new_tokens)),
            cache_salt=job.cache_salt,
            tenant=job.tenant,
            priority=job.priority,
            timeout_s=job.timeout_s,
            hold_blocks=True,
            progress=progress,
            chunk_tokens=job.chunk_tokens,
            first_token_within_s=job.first_token_within_s,
            needed_s=job.needed_s,
        )
        outputs: list[SequenceOutput] = []

        def take(output: SequenceOutput) -> None:
            outputs.append(output)
            if job.tell_token is not None and self._goes_on(job, output):
                job.tell_token(output.token_ids, output.logprobs)

        last = await self._sequences.run(request, blocks, take)
        return outputs, None if self._goes_on(job, last) else last.finish_reason

    def _goes_on(self, job: PrefillJob, last: SequenceOutput) -> bool:
        return last.finish_reason is FinishReason.LENGTH and self._more_to_decode(job)

    def _more_to_decode(self, job: PrefillJob) -> bool:
        """The engine reports LENGTH because it was asked for one token; the request may well want more."""
        wants_more = job.sampling.max_new_tokens > 1
        return wants_more and len(job.prompt) + 1 < self._engine.model.context_length_tokens

    def _pin(self, job: PrefillJob, epoch: int, blocks: OwnedBlocks) -> KvSource:
        """The lease table owns the blocks from here on: until decode has pulled them, or the lease runs out."""
        num_tokens = blocks.allocation.num_cached_tokens
        pinned = self._leases.pin(job.request_id, epoch, blocks.allocation, num_tokens)
        blocks.hand_over()
        return self._describe(job, epoch, pinned, num_tokens)

    def _describe(
        self, job: PrefillJob, epoch: int, pinned: Allocation, num_tokens: int, tokens_ready: int | None = None
    ) -> KvSource:
        return describe_source(
            self._worker.record,
            self._pool.layout,
            transfer_id=job.request_id,
            epoch=epoch,
            block_ids=pinned.block_ids,
            num_tokens=num_tokens,
            lease_ttl_s=self._leases.ttl_s,
            tokens_ready=tokens_ready,
        )

    def cancel(self, request_id: str, attempt: int, by: Party = "router") -> None:
        """Unpins what waits to be pulled. (A call that still runs is cancelled by cancelling it.)"""
        self._leases.release(request_id, last_epoch(attempt), committed=False, by=by)
