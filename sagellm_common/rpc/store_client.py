"""The kv_stores as prefill and decode use them: worth a hit when they are there, worth no waiting when they are not.

Which store keeps what is the clients' knowledge (`prefix_reuse.sharding`): nobody is asked for it, and no store passes
a call on. Blocks are put to the `replicas` stores that are first in an extent's ranking, and looked for in one more:
so much does a ranking shift when a store has just joined.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from sagellm_common.core.clock import Clock
from sagellm_common.core.errors import LayoutMismatch, PeerLost, SageError
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
from sagellm_common.kv_policy.cost_benefit import RecomputeCost
from sagellm_common.prefix_reuse.sharding import Extent, ranked
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
    """The cluster's kv_stores, found through the topology. `worker_id` is that of who asks, for it to ask who is near.

    A store that fails is left alone for RETRY_AFTER_S seconds: being down it costs one timeout a second, not one per
    request. Calls raise PeerLost at once when there is none beside those.
    """

    def __init__(
        self,
        channels: ChannelPool,
        topology: TopologyStore,
        layout: KvLayout,
        backend: str,
        clock: Clock,
        *,
        replicas: int = 1,
        worker_id: str = "",
    ) -> None:
        self._channels = channels
        self._topology = topology
        self._layout = layout
        self._backend = backend
        self._clock = clock
        self._replicas = replicas
        self._worker_id = worker_id
        self._skip_until_s: dict[str, float] = {}
        self._layouts: dict[tuple[str, str], KvLayout] = {}
        """(worker id, incarnation) of a store → layout of its blocks."""
        self._busy: Counter[str] = Counter()
        self.recompute_cost: RecomputeCost | None = None
        """What computing takes here, for the stores to know what their blocks are worth; None: not known."""

    # ---- which stores ----

    @property
    def available(self) -> bool:
        return bool(self._live())

    @property
    def left_alone(self) -> bool:
        """Whether a store that serves failed a moment ago: what these calls say is not said of all stores then."""
        return len(self._live()) < len(self._serving())

    def failed(self, worker_id: str) -> None:
        """Leaves this store alone for a while. For a failure outside these calls, such as that of a pull."""
        self._skip_until_s[worker_id] = self._clock.now() + RETRY_AFTER_S

    def owners(self, extent: Extent) -> list[str]:
        """The stores that are to keep it, the first one first."""
        return ranked(extent.key, self._live())[: self._replicas]

    def nearest(self, store_ids: Sequence[str]) -> str:
        """Of these the one to read from: on this host; then who has the least to do for us; then the quickest link."""
        snapshot = self._topology.snapshot()
        me = snapshot.find(self._worker_id)
        links = {link.source_id: link.bytes_per_s for link in snapshot.links if link.target_id == self._worker_id}

        def distance(store_id: str) -> tuple[bool, int, float]:
            store = snapshot.find(store_id)
            remote = me is None or store is None or me.host_id != store.host_id
            return remote, self._busy[store_id], -links.get(store_id, 0.0)

        return min(store_ids, key=distance)

    @contextmanager
    def reading(self, store_id: str) -> Iterator[None]:
        """Counts as work for that store, for the time of the block."""
        self._busy[store_id] += 1
        try:
            yield
        finally:
            self._busy[store_id] -= 1

    # ---- what they hold ----

    async def layout(self, *, timeout_s: float = GET_TIMEOUT_S) -> KvLayout | None:
        """That of the stores' blocks, maybe of another size or dtype than ours; None while they have none.

        They should agree; where they do not, the first by id is right. Each is asked for it once. Raises LayoutMismatch
        for one that cannot be transcoded to ours, and the SageError of the store when there is just one.
        """
        stores = list(self._require().values())
        if not any(_key(store) in self._layouts for store in stores):
            await self._ask_all(
                {store.worker_id: kv_pb2.KvLookupRequest() for store in stores}, self._layout, timeout_s
            )
        return next((self._layouts[_key(store)] for store in stores if _key(store) in self._layouts), None)

    def first_layout(self) -> KvLayout:
        """For the stores' first blocks: all workers propose the same, that of the first decode worker of our model."""
        candidates = (
            record.model.kv_layout
            for record in self._topology.snapshot().workers
            if record.model is not None and record.role in (WorkerRole.DECODE, WorkerRole.BOTH)
        )
        mine = self._layout
        return next((theirs for theirs in candidates if theirs.model_fingerprint == mine.model_fingerprint), mine)

    async def locate(
        self,
        hashes: Sequence[BlockHash],
        wanted: Sequence[Extent],
        layout: KvLayout,
        *,
        timeout_s: float = GET_TIMEOUT_S,
    ) -> list[dict[str, int]]:
        """Per extent: how many of its leading blocks which stores hold, those without any left out.

        `hashes` are those of the whole sequence, in the stores' `layout`. A lone store is not asked: it is said to hold
        all, and a `get` tells. Stores that do not answer hold nothing. Raises PeerLost when there are none.
        """
        live = self._require()
        if len(live) == 1:
            return [dict.fromkeys(live, extent.num_blocks) for extent in wanted]
        may_hold = {n: ranked(extent.key, live)[: self._replicas + 1] for n, extent in enumerate(wanted)}
        return await self._held(hashes, wanted, may_hold, layout, timeout_s)

    async def owned(
        self,
        hashes: Sequence[BlockHash],
        wanted: Sequence[Extent],
        layout: KvLayout,
        *,
        timeout_s: float = GET_TIMEOUT_S,
        without: str = "",
    ) -> list[dict[str, int]]:
        """Per extent: how many of its leading blocks each of its owners, but `without`, holds.

        Those that do not answer, or hold blocks of another layout, are left out.

        Raises PeerLost when there are none; and the SageError of the only one.
        """
        self._require()
        owners = {n: [id for id in self.owners(extent) if id != without] for n, extent in enumerate(wanted)}
        held = await self._held(hashes, wanted, owners, layout, timeout_s)
        live = {id for id, store in self._live().items() if self._layouts.get(_key(store), layout) == layout}
        return [{store: held[n].get(store, 0) for store in stores if store in live} for n, stores in owners.items()]

    async def _held(
        self,
        hashes: Sequence[BlockHash],
        wanted: Sequence[Extent],
        asked: Mapping[int, Sequence[str]],
        layout: KvLayout,
        timeout_s: float,
    ) -> list[dict[str, int]]:
        """`asked`: index in `wanted` → stores."""
        of_store: dict[str, list[int]] = {}
        for n, stores in asked.items():
            for store in stores:
                of_store.setdefault(store, []).append(n)
        answers = await self._ask_all(
            {
                store: kv_pb2.KvLookupRequest(
                    block_hashes=codec.encode_hashes([h for n in ns for h in hashes[wanted[n].first : wanted[n].stop]]),
                    extents=[codec.encode_extent(wanted[n]) for n in ns],
                )
                for store, ns in of_store.items()
            },
            layout,
            timeout_s,
        )
        found: list[dict[str, int]] = [{} for _ in wanted]
        for store, answer in answers.items():
            for n, count in zip(of_store[store], answer.extent_blocks, strict=False):
                if count > 0:
                    found[n][store] = min(count, wanted[n].num_blocks)
        return found

    async def _ask_all(
        self, requests: Mapping[str, kv_pb2.KvLookupRequest], layout: KvLayout, timeout_s: float
    ) -> dict[str, kv_pb2.KvLookupResponse]:
        """Lookups, together. Notes the layouts. Raises the SageError of a lone store, LayoutMismatch of any."""
        answers: dict[str, kv_pb2.KvLookupResponse] = {}
        errors: list[SageError] = []

        async def ask(store_id: str, request: kv_pb2.KvLookupRequest) -> None:
            request.layout.CopyFrom(codec.encode_layout(layout))
            try:
                answers[store_id] = await self._call(store_id, "Lookup", request, timeout_s, kv_pb2.KvLookupResponse)
            except SageError as err:
                errors.append(err)

        if len(requests) == 1:  # the common case, without the cost of a task
            await ask(*next(iter(requests.items())))
        else:
            async with asyncio.TaskGroup() as asking:
                for store_id, request in requests.items():
                    asking.create_task(ask(store_id, request))
        for store_id, answer in answers.items():
            if answer.HasField("layout"):
                self._note(store_id, codec.decode_layout(answer.layout))
        if error := next((e for e in errors if not answers or isinstance(e, LayoutMismatch)), None):
            raise error
        return answers

    def _note(self, store_id: str, layout: KvLayout) -> None:
        """A store's layout, warning once where it is not ours."""
        store = self._topology.snapshot().find(store_id)
        if store is None or self._layouts.get(_key(store)) == layout:
            return
        present = {_key(worker) for worker in self._topology.snapshot().workers}
        self._layouts = {key: known for key, known in self._layouts.items() if key in present} | {_key(store): layout}
        if layout.dtype != self._layout.dtype:
            log.warning(
                "kv_store %s keeps KV in %s, this worker in %s: what comes from it or goes to it is converted",
                store_id,
                layout.dtype,
                self._layout.dtype,
            )

    # ---- one store ----

    async def get(
        self,
        store_id: str,
        hashes: Sequence[BlockHash],
        token_ids: TokenIds,
        layout: KvLayout,
        *,
        extents: Sequence[Extent] = (),
        contexts: Sequence[bytes] = (),
        timeout_s: float = GET_TIMEOUT_S,
    ) -> KvSource | None:
        """Pins the leading blocks the store holds; None when it holds none. Raises SageError.

        `layout` is the store's. `token_ids` are those of the blocks, for the store to check its hits against, and so
        are `contexts` (`prefix_reuse.matcher`). The caller pulls `source.block_table` and releases the lease.
        """
        request = kv_pb2.KvGetRequest(
            block_hashes=codec.encode_hashes(hashes),
            layout=codec.encode_layout(layout),
            backend=self._backend,
            token_ids=pack_int32(token_ids),
            extents=[codec.encode_extent(extent) for extent in extents],
            contexts=codec.encode_contexts(contexts),
            recompute_cost=codec.encode_recompute_cost(self.recompute_cost) if self.recompute_cost else None,
        )
        response = await self._call(store_id, "Get", request, timeout_s, kv_pb2.KvGetResponse)
        return codec.decode_kv_source(response.source) if response.num_blocks else None

    async def put(
        self,
        store_id: str,
        hashes: Sequence[BlockHash],
        token_ids: TokenIds | bytes,
        source: KvSource,
        layout: KvLayout,
        *,
        timeout_s: float,
        extents: Sequence[Extent] = (),
        contexts: Sequence[bytes] = (),
        tenant: str = "",
    ) -> PutResult:
        """Has the store pull the blocks it lacks from `source`, whose lease the caller holds and releases.

        `layout` is the store's: hashes and token_ids (or as they are packed) are those of its blocks, from where
        source.block_table begins. Raises SageError.
        """
        request = kv_pb2.KvPutRequest(
            block_hashes=codec.encode_hashes(hashes),
            source=codec.encode_kv_source(source),
            layout=codec.encode_layout(self._layout),
            token_ids=token_ids if isinstance(token_ids, bytes) else pack_int32(token_ids),
            stored_layout=codec.encode_layout(layout),
            extents=[codec.encode_extent(extent) for extent in extents],
            contexts=codec.encode_contexts(contexts),
            tenant=tenant,
        )
        response = await self._call(store_id, "Put", request, timeout_s, kv_pb2.KvPutResponse)
        return PutResult(response.num_stored, response.num_present, response.bytes_pulled)

    def _serving(self) -> list[WorkerRecord]:
        stores = (worker for worker in self._topology.snapshot().workers if worker.role is WorkerRole.KV_STORE)
        return [store for store in stores if store.state is WorkerState.SERVING]

    def _live(self) -> dict[str, WorkerRecord]:
        """Those not left alone, by id, and in its order."""
        now = self._clock.now()
        return {
            store.worker_id: store for store in self._serving() if self._skip_until_s.get(store.worker_id, now) <= now
        }

    def _require(self) -> dict[str, WorkerRecord]:
        live = self._live()
        if not live:
            raise PeerLost("no kv_store is in reach")
        return live

    async def _call(self, store_id: str, method: str, request: object, timeout_s: float, response: type[R]) -> R:
        worker = self._live().get(store_id)
        if worker is None:
            raise PeerLost(f"kv_store {store_id} is not in reach")
        stub = kv_pb2_grpc.KvStoreServiceStub(self._channels.get(worker.address))
        try:
            return await call(getattr(stub, method), request, timeout_s=timeout_s, response=response)
        except SageError:
            self.failed(store_id)
            raise


def _key(store: WorkerRecord) -> tuple[str, str]:
    return store.worker_id, store.incarnation
