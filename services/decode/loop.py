"""The heart of the decode service: reserve → pull (ahead of the call, or in it) → commit → submit → stream → offload,
or hand over.

Without a prefill worker to pull from: allocate → fetch what the kv_stores hold → submit, which computes the rest.

Who owns the blocks on the way, and so who frees them when the request ends there:

    reserve ── the reservations ── claim ── this request ── submit ── the engine ── last output ── this request
                    └ pull_ahead ── written ── take ┘          offload, hand over ── the lease table ◄──┘
"""

from __future__ import annotations

import asyncio
import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import xxhash

from sagellm_common.comm_backend.handoff import HandoffSource, HandoffTarget, Party, last_epoch
from sagellm_common.core import failpoints
from sagellm_common.core.errors import DeadlineExceeded, InvalidRequest, KvExhausted, LeaseExpired
from sagellm_common.core.telemetry import span
from sagellm_common.core.types import (
    FinishReason,
    HandoffTicket,
    KvOrigins,
    KvSource,
    TokenIds,
    WorkerRole,
    pack_int32,
)
from sagellm_common.engines.base import Engine, EngineRequest, SequenceOutput
from sagellm_common.engines.limits import check_fits
from sagellm_common.engines.sequences import Sequences
from sagellm_common.kv_runtime.owned_blocks import OwnedBlocks
from sagellm_common.rpc.kv_source import describe_source
from sagellm_common.rpc.store_fetch import StoreFetch
from sagellm_common.rpc.worker_service import WorkerView
from services.decode.ahead import PullsAhead
from services.decode.jobs import (
    DecodeChunk,
    DecodeJob,
    Emit,
    HandedOver,
    PromptKv,
    PullAheadJob,
    ReserveJob,
    Transfer,
)
from services.decode.offload import Offloader
from services.decode.pull import KvPuller
from services.decode.running import RunningRequests


class _Tokens:
    """Passes a sequence's new tokens on, numbered, and keeps them. The first chunk says where the prompt's KV came
    from."""

    def __init__(self, num_emitted: int, found: Transfer | PromptKv | None, emit: Emit) -> None:
        self.new: list[int] = []
        self._num_emitted = num_emitted
        self._transfer = found if isinstance(found, Transfer) else None
        self._prompt_kv = found if isinstance(found, PromptKv) else None
        self._emit = emit
        self._engine_s = 0.0

    def take(self, output: SequenceOutput) -> None:
        self._engine_s += output.engine_s
        well = output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        if not output.token_ids and not well:
            return
        index, reason = self._num_emitted + len(self.new), output.finish_reason if well else None
        engine_ms = self._engine_s * 1e3 if well else 0.0
        found = self._transfer, self._prompt_kv
        self._emit(DecodeChunk(index, output.token_ids, output.logprobs, reason, *found, engine_ms))
        self._transfer = self._prompt_kv = None
        self.new += output.token_ids
        failpoints.hit("decode.streaming")

    def hand_over(self, source: KvSource | None) -> None:
        """These were the last ones here."""
        index, found = self._num_emitted + len(self.new), (self._transfer, self._prompt_kv)
        handed_over = HandedOver(source)
        self._emit(DecodeChunk(index, (), (), FinishReason.CANCELLED, *found, self._engine_s * 1e3, handed_over))


