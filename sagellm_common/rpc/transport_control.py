"""The transport of a running worker, as its control plane sees it: links measured, settings changed, scratch lent.

target   ProbeLinks ──► LendScratch ──────────────► source: a few blocks, leased
                        pull, a few times ◄═══════► over the byte path that KV takes
                        ReleaseLease ─────────────►
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.comm_backend.links import best_per_source, changed_noticeably, to_target
from sagellm_common.comm_backend.paths import Choice, PathsChannel
from sagellm_common.comm_backend.protocol import Pull
from sagellm_common.core.errors import InvalidRequest, KvExhausted, SageError
from sagellm_common.core.kv import KvRegion
from sagellm_common.core.topology import LinkCost
from sagellm_common.core.types import BlockIds, KvSource, WorkerRecord
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol
from sagellm_common.rpc import codec
from sagellm_common.rpc.channels import ChannelPool, call
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2, kv_pb2_grpc
from sagellm_common.rpc.kv_source import describe_source
from sagellm_common.rpc.kv_transfer_client import KvTransferClient

log = logging.getLogger(__name__)

PROBE_BYTES = 4 << 20
MAX_PROBE_BYTES = 64 << 20
"""Of one pull; a probe makes SMALL_REPEATS of one block and 2 x REPEATS of this many bytes."""
MAX_POOL_SHARE = 16
"""A probe takes no more than this part of the source's blocks: one in 16, but at least one."""
REPEATS = 3
SMALL_REPEATS = 6
PROBE_TIMEOUT_S = 5.0
"""Of the probe of one link, whatever it waits for."""
EPOCH = 1


