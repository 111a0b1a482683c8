"""KvStoreService on the wire: decode → KvStore → encode. The server's interceptor puts errors on the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from sagellm_common.core.errors import InvalidRequest
from sagellm_common.rpc import codec
from sagellm_common.rpc.block_journal import BlockJournal
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2, kv_pb2_grpc
from services.kv_store import block_log
from services.kv_store.loop import KvStore

DEFAULT_PUT_TIMEOUT_S = 10.0
"""For a caller that sets no deadline."""


class KvStoreServicer(kv_pb2_grpc.KvStoreServiceServicer):
    def __init__(self, store: KvStore, journal: BlockJournal) -> None:
        self._store = store
        self._journal = journal

    async def Lookup(
        self,
        request: kv_pb2.KvLookupRequest,
        context: grpc.aio.ServicerContext[kv_pb2.KvLookupRequest, kv_pb2.KvLookupResponse],
    ) -> kv_pb2.KvLookupResponse:
        hashes, layout = codec.decode_hashes(request.block_hashes), codec.decode_layout(request.layout)
        await self._store.settle(layout)
        wanted = codec.decode_extents(request.extents, len(hashes))
        num_blocks, stored = self._store.lookup(hashes, layout)
        return kv_pb2.KvLookupResponse(
            num_blocks=num_blocks,
            layout=codec.encode_layout(stored) if stored else None,
            extent_blocks=self._store.lookup_extents(hashes, wanted, layout),
        )

    async def Get(
        self,
        request: kv_pb2.KvGetRequest,
        context: grpc.aio.ServicerContext[kv_pb2.KvGetRequest, kv_pb2.KvGetResponse],
    ) -> kv_pb2.KvGetResponse:
        hashes = codec.decode_hashes(request.block_hashes)
        if request.HasField("recompute_cost"):
            self._store.recomputes_at(codec.decode_recompute_cost(request.recompute_cost))
        source = await self._store.get(
            hashes,
            codec.decode_token_ids(request.token_ids),
            codec.decode_layout(request.layout),
            request.backend,
            codec.decode_extents(request.extents, len(hashes)),
            codec.decode_contexts(request.contexts, len(hashes)),
        )
        if source is None:
            return kv_pb2.KvGetResponse()
        return kv_pb2.KvGetResponse(num_blocks=len(source.block_table), source=codec.encode_kv_source(source))

    async def Put(
        self,
        request: kv_pb2.KvPutRequest,
        context: grpc.aio.ServicerContext[kv_pb2.KvPutRequest, kv_pb2.KvPutResponse],
    ) -> kv_pb2.KvPutResponse:
        layout = codec.decode_layout(request.layout)
        hashes = codec.decode_hashes(request.block_hashes)
        result = await self._store.put(
            hashes,
            codec.decode_token_ids(request.token_ids),
            codec.decode_layout(request.stored_layout) if request.HasField("stored_layout") else layout,
            codec.decode_kv_source(request.source),
            layout,
            context.time_remaining() or DEFAULT_PUT_TIMEOUT_S,
            codec.decode_extents(request.extents, len(hashes)),
            request.tenant,
            codec.decode_contexts(request.contexts, len(hashes)),
        )
        return kv_pb2.KvPutResponse(
            num_stored=result.num_stored, num_present=result.num_present, bytes_pulled=result.bytes_pulled
        )

    async def Pin(
        self,
        request: kv_pb2.KvPinRequest,
        context: grpc.aio.ServicerContext[kv_pb2.KvPinRequest, kv_pb2.KvPinResponse],
    ) -> kv_pb2.KvPinResponse:
        if request.ttl_ms < 0:
            raise InvalidRequest(f"ttl_ms is {request.ttl_ms}, but must be at least 0 (0 unpins)")
        hashes = codec.decode_hashes(request.block_hashes)
        return kv_pb2.KvPinResponse(num_pinned=self._store.pin(hashes, request.ttl_ms / 1000))

    async def WatchBlocks(
        self,
        request: kv_pb2.WatchBlocksRequest,
        context: grpc.aio.ServicerContext[kv_pb2.WatchBlocksRequest, kv_pb2.WatchBlocksResponse],
    ) -> AsyncIterator[kv_pb2.WatchBlocksResponse]:
        """Lives as long as the caller wants it."""
        known = request.incarnation in ("", self._store.incarnation)
        async for changes in block_log.watch(self._journal, request.from_revision if known else 0):
            yield kv_pb2.WatchBlocksResponse(
                revision=changes.revision,
                since_revision=changes.since,
                snapshot=changes.snapshot,
                more=changes.more,
                tier=codec.encode_tier(changes.tier),
                stored_hashes=changes.stored,
                removed_hashes=changes.removed,
                age_ms=changes.age_s * 1e3,
            )
