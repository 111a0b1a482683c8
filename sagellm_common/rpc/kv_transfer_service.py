"""KvTransferService: the control side of a handoff, served by whoever holds blocks that others pull."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.comm_backend.paths import PathsChannel
from sagellm_common.comm_backend.transcode import check_bridgeable
from sagellm_common.core import failpoints
from sagellm_common.core.errors import ConfigError, InvalidRequest
from sagellm_common.core.types import KvLayout, KvSource, TokenIds
from sagellm_common.rpc import codec
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2, kv_pb2_grpc


class KvTransferServicer(kv_pb2_grpc.KvTransferServiceServicer):
    """Errors are raised as they are: the server's interceptor puts them on the wire.

    `lend` gives scratch blocks for a probe (`TransportControl.lend`), `lend_cached` those of a prompt
    (`CacheLender.lend`). `layout` None is for kv_store, which takes its layout from its clients and compares it in each
    of its own calls.
    """

    def __init__(
        self,
        source: HandoffSource,
        channel: PathsChannel,
        layout: KvLayout | None,
        worker_id: str,
        incarnation: str,
        lend: Callable[[int], tuple[KvSource, int]] | None = None,
        lend_cached: Callable[[TokenIds, str], KvSource | None] | None = None,
    ) -> None:
        self._source = source
        self._channel = channel
        self._layout = layout
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._lend = lend
        self._lend_cached = lend_cached

    async def Handshake(
        self,
        request: kv_pb2.HandshakeRequest,
        context: grpc.aio.ServicerContext[kv_pb2.HandshakeRequest, kv_pb2.HandshakeResponse],
    ) -> kv_pb2.HandshakeResponse:
        failpoints.hit("source.handshaking")
        theirs = codec.decode_layout(request.layout)
        check_backend(self._channel, request.backend)
        if self._layout is not None:
            check_bridgeable(self._layout, theirs, self._worker_id, request.worker_id)
        return kv_pb2.HandshakeResponse(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            layout=codec.encode_layout(self._layout or theirs),
            data_address=self._channel.address,
        )

    async def RenewLease(
        self,
        request: kv_pb2.RenewLeaseRequest,
        context: grpc.aio.ServicerContext[kv_pb2.RenewLeaseRequest, kv_pb2.RenewLeaseResponse],
    ) -> kv_pb2.RenewLeaseResponse:
        left_s = self._source.renew(request.transfer_id, request.epoch)
        return kv_pb2.RenewLeaseResponse(expires_in_ms=int(left_s * 1000))

    async def ReleaseLease(
        self,
        request: kv_pb2.ReleaseLeaseRequest,
        context: grpc.aio.ServicerContext[kv_pb2.ReleaseLeaseRequest, kv_pb2.ReleaseLeaseResponse],
    ) -> kv_pb2.ReleaseLeaseResponse:
        self._source.release(request.transfer_id, request.epoch, request.committed)
        return kv_pb2.ReleaseLeaseResponse()

    async def Pull(
        self,
        request: kv_pb2.PullRequest,
        context: grpc.aio.ServicerContext[kv_pb2.PullRequest, kv_pb2.PullResponse],
    ) -> kv_pb2.PullResponse:
        block_ids = codec.decode_block_ids(request.block_ids, "block_ids")
        channel = self._channel.serving(request.backend)
        digests = await channel.serve_pull(request.transfer_id, request.epoch, block_ids, request.pair_id)
        return kv_pb2.PullResponse(digests=digests)

    async def LendScratch(
        self,
        request: kv_pb2.LendScratchRequest,
        context: grpc.aio.ServicerContext[kv_pb2.LendScratchRequest, kv_pb2.LendScratchResponse],
    ) -> kv_pb2.LendScratchResponse:
        if self._lend is None:
            raise InvalidRequest(f"worker {self._worker_id!r} lends no scratch blocks")
        source, block_bytes = self._lend(request.num_bytes)
        return kv_pb2.LendScratchResponse(source=codec.encode_kv_source(source), block_bytes=block_bytes)

    async def LendCached(
        self,
        request: kv_pb2.LendCachedRequest,
        context: grpc.aio.ServicerContext[kv_pb2.LendCachedRequest, kv_pb2.LendCachedResponse],
    ) -> kv_pb2.LendCachedResponse:
        if self._lend_cached is None or self._layout is None:
            raise InvalidRequest(f"worker {self._worker_id!r} lends no cached blocks; a kv_store has `Get` for that")
        check_backend(self._channel, request.backend)
        check_bridgeable(self._layout, codec.decode_layout(request.layout), self._worker_id, request.worker_id)
        source = self._lend_cached(codec.decode_token_ids(request.token_ids), request.cache_salt)
        return kv_pb2.LendCachedResponse(
            source=codec.encode_kv_source(source) if source else None, layout=codec.encode_layout(self._layout)
        )


def check_backend(mine: PathsChannel, theirs: str) -> None:
    """Raises ConfigError when two sides would move bytes in different ways."""
    if not mine.serves(theirs):
        raise ConfigError(
            f"transport.backend is {mine.name!r} here and {theirs!r} at the peer; set one for the cluster"
        )
