"""KvTransferService as a receiver uses it."""

from __future__ import annotations

import logging

from sagellm_common.comm_backend.transcode import check_bridgeable
from sagellm_common.core.errors import DeadlineExceeded, PeerLost, PeerRestarted, SageError
from sagellm_common.core.types import BlockIds, KvLayout, KvPeer, KvSource, TokenIds, pack_int32
from sagellm_common.rpc import codec
from sagellm_common.rpc.channels import ChannelPool, call
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2, kv_pb2_grpc

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 2.0


class KvTransferClient:
    """`timeout_s` bounds each call to a source, unless it says otherwise."""

    def __init__(self, channels: ChannelPool, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._channels = channels
        self._timeout_s = timeout_s
        self._agreed: dict[str, tuple[str, KvLayout, KvLayout]] = {}
        """control address → incarnation of the source, our layout, its layout"""

    async def handshake(
        self,
        source: KvSource,
        *,
        worker_id: str,
        incarnation: str,
        layout: KvLayout,
    ) -> KvLayout:
        """The layout of `source`'s blocks, which is ours or can be transcoded: one call per incarnation, then none.

        `worker_id`, `incarnation` and `layout` are the caller's. Raises LayoutMismatch, ConfigError (another byte
        path), PeerLost (also when the source is silent, or was restarted since it handed the blocks out).
        """
        agreed = self._agreed.get(source.control_address)
        if agreed is not None and agreed[:2] == (source.incarnation, layout):
            return agreed[2]
        request = kv_pb2.HandshakeRequest(
            worker_id=worker_id, incarnation=incarnation, layout=codec.encode_layout(layout), backend=source.backend
        )
        stub = self._stub(source)
        try:
            response = await call(stub.Handshake, request, timeout_s=self._timeout_s, response=kv_pb2.HandshakeResponse)
        except DeadlineExceeded as err:
            # Not the request's deadline, which the router would take it for.
            raise PeerLost(
                f"transfer {source.transfer_id!r}: worker {source.worker_id!r} was silent for {self._timeout_s:g} s"
            ) from err
        theirs = codec.decode_layout(response.layout)
        check_bridgeable(layout, theirs, worker_id, source.worker_id)
        if response.incarnation != source.incarnation:
            raise PeerRestarted(
                f"worker {source.worker_id!r} was restarted: the blocks of transfer {source.transfer_id!r} are gone"
            )
        self._agreed[source.control_address] = source.incarnation, layout, theirs
        return theirs

    async def lend_cached(
        self,
        peer: KvPeer,
        token_ids: TokenIds,
        cache_salt: str,
        *,
        worker_id: str,
        layout: KvLayout,
        backend: str,
        timeout_s: float,
    ) -> tuple[KvSource, KvLayout] | None:
        """Leases what `peer` holds of these tokens, and tells the layout of its blocks; None for nothing.

        `worker_id`, `layout` and `backend` are the caller's, who pulls and releases the lease. Raises LayoutMismatch,
        ConfigError (another byte path), Draining, PeerLost, DeadlineExceeded.
        """
        request = kv_pb2.LendCachedRequest(
            token_ids=pack_int32(token_ids),
            cache_salt=cache_salt,
            worker_id=worker_id,
            layout=codec.encode_layout(layout),
            backend=backend,
        )
        stub = kv_pb2_grpc.KvTransferServiceStub(self._channels.get(peer.control_address))
        response = await call(stub.LendCached, request, timeout_s=timeout_s, response=kv_pb2.LendCachedResponse)
        if not response.HasField("source"):
            return None
        return codec.decode_kv_source(response.source), codec.decode_layout(response.layout)

    async def renew(self, source: KvSource) -> float:
        """Starts the lease's time anew; returns its seconds. Raises LeaseExpired, PeerLost, DeadlineExceeded."""
        request = kv_pb2.RenewLeaseRequest(transfer_id=source.transfer_id, epoch=source.epoch)
        stub = self._stub(source)
        response = await call(stub.RenewLease, request, timeout_s=self._timeout_s, response=kv_pb2.RenewLeaseResponse)
        return response.expires_in_ms / 1000

    async def release(self, source: KvSource, committed: bool) -> None:
        """Lets the source have its blocks back. A source out of reach is logged, not raised: its lease runs out."""
        request = kv_pb2.ReleaseLeaseRequest(transfer_id=source.transfer_id, epoch=source.epoch, committed=committed)
        try:
            stub = self._stub(source)
            await call(stub.ReleaseLease, request, timeout_s=self._timeout_s, response=kv_pb2.ReleaseLeaseResponse)
        except SageError as err:
            log.info(
                "transfer %s: worker %s keeps its lease until it runs out: %s",
                source.transfer_id,
                source.worker_id,
                err,
            )

    async def pull_rpc(self, source: KvSource, source_blocks: BlockIds, pair_id: str, timeout_s: float) -> bytes:
        """A `comm_backend.protocol.PullRpc`. Raises what `serve_pull` raises there, PeerLost, DeadlineExceeded."""
        request = kv_pb2.PullRequest(
            transfer_id=source.transfer_id,
            epoch=source.epoch,
            block_ids=pack_int32(source_blocks),
            pair_id=pair_id,
            backend=source.backend,
        )
        stub = self._stub(source)
        response = await call(stub.Pull, request, timeout_s=timeout_s, response=kv_pb2.PullResponse)
        return response.digests

    def _stub(self, source: KvSource) -> kv_pb2_grpc.KvTransferServiceStub:
        return kv_pb2_grpc.KvTransferServiceStub(self._channels.get(source.control_address))
