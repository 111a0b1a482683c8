"""Plans and events on the wire."""

from __future__ import annotations

from collections.abc import Iterable

from sagellm_common.rpc.gen.sagellm.v1 import plan_pb2, topology_pb2
from sagellm_common.scheduler_ir.ir_types import ExecutionPlan, PlanNodeKind
from services.router.explain import Explanation, PlanEvent

_KINDS = {
    PlanNodeKind.LOOKUP: plan_pb2.PLAN_NODE_KIND_LOOKUP,
    PlanNodeKind.FETCH: plan_pb2.PLAN_NODE_KIND_FETCH,
    PlanNodeKind.PREFILL: plan_pb2.PLAN_NODE_KIND_PREFILL,
    PlanNodeKind.TRANSFER: plan_pb2.PLAN_NODE_KIND_TRANSFER,
    PlanNodeKind.DECODE: plan_pb2.PLAN_NODE_KIND_DECODE,
    PlanNodeKind.OFFLOAD: plan_pb2.PLAN_NODE_KIND_OFFLOAD,
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
            )
            for node in plan.nodes
        ],
    )


def encode_explanation(explanation: Explanation) -> topology_pb2.ExplainPlanResponse:
    return topology_pb2.ExplainPlanResponse(
        plan=encode_plan(explanation.plan) if explanation.plan else None,
        events=[
            plan_pb2.PlanEvent(stage=event.stage, at_ms=event.at_ms, duration_ms=event.duration_ms, detail=event.detail)
            for event in (*explanation.events, *explanation.told())
        ],
    )


def decode_events(messages: Iterable[plan_pb2.PlanEvent]) -> list[PlanEvent]:
    return [PlanEvent(event.stage, event.at_ms, event.duration_ms, event.detail) for event in messages]
