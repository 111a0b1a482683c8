"""Plans and events on the wire."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sagellm_common.core.types import WorkerRole
from sagellm_common.rpc.codec import encode_worker_role
from sagellm_common.rpc.gen.sagellm.v1 import plan_pb2, topology_pb2
from sagellm_common.scheduler_ir.ir_types import ExecutionPlan, PlanNodeKind
from sagellm_common.scheduler_ir.strategies.scoring import affinity_minus_load
from services.router.explain import Explanation, PlanEvent
from services.router.stages import Routed

_KINDS = {
    PlanNodeKind.LOOKUP: plan_pb2.PLAN_NODE_KIND_LOOKUP,
    PlanNodeKind.FETCH: plan_pb2.PLAN_NODE_KIND_FETCH,
    PlanNodeKind.PREFILL: plan_pb2.PLAN_NODE_KIND_PREFILL,
    PlanNodeKind.TRANSFER: plan_pb2.PLAN_NODE_KIND_TRANSFER,
    PlanNodeKind.DECODE: plan_pb2.PLAN_NODE_KIND_DECODE,
    PlanNodeKind.OFFLOAD: plan_pb2.PLAN_NODE_KIND_OFFLOAD,
    PlanNodeKind.MIGRATE: plan_pb2.PLAN_NODE_KIND_MIGRATE,
    PlanNodeKind.SWITCH_MODEL: plan_pb2.PLAN_NODE_KIND_SWITCH_MODEL,
    PlanNodeKind.VERIFY: plan_pb2.PLAN_NODE_KIND_VERIFY,
}


def encode_plan(plan: ExecutionPlan) -> plan_pb2.ExecutionPlan:
    return plan_pb2.ExecutionPlan(
        plan_id=plan.plan_id,
        request_id=plan.request_id,
        strategy=plan.strategy,
        reason=plan.reason,
        nodes=[
            plan_pb2.PlanNode(
                node_id=node.node_id,
                kind=_KINDS[node.kind],
                worker_id=node.worker_id,
                depends_on=node.depends_on,
                start_token=node.start_token,
                end_token=node.end_token,
                overlap=node.overlap,
                segment_bytes=node.segment_bytes,
                chunk_tokens=node.chunk_tokens,
                priority=node.priority,
                wire_dtype=node.wire_dtype,
                source_id=node.source_id,
                micro_batch=node.micro_batch,
            )
            for node in plan.nodes
        ],
    )


def encode_explanation(explanation: Explanation) -> topology_pb2.ExplainPlanResponse:
    """What only people ask for is worked out here, not while requests are placed."""
    routed, progress = explanation.routed, explanation.progress
    states = progress.status.nodes if progress is not None else {}
    return topology_pb2.ExplainPlanResponse(
        candidates=_encode_candidates(routed) if routed is not None else (),
        counterfactual=_encode_counterfactual(routed, explanation.took_s) if routed is not None else None,
        node_states=[topology_pb2.PlanNodeStatus(node_id=id, state=state.value) for id, state in states.items()],
        plan=encode_plan(explanation.plan) if explanation.plan else None,
        events=[
            plan_pb2.PlanEvent(stage=event.stage, at_ms=event.at_ms, duration_ms=event.duration_ms, detail=event.detail)
            for event in (*explanation.events, *explanation.told())
        ],
    )


def decode_events(messages: Iterable[plan_pb2.PlanEvent]) -> list[PlanEvent]:
    return [PlanEvent(event.stage, event.at_ms, event.duration_ms, event.detail) for event in messages]


def _encode_candidates(routed: Routed) -> Iterator[topology_pb2.PlanCandidate]:
    """Who could have prefilled or decoded, as the strategy saw them, the best by prefix and load first."""
    plan, seen = routed.plan, routed.seen
    used = {node.worker_id for node in plan.nodes}
    expected_s = dict(seen.placement.expected_s)
    workers = [worker for worker in seen.workers if worker.role is not WorkerRole.KV_STORE]
    scores = {
        worker.worker_id: affinity_minus_load(seen.request, worker, [w for w in workers if w.role is worker.role])
        for worker in workers
    }
    for worker in sorted(workers, key=lambda worker: (worker.role, -scores[worker.worker_id], worker.worker_id)):
        seconds = expected_s.get(worker.worker_id)
        yield topology_pb2.PlanCandidate(
            worker_id=worker.worker_id,
            role=encode_worker_role(worker.role),
            chosen=worker.worker_id in used,
            score=scores[worker.worker_id],
            expected_ms=None if seconds is None else 1e3 * seconds,
            matched_tokens=worker.matched_tokens,
            outstanding=worker.outstanding,
            queued_tokens=worker.queued_tokens,
            sequences=worker.sequences,
        )


def _encode_counterfactual(routed: Routed, took_s: float | None) -> topology_pb2.PlanCounterfactual | None:
    separation = routed.separation
    if separation is None or separation.chosen is None or separation.other is None:
        return None
    taken_s = None if took_s is None else took_s + separation.chosen.held_up_s
    return topology_pb2.PlanCounterfactual(
        disaggregated=separation.disaggregate,
        expected_ms=1e3 * separation.chosen.total_s,
        other_expected_ms=1e3 * separation.other.total_s,
        taken_ms=None if taken_s is None else 1e3 * taken_s,
        regret_ms=None if took_s is None else 1e3 * separation.regret_s(took_s),
        detail=separation.reason,
    )