class DecodeLoop:
    """Generates tokens, in `sequences` of the engine. `offload` and `fetch` None go without a kv_store."""

    def __init__(
        self,
        engine: Engine,
        sequences: Sequences,
        reservations: HandoffTarget,
        leases: HandoffSource,
        worker: WorkerView,
        puller: KvPuller,
        aheads: PullsAhead,
        offload: Offloader | None,
        fetch: StoreFetch | None = None,
    ) -> None:
        self._engine = engine
        self._pool = engine.kv
        self._reservations = reservations
        self._leases = leases
        self._worker = worker
        self._puller = puller
        self._aheads = aheads
        self._offload = offload
        self._fetch = fetch
        self._running = RunningRequests()
        self._sequences = sequences

    def in_flight(self) -> int:
        return len(self._running)

    # ---- the handoff's first step ----

    def reserve(self, job: ReserveJob) -> HandoffTicket:
        """Raises Draining, KvExhausted, InvalidRequest, ContextTooLong, LeaseExpired (for an older attempt)."""
        self._worker.check_accepting(WorkerRole.DECODE)
        known = _known_tokens(job)
        check_fits(self._engine, known)
        # A repeated call replaces what the first one took: the request id may have come back with another prompt.
        self.release(job.request_id, job.attempt)
        allocation = self._pool.allocate(known, len(known), job.cache_salt, job.tenant)
        with OwnedBlocks(self._pool, allocation) as blocks:
            subject = _subject(job)
            reserved = self._reservations.reserve(job.request_id, job.attempt, blocks.allocation, subject)
            blocks.hand_over()
        failpoints.hit("decode.reserved")
        record = self._worker.record
        return HandoffTicket(
            transfer_id=job.request_id,
            epoch=job.attempt,
            worker_id=record.worker_id,
            incarnation=record.incarnation,
            block_table=reserved.block_ids,
            num_cached_tokens=reserved.num_cached_tokens,
            expires_in_ms=round(self._reservations.ttl_s * 1e3),
        )

    def pull_ahead(self, job: PullAheadJob) -> None:
        self._aheads.start(job)

    def release(self, request_id: str, attempt: int, by: Party = "router") -> None:
        self._reservations.release(request_id, attempt, by)
        self._aheads.drop(request_id, attempt)

    def renew(self, request_id: str, attempt: int) -> float:
        return self._reservations.renew(request_id, attempt)

    def cancel(self, request_id: str, attempt: int, by: Party = "router") -> None:
        self.release(request_id, attempt, by)
        self._running.cancel(request_id, attempt, by)
        self._leases.release(request_id, last_epoch(attempt), committed=False, by=by)

    def hand_over(self, request_id: str, attempt: int) -> None:
        if self._running.hand_over(request_id, attempt):
            self._sequences.take_out(_engine_id(request_id, attempt))

    # ---- the rest of it ----

    async def decode(self, job: DecodeJob, emit: Emit) -> None:
        """Raises LeaseExpired, PeerLost, KvCorrupt, LayoutMismatch, KvExhausted, ContextTooLong, InvalidRequest,
        Draining, DeadlineExceeded, EngineFailed, Cancelled.
        """
        try:
            async with asyncio.timeout(job.timeout_s):
                with self._running.enter(job.request_id, job.attempt):
                    await self._decode(job, emit)
        except TimeoutError:
            raise DeadlineExceeded(
                f"request {job.request_id}: decode did not finish within its {job.timeout_s:g} s"
            ) from None

    async def _decode(self, job: DecodeJob, emit: Emit) -> None:
        with OwnedBlocks(self._pool) as blocks:
            found: Transfer | PromptKv | None
            with self._puller.lease(job.source) if job.source else nullcontext():
                if job.source is None:
                    self._claim(job, blocks)
                    found = await self._find(job, blocks)
                else:
                    found = await self._receive(job, job.source, blocks)
                    failpoints.hit("decode.pulled")
            failpoints.hit("decode.committed")
            tokens = _Tokens(len(job.emitted), found, emit)
            token_ids = await self._generate(job, blocks, tokens)
            if token_ids is None:
                tokens.hand_over(self._pin(job, blocks))
            elif self._offload is not None and blocks.held:
                self._offload.offer(job.request_id, job.attempt, token_ids, job.cache_salt, blocks, job.tenant)

    async def _find(self, job: DecodeJob, blocks: OwnedBlocks) -> PromptKv | None:
        """Has in `blocks` what this worker and the kv_stores hold of the known tokens; the engine computes the rest.

        None, and no blocks, where there is no memory: then the engine waits for it.
        """
        known = _known_tokens(job)
        if not blocks.held:
            try:
                blocks.take(self._pool.allocate(known, len(known), job.cache_salt, job.tenant))
            except KvExhausted:
                return None
        allocation = blocks.allocation
        while allocation.more_below:
            await asyncio.to_thread(self._pool.bring_back, allocation, known, job.cache_salt)
        began_s, gained = time.monotonic(), 0
        if self._fetch is not None:
            # Reserved blocks are the prompt's; those for emitted tokens come when it is submitted.
            within = len(allocation.block_ids) * self._pool.layout.block_size_tokens
            gained = await self._fetch.fetch(
                job.request_id,
                known[:within],
                allocation,
                timeout_s=job.timeout_s,
                cache_salt=job.cache_salt,
                priority=job.priority,
            )
        cached = min(allocation.num_cached_tokens, len(job.prompt))
        fetch_ms, gained = (time.monotonic() - began_s) * 1e3 if gained else 0.0, min(gained, cached)
        # Emitted tokens, too, were known; the report is on the prompt's.
        host, disk = min(allocation.origins.host_tokens, cached - gained), allocation.origins.store_disk_tokens
        origins = KvOrigins(host_tokens=host, store_disk_tokens=min(disk, gained))
        return PromptKv(cached, gained, fetch_ms, allocation.conversion, origins)

    async def _receive(self, job: DecodeJob, source: KvSource, blocks: OwnedBlocks) -> Transfer:
        """Has the prompt's KV in `blocks`: pulled ahead of this call, if that went well, or else by a pull now."""
        with span("transfer", request_id=job.request_id, source=source.worker_id, backend=source.backend) as current:
            began_s = time.monotonic()
            ahead = self._aheads.find(job.request_id, job.attempt)
            if ahead is not None:
                async with self._puller.renewed(source):
                    blocks.take(await self._aheads.take(ahead, _subject(job)))
            self._claim(job, blocks)
            transfer = ahead.transfer(source, len(job.prompt), blocks.allocation) if ahead is not None else None
            if transfer is None:
                transfer = await self._puller.pull(job, source, blocks.allocation)
            transfer = replace(transfer, exposed_ms=(time.monotonic() - began_s) * 1e3)
            self._puller.received(job, transfer)
            current.set_attributes(transfer.attributes())
            return transfer

    def _claim(self, job: DecodeJob, blocks: OwnedBlocks) -> None:
        """Takes the reserved blocks, unless they were pulled ahead and are ours already. Without a source they are
        optional, for the engine allocates what is missing."""
        # With what was generated elsewhere: a sequence that outgrew this pool would be tried again until its deadline.
        check_fits(self._engine, _known_tokens(job))
        if len(job.emitted) >= job.sampling.max_new_tokens:
            raise InvalidRequest(
                f"emitted_token_ids has {len(job.emitted)} tokens, which leaves nothing to generate of "
                f"sampling.max_new_tokens {job.sampling.max_new_tokens}"
            )
        if blocks.held:
            return
        try:
            blocks.take(self._reservations.claim(job.request_id, job.attempt, _subject(job)))
        except LeaseExpired:
            if job.source is not None:
                raise
            self._worker.check_accepting(WorkerRole.DECODE)

    async def _generate(self, job: DecodeJob, blocks: OwnedBlocks, tokens: _Tokens) -> TokenIds | None:
        """Streams the generation out of the engine; returns all tokens, and `blocks` has their KV if it is wanted.

        None, and `blocks` has what KV there is, when it is to go on elsewhere.
        """
        if self._running.handing_over(job.request_id):
            return None
        known = _known_tokens(job)
        request = EngineRequest(
            request_id=_engine_id(job.request_id, job.attempt),
            token_ids=known,
            sampling=job.sampling,
            num_emitted_tokens=len(job.emitted),
            cache_salt=job.cache_salt,
            tenant=job.tenant,
            priority=job.priority,
            timeout_s=job.timeout_s,
            hold_blocks=self._offload is not None,
            chunk_tokens=job.chunk_tokens,
        )
        last = await self._sequences.run(request, blocks, tokens.take)
        if last.finish_reason is FinishReason.CANCELLED:
            return None
        generated: TokenIds = np.concatenate([known, np.array(tokens.new, dtype=np.int32)])
        return generated

    def _pin(self, job: DecodeJob, blocks: OwnedBlocks) -> KvSource | None:
        """For whoever goes on with it to pull, as from a prefill worker. None: no KV is here."""
        if not blocks.held or not blocks.allocation.num_cached_tokens:
            return None
        num_tokens, epoch = blocks.allocation.num_cached_tokens, self._leases.new_epoch(job.attempt)
        pinned = self._leases.pin(job.request_id, epoch, blocks.allocation, num_tokens)
        blocks.hand_over()
        return describe_source(
            self._worker.record,
            self._pool.layout,
            transfer_id=job.request_id,
            epoch=epoch,
            block_ids=pinned.block_ids,
            num_tokens=num_tokens,
            lease_ttl_s=self._leases.ttl_s,
        )


def _subject(job: ReserveJob | DecodeJob) -> bytes:
    """What blocks are reserved for. Request ids are the clients': one may come again, with another prompt."""
    return xxhash.xxh3_128_digest(b"%b\0%b" % (job.cache_salt.encode(), pack_int32(job.prompt)))


def _engine_id(request_id: str, attempt: int) -> str:
    return f"{request_id}/{attempt}"


def _known_tokens(job: ReserveJob | DecodeJob) -> TokenIds:
    return np.concatenate([job.prompt, job.emitted]).astype(np.int32, copy=False)
