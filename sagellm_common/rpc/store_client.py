"""kv_store as prefill and decode use it: worth a hit when it is there, worth no waiting when it is not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from sagellm_common.core.clock import Clock
from sagellm_common.core.errors import PeerLost, SageError
from sagellm_common.core.topology import TopologyStore
from sagellm_common.core.types import (
    BlockHash,
    KvLayout,
    KvSource,
    TokenIds,
    WorkerRecord,
    WorkerRole,
    WorkerState,
    pack_int32,
)
from sagellm_common.rpc import codec
from sagellm_common.rpc.channels import ChannelPool, call
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2, kv_pb2_grpc

log = logging.getLogger(__name__)

R = TypeVar("R")

GET_TIMEOUT_S = 0.5
RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class PutResult:
    num_stored: int
    num_present: int
    bytes_pulled: int


class StoreClient:
    """The cluster's kv_store, found through the topology.

    All calls raise PeerLost at once when there is no store or when it failed within the last RETRY_AFTER_S seconds:
    a store that is down costs one timeout a second, not one per request.
    """

    def __init__(
        self, channels: ChannelPool, topology: TopologyStore, layout: KvLayout, backend: str, clock: Clock
    ) -> None:
        self._channels = channels
        self._topology = topology
        self._layout = layout
        self._backend = backend
        self._clock = clock
        self._skip_until_s: dict[str, float] = {}
        self._layouts: dict[tuple[str, str], KvLayout] = {}
        """(worker id, incarnation) of the store → layout of its blocks."""

    @property
    def available(self) -> bool:
        return self._find() is not None

    def failed(self, worker_id: str) -> None:
        """Leaves this store alone for a while. For a failure outside these calls, such as that of a pull."""
        self._skip_until_s[worker_id] = self._clock.now() + RETRY_AFTER_S

    async def lookup(self, hashes: Sequence[BlockHash], layout: KvLayout, *, timeout_s: float = GET_TIMEOUT_S) -> int:
        """How many leading hashes, of blocks in `layout`, the store holds. Raises SageError."""
        request = kv_pb2.KvLookupRequest(block_hashes=codec.encode_hashes(hashes), layout=codec.encode_layout(layout))
        response = await self._call("Lookup", request, timeout_s, kv_pb2.KvLookupResponse)
        return response.num_blocks

    async def layout(self, *, timeout_s: float = GET_TIMEOUT_S) -> KvLayout | None:
        """That of the store's blocks, maybe of another size or dtype than ours; None while it has none. Asked for once.

        Raises LayoutMismatch for one that cannot be transcoded to ours, and any other SageError.
        """
        store = self._find()
        key = (store.worker_id, store.incarnation) if store else ("", "")
        if key not in self._layouts:
            request = kv_pb2.KvLookupRequest(layout=codec.encode_layout(self._layout))
            response = await self._call("Lookup", request, timeout_s, kv_pb2.KvLookupResponse)
            if not response.HasField("layout"):
                return None
            stored = codec.decode_layout(response.layout)
            if stored.dtype != self._layout.dtype:
                log.warning(
                    "kv_store keeps KV in %s, this worker in %s: what comes from it or goes to it is converted",
                    stored.dtype,
                    self._layout.dtype,
                )
            self._layouts = {key: stored}
        return self._layouts[key]

    async def get(
        self,
        hashes: Sequence[BlockHash],
        token_ids: TokenIds,
        layout: KvLayout,
        *,
        timeout_s: float = GET_TIMEOUT_S,
    ) -> KvSource | None:
        """Pins the leading blocks the store holds; None when it holds none. Raises SageError.

        `layout` is the store's. `token_ids` are those of the blocks, for the store to check its hits against. The
        caller pulls `source.block_table` and releases the lease.
        """
        request = kv_pb2.KvGetRequest(
            block_hashes=codec.encode_hashes(hashes),
            layout=codec.encode_layout(layout),
            backend=self._backend,
            token_ids=pack_int32(token_ids),
        )
        response = await self._call("Get", request, timeout_s, kv_pb2.KvGetResponse)
        return codec.decode_kv_source(response.source) if response.num_blocks else None

    async def put(
        self, hashes: Sequence[BlockHash], token_ids: TokenIds, source: KvSource, layout: KvLayout, *, timeout_s: float
    ) -> PutResult:
        """Has the store pull the blocks it lacks from `source`, whose lease the caller holds and releases.

        `layout` is the store's: hashes and token_ids are those of its blocks, from where source.block_table begins.
        Raises SageError.
        """
        request = kv_pb2.KvPutRequest(
            block_hashes=codec.encode_hashes(hashes),
            source=codec.encode_kv_source(source),
            layout=codec.encode_layout(self._layout),
            token_ids=pack_int32(token_ids),
            stored_layout=codec.encode_layout(layout),
        )
        response = await self._call("Put", request, timeout_s, kv_pb2.KvPutResponse)
        return PutResult(response.num_stored, response.num_present, response.bytes_pulled)

    def _find(self) -> WorkerRecord | None:
        """The first store by id, so that all workers use the same one."""
        now = self._clock.now()
        for worker in self._topology.snapshot().workers:
            if (
                worker.role is WorkerRole.KV_STORE
                and worker.state is WorkerState.SERVING
                and self._skip_until_s.get(worker.worker_id, now) <= now
            ):
                return worker
        return None

    async def _call(self, method: str, request: object, timeout_s: float, response: type[R]) -> R:
        worker = self._find()
        if worker is None:
            raise PeerLost("no kv_store is in reach")
        stub = kv_pb2_grpc.KvStoreServiceStub(self._channels.get(worker.address))
        try:
            return await call(getattr(stub, method), request, timeout_s=timeout_s, response=response)
        except SageError:
            self.failed(worker.worker_id)
            raise
