"""The workers as the router sees them: follows the topology, keeps one status watch and the sessions per worker.

topology ──► join / leave ──► WorkerLink ──► status watch ──► load, KV counts, block events ──► CachedBlocks
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

from sagellm_common.comm_backend.transcode import obstacles
from sagellm_common.core.errors import SageError
from sagellm_common.core.step_costs import StepCost
from sagellm_common.core.topology import LinkCost, TopologySnapshot, TopologyStore
from sagellm_common.core.types import KvLayout, ModelInfo, WorkerRecord, WorkerRole, WorkerState
from sagellm_common.rpc.carriers import Choice
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.sessions import DecodeSession, PrefillSession
from sagellm_common.rpc.worker_client import WorkerStatus, get_status, watch_status
from services.router.cached_blocks import CachedBlocks, EventsMissed
from services.router.load import WorkerLoad

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.1
RECONNECT_S = 0.1
STATUS_TIMEOUT_S = 1.0
DEPARTED_GRACE_S = 5.0
"""A worker may drop out of the topology for a moment and be fine (a late heartbeat): what runs there gets this long."""

WorkerKey = tuple[str, str]
"""(worker_id, incarnation)"""


class WorkerLink:
    """One incarnation of one worker.

    `reachable` once its status watch has answered, until that breaks. `eased` is set when a request ends there, or
    the worker is lost. `work` is what this router has sent there, in tokens.
    """

    def __init__(self, record: WorkerRecord, channels: ChannelPool, session: Choice = "auto") -> None:
        channel = channels.get(record.address)
        self.record = record
        self.status: WorkerStatus | None = None
        self.reachable = False
        self.departed = False
        self.outstanding = 0
        self.foreign = 0
        self.assigned = 0
        self.work = WorkerLoad()
        self.prefill = PrefillSession(channel, record.worker_id, record.address, session)
        self.decode = DecodeSession(channel, record.worker_id, record.address, session)
        self.eased = asyncio.Event()
        self.watch: asyncio.Task[None] | None = None
        self.retirement: asyncio.Task[None] | None = None

    @property
    def worker_id(self) -> str:
        return self.record.worker_id

    @property
    def key(self) -> WorkerKey:
        return self.record.worker_id, self.record.incarnation

    @property
    def usable(self) -> bool:
        """Takes new requests."""
        return self.reachable and not self.departed and self.record.state is WorkerState.SERVING

    @property
    def decodes(self) -> bool:
        """Takes generations to decode, or would if it did not drain."""
        return self.record.role in (WorkerRole.DECODE, WorkerRole.BOTH)

    @property
    def leaving(self) -> bool:
        """What decodes there is to go on elsewhere."""
        return self.record.state is WorkerState.DRAINING or not self.decodes

    def serves(self, model_name: str) -> bool:
        model = self.record.model
        return self.record.role is WorkerRole.KV_STORE or (model is not None and model.name == model_name)

    @property
    def carrier(self) -> str:
        """What carries the session: framed, grpc, or nothing while none is open."""
        return self.prefill.carrier or self.decode.carrier

    @property
    def load(self) -> int:
        """Requests there: ours are known at once, other clients' from its status."""
        return self.outstanding + self.foreign

    @contextmanager
    def engaged(self) -> Iterator[None]:
        """Counts a request for the time of the block."""
        self.engage()
        try:
            yield
        finally:
            self.ease()

    def engage(self) -> None:
        """Counts a request until `ease`."""
        self.outstanding += 1
        self.assigned += 1

    def ease(self) -> None:
        self.outstanding -= 1
        self.eased.set()


