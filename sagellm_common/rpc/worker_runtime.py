"""The life of every worker process, whatever its role.

Three phases:

    start:  byte path → gRPC server → topology → ready line
    run:    until SIGTERM, SIGINT, Drain, or until another process has taken the worker's id; SetRole changes the role
    stop:   refuse new work → wait for what runs (at most the grace) → leave the topology → close
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from sagellm_common.comm_backend.handoff import HandoffSource, HandoffTarget
from sagellm_common.comm_backend.handoff_record import HandoffLog
from sagellm_common.comm_backend.paths import PathsChannel
from sagellm_common.core import process
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.config import Config
from sagellm_common.core.errors import (
    ConfigError,
    DeadlineExceeded,
    Draining,
    SageError,
    Unreachable,
    WorkerIdTaken,
    WrongRole,
)
from sagellm_common.core.kv import Tier
from sagellm_common.core.step_costs import StepLog
from sagellm_common.core.topology import Registration, TopologyStore
from sagellm_common.core.types import KvHealth, KvStats, ModelInfo, WorkerRecord, WorkerRole, WorkerState
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol
from sagellm_common.kv_runtime.hierarchy import HierarchyManager
from sagellm_common.kv_runtime.integrity import SelfCheck
from sagellm_common.kv_runtime.pool import KVPool
from sagellm_common.rpc.background import Background
from sagellm_common.rpc.block_journal import BlockJournal
from sagellm_common.rpc.cache_lending import CacheLender
from sagellm_common.rpc.gen.sagellm.v1 import kv_pb2_grpc, worker_pb2_grpc
from sagellm_common.rpc.kv_transfer_service import KvTransferServicer
from sagellm_common.rpc.server import GrpcServer, Registrar
from sagellm_common.rpc.transport_control import TransportControl
from sagellm_common.rpc.worker_service import Load, WorkerServicer

log = logging.getLogger(__name__)

STREAM_GRACE_S = 0.2
"""For answers on their way out once nothing runs; watchers and sessions would otherwise stay for ever."""
TOPOLOGY_TIMEOUT_S = 2.0
REGISTER_RETRY_S = 0.2
TICK_S = 0.5
PUBLISH_LINKS_S = 2.0
DEFRAG_S = 1.0


class WorkerRuntime:
    """Composes one worker. Made first, for its `record` and `check_accepting` are what the service's logic needs of
    its surroundings; `run` gets the service and the logic's load.

    `config` is that of all roles. `host` binds and is advertised, port 0 is an ephemeral port. `metrics_port` None
    serves no metrics. `engine_ended` lets the worker exit at once, before another request is sent to it.
    """

    def __init__(
        self,
        config: Config,
        role: WorkerRole,
        worker_id: str,
        *,
        pool: KVBackendProtocol,
        source: HandoffSource,
        channel: PathsChannel,
        topology: TopologyStore,
        target: HandoffTarget | None = None,
        model: ModelInfo | None = None,
        engine_ended: asyncio.Event | None = None,
        engine: str = "",
        port: int = 0,
        session_port: int = 0,
        metrics_port: int | None = None,
        metrics: CollectorRegistry = REGISTRY,
        handoffs: HandoffLog | None = None,
        step_log: StepLog | None = None,
    ) -> None:
        self._config = config
        self._pool = pool
        self._source = source
        self._target = target
        self._channel = channel
        self._topology = topology
        self._port = port
        self._session_port = session_port
        self._metrics_port = metrics_port
        self._metrics = metrics
        self._handoffs = handoffs
        self._step_log = step_log
        self._engine_ended = engine_ended or asyncio.Event()
        memory = pool.pool if isinstance(pool, HierarchyManager) else pool
        self._self_check = SelfCheck(memory) if isinstance(memory, KVPool) else None
        home = Tier.HOST if role is WorkerRole.KV_STORE else Tier.DEVICE
        self.journal = BlockJournal(pool, SystemClock(), config.index.history_blocks, home)
        self._transport = TransportControl(channel, pool, source)
        self._load: Callable[[], Load] = Load
        self._in_flight: Mapping[WorkerRole, Callable[[], int]] = {}
        self._engine = config.of_role(role).engine
        self._changing_role = asyncio.Lock()
        self._server: GrpcServer | None = None
        self._registration: Registration | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._background = Background()
        self._drain: asyncio.Task[int] | None = None
        self._drain_requested = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()
        self.metrics_address = ""
        self._record = WorkerRecord(
            worker_id=worker_id,
            role=role,
            address="",
            data_address="",
            incarnation=secrets.token_hex(8),
            pid=os.getpid(),
            model=model,
            transport=channel.name,
            host_id=socket.gethostname(),
            engine=engine,
        )

    # ---- what the service's logic asks ----

    @property
    def record(self) -> WorkerRecord:
        """Who this worker is. Addresses are known from `start` on, id and incarnation at once."""
        return self._record

    def check_accepting(self, work: WorkerRole | None = None) -> None:
        """Raises Draining once no new work is taken, or none of that role."""
        me = self._record
        if me.state is WorkerState.DRAINING:
            raise Draining(f"worker {me.worker_id} is draining; send the request to another worker", retry_after_s=0.1)
        if work is not None and not me.role.covers(work):
            raise Draining(
                f"worker {me.worker_id} has the role {me.role} now and takes no new {work} work; send the request to "
                "another worker",
                retry_after_s=0.1,
            )

    def load(self) -> Load:
        return self._load()

    def kv_stats(self) -> KvStats:
        return self._pool.get_utilization()

    def kv_health(self) -> KvHealth:
        return self._self_check.health() if self._self_check else KvHealth()

    # ---- life ----

    async def run(
        self,
        services: Sequence[Registrar],
        load: Callable[[], Load],
        in_flight: Mapping[WorkerRole, Callable[[], int]] | None = None,
    ) -> None:
        """Serves until told to stop. `in_flight` counts the requests of each role that `services` are for, where that
        may change. Raises ConfigError (port in use), WorkerIdTaken and EngineFailed."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            await self.start(services, load, in_flight)
            process.started()
            print(json.dumps(self.ready_line()), flush=True)
            await self._until_stopped()
        except Draining as err:
            log.info("%s", err)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            await self.close()

    async def start(
        self,
        services: Sequence[Registrar],
        load: Callable[[], Load],
        in_flight: Mapping[WorkerRole, Callable[[], int]] | None = None,
    ) -> None:
        """Serves and is in the topology when this returns. On an error, `close` gives everything back.

        Raises ConfigError (port in use), WorkerIdTaken, and Draining when told to stop before it got there.
        """
        self._load, self._in_flight = load, in_flight or {}
        host = self._config.cluster.host
        for leases in (self._source, self._target):
            if leases is not None:
                self._stack.callback(leases.close)
        data_address = await self._channel.start()
        self._stack.push_async_callback(self._channel.close)
        self._record = replace(self._record, data_address=data_address, paths=self._channel.paths)
        layout = self._record.model.kv_layout if self._record.model else None
        transfer = KvTransferServicer(
            self._source,
            self._channel,
            layout,
            self._record.worker_id,
            self._record.incarnation,
            lend=lambda num_bytes: self._transport.lend(self._record, num_bytes),
            lend_cached=CacheLender(self._pool, self._source, self).lend,
        )
        own = [
            Registrar(
                "sagellm.v1.WorkerService",
                worker_pb2_grpc.add_WorkerServiceServicer_to_server,
                WorkerServicer(self, self.journal, self._transport, self._pool, self._handoffs, self._step_log),
            ),
            Registrar("sagellm.v1.KvTransferService", kv_pb2_grpc.add_KvTransferServiceServicer_to_server, transfer),
        ]
        offered = self._config.rpc.session != "grpc"
        self._server = GrpcServer(
            f"{host}:{self._port}", [*services, *own], session_port=self._session_port if offered else None
        )
        port = await self._server.start()
        self._stack.push_async_callback(self._server.stop, STREAM_GRACE_S)
        self._record = replace(self._record, address=f"{host}:{port}")
        collector = _WorkerCollector(self)
        self._metrics.register(collector)
        self._stack.callback(self._metrics.unregister, collector)
        if self._metrics_port is not None:
            self.metrics_address = await self._stack.enter_async_context(
                _metrics_server(host, self._metrics_port, self._metrics)
            )
        self._ticker = asyncio.create_task(self._tick(), name="worker-tick")
        self._registration = await self._register()
        self._background.spawn(self._publish_links(), "publishing the costs of links")
        if self._self_check is not None:
            self._background.spawn(self._look_after(self._self_check), "looking after the KV pool")
        await self._server.set_serving(True)

    def ready_line(self) -> dict[str, object]:
        """What a supervisor reads from stdout."""
        record = self._record
        return {
            "ready": True,
            "address": record.address,
            "data_address": record.data_address,
            "metrics_address": self.metrics_address,
            "pid": record.pid,
            "id": record.worker_id,
        }

    async def drain(self, grace_s: float | None = None) -> int:
        """Turns new work away, waits for what runs, at most `grace_s`; returns the number of unfinished requests.

        The process ends afterwards. Idempotent: later calls wait for the same drain.
        """
        if self._drain is None:
            self._drain = asyncio.create_task(self._drain_once(grace_s), name="drain")
        unfinished = await asyncio.shield(self._drain)
        self._drain_requested.set()
        return unfinished

    async def set_role(self, role: WorkerRole, grace_s: float | None = None, keep_engine: bool = False) -> int:
        """Takes work of that role only, and says so in the topology; the incarnation stays, for so does all KV.

        Waits for what runs of the role it had, at most `grace_s`; returns how much of that is left, which goes on.
        Raises WrongRole where this process lacks the part, ConfigError where a worker that starts in that role has
        another engine (unless `keep_engine`), Draining.
        """
        async with self._changing_role:
            self.check_accepting()
            before = self._record.role
            eviction = self._check_role(role, keep_engine)
            if eviction:
                await asyncio.to_thread(self._pool.set_eviction, eviction)
            if role is not before:
                log.info("the role is %s from now on, was %s", role, before)
                self._record = replace(self._record, role=role)
                await self._announce()

        def left() -> int:
            old = [work for work in self._in_flight if before.covers(work) and not self._record.role.covers(work)]
            promised = len(self._target) if self._target is not None and WorkerRole.DECODE in old else 0
            return promised + sum(self._in_flight[work]() for work in old)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.cluster.drain_grace_s if grace_s is None else grace_s):
                while left():  # noqa: ASYNC110 - as in a drain
                    await asyncio.sleep(0.02)
        return left()

    def _check_role(self, role: WorkerRole, keep_engine: bool) -> str:
        """The eviction policy it comes with; "": that stays. Raises as `set_role`."""
        me, parts = self._record, [work for work in (WorkerRole.PREFILL, WorkerRole.DECODE) if role.covers(work)]
        if not parts or not all(work in self._in_flight for work in parts):
            able = ", ".join(self._in_flight) if len(self._in_flight) < 2 else "prefill, decode and both"
            raise WrongRole(
                f"worker {me.worker_id} cannot take the role {role}: its process serves {able or me.role}; "
                "`python -m services.worker` serves prefill, decode and both"
            )
        if role is me.role or keep_engine:
            return ""
        now, then = self._engine.model_dump(), self._config.of_role(role).engine.model_dump()
        eviction: str = then.pop("eviction")
        other = [f"{key} (now {now[key]!r}, {role} has {value!r})" for key, value in then.items() if now[key] != value]
        if other:
            raise ConfigError(
                f"worker {me.worker_id} cannot become {role} while it runs, its engine has other settings: "
                f"{', '.join(other)}; restart it as {role}, give both roles the same, or keep its engine as it is"
            )
        return eviction if eviction != self._config.of_role(me.role).engine.eviction else ""

    async def close(self) -> None:
        """Leaves the topology and closes what `start` opened. Idempotent."""
        tasks = [task for task in (self._drain, self._ticker) if task is not None]
        self._drain = self._ticker = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # a failed tick was `run`'s to raise
        await self._background.close()
        registration, self._registration = self._registration, None
        if registration is not None:
            await self._briefly(registration.close(), "leave the topology")
        await self._stack.aclose()
        await self._topology.close()

    # ---- parts of it ----

    def _on_signal(self) -> None:
        """The first signal drains, the second stops at once."""
        if self._drain_requested.is_set():
            self._stop_now.set()
        self._drain_requested.set()

    async def _until_stopped(self) -> None:
        assert self._registration is not None and self._ticker is not None
        requested = asyncio.create_task(self._drain_requested.wait(), name="drain-requested")
        lost = asyncio.create_task(self._registration.lost.wait(), name="registration-lost")
        stop_now = asyncio.create_task(self._stop_now.wait(), name="stop-now")
        try:
            await asyncio.wait([requested, lost, self._ticker], return_when=asyncio.FIRST_COMPLETED)
            if self._ticker.done():
                self._ticker.result()
            if lost.done():
                raise WorkerIdTaken(
                    f"another process has registered as worker {self._record.worker_id!r}; this one "
                    f"(incarnation {self._record.incarnation}) stops - give each worker its own --id"
                )
            drained = asyncio.create_task(self.drain(), name="drain-on-signal")
            await asyncio.wait([drained, stop_now], return_when=asyncio.FIRST_COMPLETED)
            if drained.done():
                drained.result()
            drained.cancel()
        finally:
            for task in (requested, lost, stop_now):
                task.cancel()

    async def _register(self) -> Registration:
        """Enters the topology, waiting for a control plane that is not up yet: services start in any order."""
        complained = False
        while not self._drain_requested.is_set():
            try:
                await self._topology.start()
                return await self._topology.register(self._record, self._config.topology.lease_ttl_s)
            except (Unreachable, DeadlineExceeded) as err:
                if not complained:
                    log.warning("the topology is out of reach, trying on: %s", err)
                    complained = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REGISTER_RETRY_S):
                    await self._drain_requested.wait()
        raise Draining("told to stop before the topology could be reached")

    async def _drain_once(self, grace_s: float | None) -> int:
        if self._server is not None:
            await self._server.set_serving(False)
        self._record = replace(self._record, state=WorkerState.DRAINING)
        await self._announce()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.cluster.drain_grace_s if grace_s is None else grace_s):
                while not self._load().idle:  # noqa: ASYNC110 - told by leases and engines, which have no event for it
                    await asyncio.sleep(0.02)
        load = self._load()
        return load.running_requests + load.waiting_requests

    async def _announce(self) -> None:
        if self._registration is not None:
            await self._briefly(self._registration.update(self._record), "update the topology")

    async def _publish_links(self) -> None:
        """Tells the topology what the links to this worker cost, when it has noticeably changed."""
        while True:
            await asyncio.sleep(PUBLISH_LINKS_S)
            present = [worker.worker_id for worker in self._topology.snapshot().workers]
            links = self._transport.unpublished(self._record, present)
            if links and self._registration is not None:
                await self._briefly(self._registration.publish_links(links), "publish the costs of links")

    async def _look_after(self, self_check: SelfCheck) -> None:
        """Checks the pool while nothing runs, and closes its gaps; on a thread, for it reads and moves KV."""
        kv, pool, clock = self._config.kv, self_check.pool, SystemClock()
        checked_s = clock.now()
        while True:
            await asyncio.sleep(min(DEFRAG_S, kv.self_check_s))
            idle = self._load().idle
            if kv.defrag == "live" or (kv.defrag == "idle" and idle):
                await asyncio.to_thread(pool.defragment, kv.defrag_bytes)
            if idle and clock.now() - checked_s >= kv.self_check_s:
                await asyncio.to_thread(self_check.run)
                checked_s = clock.now()

    async def _briefly(self, what: Awaitable[None], doing: str) -> None:
        """The topology is advice: a worker neither stops nor hangs because it is away."""
        try:
            async with asyncio.timeout(TOPOLOGY_TIMEOUT_S):
                await what
        except (SageError, TimeoutError) as err:
            log.warning("could not %s: %r", doing, err)

    @property
    def expired_leases(self) -> int:
        """Since the start."""
        return self._source.outcomes["expired"] + (self._target.outcomes["expired"] if self._target else 0)

    async def _tick(self) -> None:
        """Frees what dead parties held, and notices an engine that has stopped. Raises EngineFailed."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._config.transport.lease_ttl_s / 4, TICK_S)):
                    await self._engine_ended.wait()
            self._load()
            if self._engine_ended.is_set():
                return
            expired = self._source.expire() + (self._target.expire() if self._target else 0)
            if expired:
                log.warning("freed the blocks of %d leases whose party went silent", expired)


@contextlib.asynccontextmanager
async def _metrics_server(host: str, port: int, registry: CollectorRegistry) -> AsyncIterator[str]:
    """Yields host:port."""
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as err:
        raise ConfigError(f"--metrics-port {port}: cannot listen on {host}:{port}: {err.strerror}") from err
    try:
        yield f"{host}:{server.server_port}"
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        await asyncio.to_thread(thread.join)


class _WorkerCollector:
    """Reads the worker at scrape time: nothing to keep up to date, nothing on the path of a request."""

    def __init__(self, runtime: WorkerRuntime) -> None:
        self._runtime = runtime

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats, load = self._runtime.kv_stats(), self._runtime.load()
        blocks = GaugeMetricFamily("sagellm_worker_kv_blocks", "KV blocks by state.", labels=["state"])
        for state in ("total", "free", "used", "cached"):
            blocks.add_metric([state], getattr(stats, f"{state}_blocks"))
        yield blocks
        yield from _kv_health(self._runtime.kv_health())
        requests = GaugeMetricFamily("sagellm_worker_requests", "Requests by state.", labels=["state"])
        requests.add_metric(["running"], load.running_requests)
        requests.add_metric(["waiting"], load.waiting_requests)
        yield requests
        yield GaugeMetricFamily(
            "sagellm_worker_reservations", "Blocks reserved for a prefill to come.", load.reservations
        )
        yield GaugeMetricFamily(
            "sagellm_worker_pinned_transfers", "Transfers whose blocks are pinned here.", load.pinned_transfers
        )
        yield CounterMetricFamily(
            "sagellm_worker_expired_leases",
            "Leases freed because their party went silent.",
            self._runtime.expired_leases,
        )


def _kv_health(health: KvHealth) -> Iterator[Metric]:
    checks = CounterMetricFamily("sagellm_worker_kv_checks", "Self-checks of the KV pool.", labels=["outcome"])
    checks.add_metric(["ok"], health.checks - health.failed_checks)
    checks.add_metric(["failed"], health.failed_checks)
    yield checks
    yield CounterMetricFamily(
        "sagellm_worker_kv_corrupt_blocks", "Cached blocks found changed, and dropped.", health.corrupt_blocks
    )
    yield CounterMetricFamily("sagellm_worker_kv_moved_blocks", "Blocks moved to close gaps.", health.moved_blocks)
    yield CounterMetricFamily(
        "sagellm_worker_kv_rejected_hits",
        "Blocks found by name that were not those asked for: of other tokens, or after others.",
        health.rejected_hits,
    )
    yield GaugeMetricFamily(
        "sagellm_worker_kv_lifetime_skill_ratio",
        "How well eviction foretells whether blocks are used again: 1 knows it, 0 knows the average or does not try.",
        health.lifetime_skill,
    )
    share = GaugeMetricFamily(
        "sagellm_worker_kv_fragmentation_ratio",
        "Token slots of held blocks that are for no token (internal); free blocks not in the longest run (external).",
        labels=["kind"],
    )
    share.add_metric(["internal"], health.internal_fragmentation)
    share.add_metric(["external"], health.external_fragmentation)
    yield share
    if health.tenants:
        blocks = GaugeMetricFamily(
            "sagellm_worker_tenant_kv_blocks", "KV blocks of a tenant.", labels=["tenant", "kind"]
        )
        rejections = CounterMetricFamily(
            "sagellm_worker_tenant_rejections", "Requests turned away with TENANT_QUOTA.", labels=["tenant"]
        )
        for usage in health.tenants:
            for kind in ("charged", "borrowed", "guaranteed", "limit"):
                blocks.add_metric([usage.tenant, kind], getattr(usage, f"{kind}_blocks"))
            rejections.add_metric([usage.tenant], usage.rejections)
        yield blocks
        yield rejections
