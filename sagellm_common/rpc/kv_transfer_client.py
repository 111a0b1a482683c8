"""KvTransferService as a receiver uses it."""

from __future__ import annotations

import logging

from sagellm_common.core.errors import PeerLost, SageError
from sagellm_common.core.types import BlockIds, KvLayout, KvSource, pack_int32
from sagellm_common.rpc import codec
from sagellm_common.rpc.channels import ChannelPool, call
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2, kv_pb2_grpc
from sagellm_common.rpc.kv_transfer_service import check_layout

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 2.0


class KvTransferClient:
    def __init__(self, channels: ChannelPool) -> None:
        self._channels = channels
        self._agreed: dict[str, tuple[str, KvLayout]] = {}

    async def handshake(
        self,
        source: KvSource,
        *,
        worker_id: str,
        incarnation: str,
        layout: KvLayout,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        """Makes sure that `source`'s blocks fit ours: one call per incarnation of it, then none.

        `worker_id` and `incarnation` are the caller's. Raises LayoutMismatch, ConfigError (another byte path),
        PeerLost (also when the source was restarted since it handed the blocks out), DeadlineExceeded.
        """
        agreed = (source.incarnation, layout)
        if self._agreed.get(source.control_address) == agreed:
            return
        request = kv_pb2.HandshakeRequest(
            worker_id=worker_id, incarnation=incarnation, layout=codec.encode_layout(layout), backend=source.backend
        )
        stub = self._stub(source)
        response = await call(stub.Handshake, request, timeout_s=timeout_s, response=kv_pb2.HandshakeResponse)
        check_layout(layout, codec.decode_layout(response.layout), f"worker {response.worker_id!r}")
        if response.incarnation != source.incarnation:
            raise PeerLost(
                f"worker {source.worker_id!r} was restarted: the blocks of transfer {source.transfer_id!r} are gone"
            )
        self._agreed[source.control_address] = agreed

    async def renew(self, source: KvSource, *, timeout_s: float = CALL_TIMEOUT_S) -> float:
        """Starts the lease's time anew; returns its seconds. Raises LeaseExpired, PeerLost, DeadlineExceeded."""
        request = kv_pb2.RenewLeaseRequest(transfer_id=source.transfer_id, epoch=source.epoch)
        stub = self._stub(source)
        response = await call(stub.RenewLease, request, timeout_s=timeout_s, response=kv_pb2.RenewLeaseResponse)
        return response.expires_in_ms / 1000

    async def release(self, source: KvSource, committed: bool, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Lets the source have its blocks back. A source out of reach is logged, not raised: its lease runs out."""
        request = kv_pb2.ReleaseLeaseRequest(transfer_id=source.transfer_id, epoch=source.epoch, committed=committed)
        try:
            stub = self._stub(source)
            await call(stub.ReleaseLease, request, timeout_s=timeout_s, response=kv_pb2.ReleaseLeaseResponse)
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
            transfer_id=source.transfer_id, epoch=source.epoch, block_ids=pack_int32(source_blocks), pair_id=pair_id
        )
        stub = self._stub(source)
        response = await call(stub.Pull, request, timeout_s=timeout_s, response=kv_pb2.PullResponse)
        return response.digests

    def _stub(self, source: KvSource) -> kv_pb2_grpc.KvTransferServiceStub:
        return kv_pb2_grpc.KvTransferServiceStub(self._channels.get(source.control_address))