class Workers:
    """Between `start` and `close`, `usable` is never older than a second."""

    def __init__(
        self,
        topology: TopologyStore,
        channels: ChannelPool,
        session: Choice,
        cached_blocks: CachedBlocks,
        on_steps: Callable[[WorkerLink, Sequence[StepCost]], None] | None = None,
    ) -> None:
        """`on_steps` hears what the steps of the workers' engines took, where they tell."""
        self._session = session
        self._on_steps = on_steps
        self._topology = topology
        self._channels = channels
        self._cached = cached_blocks
        self._links: dict[WorkerKey, WorkerLink] = {}
        self._incompatible: set[WorkerKey] = set()
        self._converted: set[WorkerKey] = set()
        """Their KV is of another dtype than that of who joined first: said once."""
        self._models: dict[str, ModelInfo] = {}
        self._costs: dict[tuple[str, str], LinkCost] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._usable: dict[str, list[WorkerLink]] = {}
        self._layouts: dict[str, list[KvLayout]] = {}

    def start(self) -> None:
        self._spawn(self._follow_topology(), "topology")

    async def close(self) -> None:
        """Drops all sessions and watches. Idempotent."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for link in [*self._links.values()]:
            await self._drop(link)

    # ---- what the pipeline asks ----

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change of any worker: take it first, then look, then wait for it."""
        return self._changed

    @property
    def links(self) -> list[WorkerLink]:
        """To all workers that were seen and are not gone."""
        return [*self._links.values()]

    def usable(self, model: ModelInfo) -> list[WorkerLink]:
        """Workers that take requests for the model, and stores; until `changed` the same list."""
        found = self._usable.get(model.name)
        if found is None:
            found = self._usable[model.name] = [
                link
                for key, link in self._links.items()
                if link.usable and key not in self._incompatible and link.serves(model.name)
            ]
        return found

    def layouts(self, model: ModelInfo) -> list[KvLayout]:
        """KV layouts of the model's usable workers, each once; until `changed` the same list."""
        found = self._layouts.get(model.name)
        if found is None:
            layouts = [link.record.model.kv_layout for link in self.usable(model) if link.record.model is not None]
            found = self._layouts[model.name] = list(dict.fromkeys(layouts))
        return found

    def matched(self, hashes: bytes, block_size_tokens: int) -> dict[str, int]:
        """Leading tokens of the packed `hashes`' blocks that each worker holds; see `CachedBlocks`."""
        return self._cached.matched(hashes, block_size_tokens)

    def stored(self, hashes: bytes, block_size_tokens: int) -> int:
        """Leading tokens of the packed `hashes`' blocks that the kv_stores hold between them."""
        stores = {link.worker_id for link in self._links.values() if link.record.role is WorkerRole.KV_STORE}
        return self._cached.sharded(hashes, block_size_tokens, stores) if stores else 0

    def find(self, worker_id: str, incarnation: str) -> WorkerLink | None:
        return self._links.get((worker_id, incarnation))

    def cost(self, source_id: str, target_id: str) -> LinkCost | None:
        """What moving KV from one worker to another costs; None: that was not measured."""
        return self._costs.get((source_id, target_id))

    def models(self) -> dict[str, ModelInfo]:
        """Models by name, of all workers seen: a model stays known while its last worker restarts."""
        return dict(self._models)

    def suspect(self, link: WorkerLink) -> None:
        """A call was lost there: the worker is not used until it answers a fresh watch."""
        if link.key in self._links:
            log.warning("worker %s (%s) was lost in a call; checking it", *link.key)
            self._watch(link)

    # ---- what the topology service asks ----

    async def status(self, record: WorkerRecord) -> WorkerStatus:
        """Fresh from the worker. Raises PeerLost, DeadlineExceeded."""
        status = await get_status(self._channels.get(record.address), timeout_s=STATUS_TIMEOUT_S)
        link = self._links.get((record.worker_id, record.incarnation))
        indexed = self._cached.view(record.worker_id, record.incarnation)
        return replace(status, session=link.carrier if link is not None else "", indexed=indexed)

    # ---- following the topology ----

    async def _follow_topology(self) -> None:
        async for snapshot in self._topology.changes():
            self._apply(snapshot)

    def _apply(self, snapshot: TopologySnapshot) -> None:
        self._costs = {(link.source_id, link.target_id): link for link in snapshot.links}
        present = {(record.worker_id, record.incarnation): record for record in snapshot.workers}
        for key, record in present.items():
            link = self._links.get(key)
            if link is None:
                link = self._links[key] = WorkerLink(record, self._channels, self._session)
                self._watch(link)
                log.info("worker %s (%s, %s) joined at %s", record.worker_id, key[1], record.role, record.address)
            link.record = record
            self._return(link)
        for key in self._links.keys() - present.keys():
            self._depart(self._links[key])
        self._check_layouts()
        self._notify()

    def _check_layouts(self) -> None:
        """Per model, what the worker says that joined first counts; layouts that no transcoding bridges to it are not
        used while it is there."""
        first: dict[str, ModelInfo] = {}
        incompatible: set[WorkerKey] = set()
        converted: set[WorkerKey] = set()
        for key, link in self._links.items():
            model = link.record.model
            if link.departed or model is None or link.record.role is WorkerRole.KV_STORE:
                continue
            layout = first.setdefault(model.name, model).kv_layout
            found = obstacles(layout, model.kv_layout)
            if not found and model.kv_layout.dtype != layout.dtype:
                converted.add(key)
                if key not in self._converted:
                    dtypes = link.worker_id, model.kv_layout.dtype, layout.dtype
                    log.warning("worker %s keeps KV in %s, others in %s: it is converted between them", *dtypes)
            if found:
                incompatible.add(key)
                if key not in self._incompatible:
                    fields = ", ".join(f"{name} {theirs!r} != {ours!r}" for name, (ours, theirs) in found.items())
                    log.error("worker %s is not used, its KV layout differs: %s", link.worker_id, fields)
        self._incompatible, self._converted = incompatible, converted
        self._models |= first

    def _depart(self, link: WorkerLink) -> None:
        if not link.departed:
            log.info("worker %s (%s) left", *link.key)
            link.departed = True
            self._cached.forget(*link.key)
            link.retirement = self._spawn(self._retire(link), f"retire {link.worker_id}")

    def _return(self, link: WorkerLink) -> None:
        if link.departed:
            log.info("worker %s (%s) is back", *link.key)
            link.departed = False
            if link.retirement is not None:
                link.retirement.cancel()
            self._watch(link)

    async def _retire(self, link: WorkerLink) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEPARTED_GRACE_S):
                while link.outstanding and link.reachable:
                    link.eased.clear()
                    await link.eased.wait()
        await self._drop(link)

    async def _drop(self, link: WorkerLink) -> None:
        self._links.pop(link.key, None)
        if link.watch is not None:
            link.watch.cancel()
        await link.prefill.close()
        await link.decode.close()
        if all(other.record.address != link.record.address for other in self._links.values()):
            await self._channels.drop(link.record.address)

    # ---- watching one worker ----

    def _watch(self, link: WorkerLink) -> None:
        """A fresh watch; the worker is reachable again when it answers."""
        if link.watch is not None:
            link.watch.cancel()
        self._lost(link)
        link.watch = self._spawn(self._follow(link), f"watch {link.worker_id}")

    async def _follow(self, link: WorkerLink) -> None:
        channel = self._channels.get(link.record.address)
        while True:
            try:
                watch = watch_status(
                    channel,
                    min_interval_s=WATCH_INTERVAL_S,
                    max_interval_s=self._cached.sign_of_life_s,
                    from_revision=self._cached.watched(*link.key),
                    incarnation=link.record.incarnation,
                )
                async with aclosing(watch) as updates:
                    async for status, changes in updates:
                        if status.record.incarnation != link.record.incarnation:
                            log.info("another incarnation of worker %s answers at its address", link.worker_id)
                            self._cached.forget(*link.key)
                            break
                        if not link.departed:
                            await self._cached.apply(*link.key, changes)
                        self._update(link, status)
            except EventsMissed:
                log.warning("worker %s skipped block events; asking again", link.worker_id)
                self._cached.forget(*link.key)
            except SageError as err:
                log.debug("watch of worker %s: %s", link.worker_id, err.message)
            self._lost(link)
            await asyncio.sleep(RECONNECT_S)

    def _update(self, link: WorkerLink, status: WorkerStatus) -> None:
        link.status, link.record, link.reachable = status, status.record, True
        if self._on_steps is not None and status.steps:
            self._on_steps(link, status.steps)
        link.foreign = max(0, status.running_requests + status.waiting_requests - link.outstanding)
        self._notify()

    def _lost(self, link: WorkerLink) -> None:
        self._cached.unwatched(*link.key)
        if link.reachable:
            link.reachable = False
            link.eased.set()
            self._notify()

    def _notify(self) -> None:
        self._usable.clear()
        self._layouts.clear()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)
