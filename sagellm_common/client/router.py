"""The router's services as calls on core types. Token ids only: text is one layer up, in `aio`."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from sagellm_common.client.direct import DirectGenerations
from sagellm_common.client.routers import Router, Routers
from sagellm_common.core.clock import SystemClock
from sagellm_common.core.errors import DeadlineExceeded, Draining, InvalidRequest, PeerLost, SageError
from sagellm_common.core.topology import LinkCost
from sagellm_common.core.types import (
    GenerationOutput,
    GenerationRequest,
    KvHealth,
    KvStats,
    ModelInfo,
    WorkerRecord,
    WorkerRole,
)
from sagellm_common.rpc import codec
from sagellm_common.rpc.carriers import Choice
from sagellm_common.rpc.channels import ChannelPool, call
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2, plan_pb2, topology_pb2, worker_pb2
from sagellm_common.rpc.sessions import DecodeSession
from sagellm_common.rpc.worker_client import IndexedBlocks, decode_indexed, grace_timeout_s
from sagellm_common.rpc.worker_sessions import WorkerSessions
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.ir_types import ExecutionPlan, IRNode, PlanNodeKind

T = TypeVar("T")

Tokens = Literal["relayed", "direct"]


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as the router sees it. `kv` is None while the worker does not answer.

    `session` is what carries the router's session with it, framed or grpc; empty while none is open.
    """

    record: WorkerRecord
    kv: KvStats | None
    running_requests: int
    waiting_requests: int
    reservations: int
    pinned_transfers: int
    session: str = ""
    transport_changes: tuple[tuple[str, str, str], ...] = ()
    """(key, loaded, now) of transport settings that were changed while it runs."""
    indexed: IndexedBlocks | None = None
    """What the router's prefix index knows of it; None while it told nothing."""
    kv_health: KvHealth = field(default_factory=KvHealth)


@dataclass(frozen=True, slots=True)
class WorkerTransport:
    """Transport settings of one worker that can be changed while it runs. `error`: nothing was changed there, and why.

    `changes` are (key, loaded, now).
    """

    worker_id: str
    in_force: dict[str, str]
    changes: tuple[tuple[str, str, str], ...]
    error: str = ""


@dataclass(frozen=True, slots=True)
class WorkerEviction:
    """Which policy says what cached blocks of a worker go first. `error`: nothing was changed there, and why."""

    worker_id: str
    policy: str
    cached_blocks: int
    error: str = ""
    migration: str = ""
    """Which policy says what goes to lower tiers and comes up; empty: there are none."""


@dataclass(frozen=True, slots=True)
class RoleChange:
    """`unfinished_requests` of the role before go on for as long as they take."""

    record: WorkerRecord
    before: WorkerRole
    unfinished_requests: int


@dataclass(frozen=True, slots=True)
class ClassStrategy:
    """Which strategy places requests of a class ("": of all that have none of their own), and how many it has so far.
    `engine_policy` is what goes with it in the workers' configuration."""

    service_class: str
    strategy: str
    engine_policy: str
    placed_requests: int