class TransportControl:
    """Of the worker that `record` tells of. `pool` is where scratch blocks come from."""

    def __init__(self, channel: PathsChannel, pool: KVBackendProtocol, leases: HandoffSource) -> None:
        self._channel = channel
        self._pool = pool
        self._leases = leases
        self._published: dict[str, LinkCost] = {}
        self._one_at_a_time = asyncio.Lock()

    # ---- settings ----

    @property
    def settings(self) -> Mapping[str, str]:
        return self._channel.settings.in_force()

    def set(self, settings: Mapping[str, str]) -> None:
        """Raises ConfigError, having changed nothing."""
        before = self._channel.settings.in_force()
        self._channel.settings.set(settings)
        for key, value in self._channel.settings.in_force().items():
            if value != before[key]:
                log.info("transport.%s is %s from now on, was %s", key, value, before[key])

    def changes(self) -> list[tuple[str, str, str]]:
        """(key, loaded, now) of what is no longer as it was loaded."""
        return [(change.key, change.loaded, change.now) for change in self._channel.settings.changes()]

    # ---- source ----

    def lend(self, record: WorkerRecord, num_bytes: int) -> tuple[KvSource, int]:
        """Scratch blocks under a lease of their own, and the size of one. What they hold means nothing.

        Raises InvalidRequest, KvExhausted: probes take from the free and the coldest blocks, never from requests.
        """
        if not 0 < num_bytes <= MAX_PROBE_BYTES:
            raise InvalidRequest(f"num_bytes is {num_bytes}, but must be 1 to {MAX_PROBE_BYTES}")
        memory = self._pool.regions()
        if not memory.num_blocks:
            raise KvExhausted(f"worker {record.worker_id} has no KV memory yet: its first blocks bring it")
        num_blocks = max(1, min(num_bytes // memory.block_bytes, memory.num_blocks // MAX_POOL_SHARE))
        layout = self._pool.layout
        num_tokens = num_blocks * layout.block_size_tokens
        nonce = secrets.token_hex(8)
        # A salt of its own: no block of the prefix cache is hit.
        allocation = self._pool.allocate(np.zeros(num_tokens, dtype=np.int32), num_tokens, f"probe:{nonce}")
        try:
            self._leases.pin(f"probe:{nonce}", EPOCH, allocation, num_tokens)
        except BaseException:
            self._pool.free(allocation)
            raise
        source = describe_source(
            record,
            layout,
            transfer_id=f"probe:{nonce}",
            epoch=EPOCH,
            block_ids=allocation.block_ids,
            num_tokens=num_tokens,
            lease_ttl_s=self._leases.ttl_s,
        )
        return source, memory.block_bytes

    # ---- target ----

    async def probe(
        self, record: WorkerRecord, sources: Sequence[WorkerRecord], max_bytes: int
    ) -> tuple[list[LinkCost], list[str]]:
        """Measures the links from `sources` to this worker, one after the other; (costs, why some have none)."""
        if not 0 <= max_bytes <= MAX_PROBE_BYTES:
            raise InvalidRequest(f"max_bytes is {max_bytes}, but must be 0 (the default) to {MAX_PROBE_BYTES}")
        links, failures = [], []
        async with self._one_at_a_time, ChannelPool() as channels:
            for source in sources:
                try:
                    async with asyncio.timeout(PROBE_TIMEOUT_S):
                        links.append(await self._probe(channels, record, source, max_bytes or PROBE_BYTES))
                except TimeoutError:
                    failures.append(f"{source.worker_id} → {record.worker_id}: not within {PROBE_TIMEOUT_S:g} s")
                except SageError as err:
                    failures.append(f"{source.worker_id} → {record.worker_id}: {err.reason} {err.message}")
        return links, failures

    async def _probe(
        self, channels: ChannelPool, record: WorkerRecord, source: WorkerRecord, max_bytes: int
    ) -> LinkCost:
        stub = kv_pb2_grpc.KvTransferServiceStub(channels.get(source.address))
        response = await call(
            stub.LendScratch,
            kv_pb2.LendScratchRequest(num_bytes=max_bytes),
            timeout_s=PROBE_TIMEOUT_S,
            response=kv_pb2.LendScratchResponse,
        )
        lent = codec.decode_kv_source(response.source)
        try:
            choice = self._channel.choices(lent)[0]
            measured = await _measure(self._channel, choice, response.block_bytes)
        finally:
            # Through a cancellation, too: else the blocks would be held until their lease ends.
            await asyncio.shield(KvTransferClient(channels).release(lent, committed=True))
        self._channel.links.set_probed(source.worker_id, choice.path.backend, measured)
        known = self._channel.links.find(source.worker_id, choice.path.backend)
        assert known is not None
        return to_target(known, record.worker_id)

    def unpublished(self, record: WorkerRecord, present: Sequence[str]) -> list[LinkCost]:
        """What others should hear of links from the workers that are `present`; counted as told."""
        self._channel.links.keep(present)
        self._published = {source_id: link for source_id, link in self._published.items() if source_id in present}
        news = [
            to_target(link, record.worker_id)
            for link in best_per_source(self._channel.links.all())
            if changed_noticeably(self._published.get(link.source_id), link)
        ]
        self._published |= {link.source_id: link for link in news}
        return news


async def _measure(channel: PathsChannel, choice: Choice, block_bytes: int) -> LinkCost:
    """Raises what a pull raises. The fastest of a few pulls counts: what was slower had to share."""
    blocks = choice.source.block_table
    scratch = KvRegion(np.empty(len(blocks) * block_bytes, np.uint8).data, block_bytes, len(blocks))
    targets = np.arange(len(blocks), dtype=np.int32)
    pulls = 0

    async def fastest_s(num_blocks: int, repeats: int, per_message: int) -> float:
        nonlocal pulls
        best_s = math.inf
        for _ in range(repeats):
            pulls += 1
            best_s = min(best_s, await _pull_s(channel, choice, blocks[:num_blocks], targets, scratch, per_message))
        return best_s

    many = len(blocks)
    one_s = await fastest_s(1, SMALL_REPEATS, many)  # the first of them also connects
    whole_s = await fastest_s(many, REPEATS, many)
    apart_s = await fastest_s(many, REPEATS, 1)
    moved_bytes = (many - 1) * block_bytes
    if many > 1 and whole_s > one_s:
        per_byte_s = (whole_s - one_s) / moved_bytes
        latency_s = max(0.0, one_s - per_byte_s * block_bytes)
    else:  # a single block: no telling latency and bandwidth apart
        per_byte_s, latency_s = one_s / block_bytes, 0.0
    per_message_s = max(0.0, apart_s - whole_s) / (many - 1) if many > 1 else 0.0
    return LinkCost(
        choice.source.worker_id,
        "",
        choice.path.backend,
        latency_s,
        1 / per_byte_s,
        per_message_s,
        time.time(),
        samples=pulls,
    )


async def _pull_s(
    channel: PathsChannel,
    choice: Choice,
    blocks: BlockIds,
    targets: BlockIds,
    scratch: KvRegion,
    blocks_per_message: int,
) -> float:
    transfer_id = choice.source.transfer_id
    channel.messages.force(transfer_id, blocks_per_message)
    try:
        result = await choice.path.channel.pull(
            Pull(
                replace(choice.source, block_table=blocks),
                blocks,
                targets[: len(blocks)],
                timeout_s=PROBE_TIMEOUT_S,
                into=scratch,
            )
        )
    finally:
        channel.messages.force(transfer_id, 0)
    return max(result.seconds, 1e-9)