@dataclass(frozen=True, slots=True)
class ProbedLinks:
    """`failures` say, for people, which links could not be measured."""

    links: tuple[LinkCost, ...]
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClusterView:
    """`connected` is False while the topology's backend is away and the last snapshot serves. `links` were measured."""

    revision: int
    backend: str
    connected: bool
    workers: tuple[WorkerView, ...]
    links: tuple[LinkCost, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanEvent:
    """One stage of a request; `at_ms` counts from its admission."""

    stage: str
    at_ms: float
    duration_ms: float
    detail: str


@dataclass(frozen=True, slots=True)
class PlanCandidate:
    """A worker when a request was placed. `score` is prefix affinity − load, in [0, 1]; `expected_ms` until the first
    token, had it been computed there, None: not known. See the proto."""

    worker_id: str
    role: WorkerRole
    chosen: bool
    score: float
    expected_ms: float | None
    matched_tokens: int
    outstanding: int
    queued_tokens: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """Whether a request was disaggregated, and what either way was expected to cost, delays of others included.

    `taken_ms` is what became of `expected_ms`, `regret_ms` what the other way would have saved by the cost model; both
    None before the request decodes.
    """

    disaggregated: bool
    expected_ms: float
    other_expected_ms: float
    taken_ms: float | None
    regret_ms: float | None
    detail: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was planned for a request, and why, and what happened.

    `counterfactual` None: it could go one way only, or no costs are known. `node_states` by the plan's node ids.
    """

    plan: ExecutionPlan
    events: tuple[PlanEvent, ...]
    candidates: tuple[PlanCandidate, ...] = ()
    counterfactual: Counterfactual | None = None
    node_states: Mapping[int, str] = field(default_factory=dict)


class RouterClient:
    """Calls one router, or one of several (`host:port,host:port`): where one is lost, the next. Every call has a
    deadline and raises SageErrors only.

    `session` is what carries the generations: framed TCP, gRPC, or (auto) framed where the router offers it. `tokens`
    come through the router, or straight from the workers where these can be reached; see `direct`.
    """

    CONTROL_TIMEOUT_S = 5.0
    """Deadline of the calls that do not generate."""
    PROBE_TIMEOUT_S = 120.0

    def __init__(self, router_address: str, *, session: Choice = "auto", tokens: Tokens = "relayed") -> None:
        self._channels = ChannelPool()
        self._routers = Routers(router_address, self._channels, session)
        self._decodes = WorkerSessions(DecodeSession, self._channels, session)
        self._direct = DirectGenerations(self._routers, self._decodes, SystemClock()) if tokens == "direct" else None

    def generate(self, request: GenerationRequest, timeout_s: float) -> AsyncGenerator[GenerationOutput]:
        """Outputs as they come. Closing the generator cancels the generation everywhere."""
        if self._direct is not None:
            return self._direct.generate(request, timeout_s)
        if len(self._routers) == 1:
            return self._routers.current.session.generate(request, timeout_s=timeout_s)
        return self._relayed(request, timeout_s)

    async def cancel(self, request_id: str) -> None:
        """Ends a generation; its stream gets a last output with CANCELLED. Unknown ids are fine.

        Only one of several routers knows it: all of them are told that can be reached. Raises PeerLost, where none can.
        """
        lost: SageError | None = None
        told = 0
        for router in self._routers.in_turn:
            try:
                await call(
                    router.inference.CancelGeneration,
                    inference_pb2.CancelGenerationRequest(request_id=request_id),
                    timeout_s=self.CONTROL_TIMEOUT_S,
                    response=inference_pb2.CancelGenerationResponse,
                )
                told += 1
            except SageError as err:
                lost = err
        if lost is not None and not told:
            raise lost

    async def _relayed(self, request: GenerationRequest, timeout_s: float) -> AsyncGenerator[GenerationOutput]:
        """Of the current router; of the next one, where it is lost before its first output."""
        for number, router in enumerate(self._routers.in_turn, 1):
            outputs, emitted = router.session.generate(request, timeout_s=timeout_s), False
            try:
                async with aclosing(outputs):
                    async for output in outputs:
                        emitted = True
                        yield output
                return
            except (PeerLost, Draining) as err:
                if (
                    emitted
                    or number == len(self._routers)
                    or err.metadata.get("address", "") not in ("", router.address)
                ):
                    raise
                self._routers.lost(router)

    async def _call(
        self, method: Callable[[Router], Callable[..., Any]], request: Any, *, timeout_s: float, response: type[T]
    ) -> T:
        """Of the first router that can be reached, the current one first."""
        *others, last = self._routers.in_turn
        for router in others:
            try:
                return await call(method(router), request, timeout_s=timeout_s, response=response)
            except (PeerLost, DeadlineExceeded):
                self._routers.lost(router)
        return await call(method(last), request, timeout_s=timeout_s, response=response)

    async def models(self) -> tuple[ModelInfo, ...]:
        """The models that workers serve now; none before the first worker has joined."""
        reply = await self._call(
            lambda router: router.inference.ListModels,
            inference_pb2.ListModelsRequest(),
            timeout_s=self.CONTROL_TIMEOUT_S,
            response=inference_pb2.ListModelsResponse,
        )
        return tuple(codec.decode_model_info(model) for model in reply.models)

    async def topology(self) -> ClusterView:
        snapshot = await self._call(
            lambda router: router.topology.Get,
            topology_pb2.GetTopologyRequest(),
            timeout_s=self.CONTROL_TIMEOUT_S,
            response=topology_pb2.TopologySnapshot,
        )
        workers = tuple(_decode_worker(worker) for worker in snapshot.workers)
        links = tuple(codec.decode_link(link) for link in snapshot.links)
        return ClusterView(snapshot.revision, snapshot.backend, snapshot.connected, workers, links)

    async def probe_links(self, target_ids: Sequence[str] = (), max_bytes: int = 0) -> ProbedLinks:
        """Has workers (none named: all) measure the links to them, with so many bytes (0: their default)."""
        reply = await self._call(
            lambda router: router.topology.ProbeLinks,
            topology_pb2.ProbeLinksRequest(target_ids=target_ids, max_bytes=max_bytes),
            timeout_s=self.PROBE_TIMEOUT_S,
            response=topology_pb2.ProbeLinksResponse,
        )
        return ProbedLinks(tuple(codec.decode_link(link) for link in reply.links), tuple(reply.failures))

    async def set_transport(
        self, settings: Mapping[str, str], worker_ids: Sequence[str] = ()
    ) -> tuple[WorkerTransport, ...]:
        """Changes settings (keys of the section `transport`, values as YAML) of running workers, none named: all.

        Without settings it only tells what is in force. A worker that refuses says so in its `error`.
        """
        reply = await self._call(
            lambda router: router.topology.SetTransport,
            topology_pb2.SetTransportRequest(settings=settings, worker_ids=worker_ids),
            timeout_s=self.CONTROL_TIMEOUT_S,
            response=topology_pb2.SetTransportResponse,
        )
        return tuple(
            WorkerTransport(w.worker_id, dict(w.in_force), _decode_changes(w.changes), w.error) for w in reply.workers
        )

    async def set_eviction(
        self, policy: str, worker_ids: Sequence[str] = (), migration: str = ""
    ) -> tuple[WorkerEviction, ...]:
        """Another eviction policy for running workers and stores, none named: all. What is cached stays.

        `migration` likewise, where there are lower tiers. Without either ("") it only tells which are in force. A
        worker that refuses says so in its `error`.
        """
        reply = await self._call(
            lambda router: router.topology.SetEviction,
            topology_pb2.SetEvictionRequest(policy=policy, worker_ids=worker_ids, migration=migration),
            timeout_s=self.CONTROL_TIMEOUT_S,
            response=topology_pb2.SetEvictionResponse,
        )
        return tuple(
            WorkerEviction(w.worker_id, w.policy, w.cached_blocks, w.error, w.migration) for w in reply.workers
        )

    async def cost_model(self) -> CostModel:
        """What the router has learned of its workers' costs; it keeps learning, this does not."""
        reply = await self._call(
            lambda router: router.topology.GetCostModel,
            topology_pb2.GetCostModelRequest(),
            timeout_s=self.CONTROL_TIMEOUT_S,
            response=topology_pb2.GetCostModelResponse,
        )
        return CostModel.from_dict(json.loads(reply.state_json))

    async def set_role(
        self, worker_id: str, role: WorkerRole, *, grace_s: float | None = None, keep_engine: bool = False
    ) -> RoleChange:
        """Has a running worker take work of another role: PREFILL, DECODE or BOTH. No request is lost by that.

        Returns once what it did before is done or has moved to other workers, at the latest after `grace_s` (None: its
        `cluster.drain_grace_s`). `keep_engine`: even if a worker that starts in that role has other engine settings.
        Raises InvalidRequest (no such worker), ConfigError, WrongRole, Draining.
        """
        change = worker_pb2.SetRoleRequest(
            role=codec.encode_worker_role(role), grace_ms=_grace_ms(grace_s), keep_engine=keep_engine
        )
        reply = await self._call(
            lambda router: router.topology.SetWorkerRole,
            topology_pb2.SetWorkerRoleRequest(worker_id=worker_id, change=change),
            timeout_s=self.CONTROL_TIMEOUT_S + grace_timeout_s(change.grace_ms),
            response=worker_pb2.SetRoleResponse,
        )
        return RoleChange(
            codec.decode_worker_record(reply.record),
            codec.decode_worker_role(reply.before, "before"),
            reply.unfinished_requests,
        )

    async def drain_worker(self, worker_id: str, *, grace_s: float | None = None) -> int:
        """Has a worker or store finish, or give to others, what it does, and end. Raises InvalidRequest.

        Returns the number of requests that were not finished within `grace_s` (None: its `cluster.drain_grace_s`);
        others go on with them, after computing their KV anew.
        """
        request = topology_pb2.DrainWorkerRequest(worker_id=worker_id, grace_ms=_grace_ms(grace_s))
        reply = await self._call(
            lambda router: router.topology.DrainWorker,
            request,
            timeout_s=self.CONTROL_TIMEOUT_S + grace_timeout_s(request.grace_ms),
            response=worker_pb2.DrainResponse,
        )
        return reply.unfinished_requests

    async def set_strategy(self, strategy: str, service_class: str = "") -> tuple[ClassStrategy, ...]:
        """Another placement strategy for requests of a class (none: all that have none of their own), from the next on.

        Without one ("") it only tells which are in force. All routers are told: raises PeerLost where one cannot be
        reached, and InvalidRequest for an unknown strategy or class.
        """
        found: dict[tuple[str, str, str], int] = {}
        for router in self._routers.in_turn:
            reply = await call(
                router.topology.SetStrategy,
                topology_pb2.SetStrategyRequest(strategy=strategy, service_class=service_class),
                timeout_s=self.CONTROL_TIMEOUT_S,
                response=topology_pb2.SetStrategyResponse,
            )
            for one in reply.classes:
                key = one.service_class, one.strategy, one.engine_policy
                found[key] = found.get(key, 0) + one.placed_requests
        return tuple(ClassStrategy(*key, placed) for key, placed in found.items())

    async def explain(self, request_id: str) -> Explanation:
        """Raises InvalidRequest when the router does not (or no longer) know the request."""
        *others, last = self._routers.in_turn
        for router in others:  # only the one that planned it knows
            try:
                reply = await self._explained(router, request_id)
                break
            except (InvalidRequest, PeerLost, DeadlineExceeded):
                continue
        else:
            reply = await self._explained(last, request_id)
        events = tuple(PlanEvent(e.stage, e.at_ms, e.duration_ms, e.detail) for e in reply.events)
        return Explanation(
            _decode_plan(reply.plan),
            events,
            tuple(map(_decode_candidate, reply.candidates)),
            _decode_counterfactual(reply.counterfactual) if reply.HasField("counterfactual") else None,
            {node.node_id: node.state for node in reply.node_states},
        )

    async def _explained(self, router: Router, request_id: str) -> topology_pb2.ExplainPlanResponse:
        return await call(
            router.topology.ExplainPlan,
            topology_pb2.ExplainPlanRequest(request_id=request_id),
            timeout_s=self.CONTROL_TIMEOUT_S,
            response=topology_pb2.ExplainPlanResponse,
        )

    async def close(self) -> None:
        """Cancels the calls in flight. Idempotent."""
        await self._routers.close()  # first: who loses its worker now shall not plan anew
        await self._decodes.close()
        await self._channels.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


def _decode_worker(status: worker_pb2.WorkerStatus) -> WorkerView:
    return WorkerView(
        record=codec.decode_worker_record(status.record),
        kv=codec.decode_kv_stats(status.kv) if status.HasField("kv") else None,
        running_requests=status.running_requests,
        waiting_requests=status.waiting_requests,
        reservations=status.reservations,
        pinned_transfers=status.pinned_transfers,
        session=status.session,
        transport_changes=_decode_changes(status.transport_changes),
        indexed=decode_indexed(status.indexed) if status.HasField("indexed") else None,
        kv_health=codec.decode_kv_health(status.kv_health),
    )


def _grace_ms(grace_s: float | None) -> int:
    return 0 if grace_s is None else max(1, round(grace_s * 1e3))


def _decode_changes(changes: Iterable[worker_pb2.TransportChange]) -> tuple[tuple[str, str, str], ...]:
    return tuple((change.key, change.loaded, change.now) for change in changes)


def _decode_candidate(message: topology_pb2.PlanCandidate) -> PlanCandidate:
    return PlanCandidate(
        worker_id=message.worker_id,
        role=codec.decode_worker_role(message.role),
        chosen=message.chosen,
        score=message.score,
        expected_ms=message.expected_ms if message.HasField("expected_ms") else None,
        matched_tokens=message.matched_tokens,
        outstanding=message.outstanding,
        queued_tokens=message.queued_tokens,
        sequences=message.sequences,
    )


def _decode_counterfactual(message: topology_pb2.PlanCounterfactual) -> Counterfactual:
    return Counterfactual(
        disaggregated=message.disaggregated,
        expected_ms=message.expected_ms,
        other_expected_ms=message.other_expected_ms,
        taken_ms=message.taken_ms if message.HasField("taken_ms") else None,
        regret_ms=message.regret_ms if message.HasField("regret_ms") else None,
        detail=message.detail,
    )


def _decode_plan(plan: plan_pb2.ExecutionPlan) -> ExecutionPlan:
    def kind(number: plan_pb2.PlanNodeKind) -> PlanNodeKind:
        return PlanNodeKind(plan_pb2.PlanNodeKind.Name(number).removeprefix("PLAN_NODE_KIND_").lower())

    nodes = tuple(
        IRNode(
            n.node_id,
            kind(n.kind),
            n.worker_id,
            tuple(n.depends_on),
            n.start_token,
            n.end_token,
            n.overlap if n.HasField("overlap") else None,
            n.segment_bytes,
            n.chunk_tokens,
            n.priority,
            n.wire_dtype,
            n.source_id,
            n.micro_batch,
        )
        for n in plan.nodes
    )
    return ExecutionPlan(plan.plan_id, plan.request_id, plan.strategy, nodes, plan.reason)
