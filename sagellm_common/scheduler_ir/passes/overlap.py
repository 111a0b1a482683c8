"""Whether KV crosses while it is computed, in which pieces and in which dtype, by what the link is known to cost."""

from __future__ import annotations

from dataclasses import replace

from sagellm_common.scheduler_ir.facts import Facts
from sagellm_common.scheduler_ir.ir_graph import IRGraph, IRRequest, Nodes
from sagellm_common.scheduler_ir.ir_types import IRNode, PlanNodeKind

MOVES = frozenset({PlanNodeKind.TRANSFER, PlanNodeKind.MIGRATE})


def overlap_transfers(graph: IRGraph, facts: Facts) -> IRGraph:
    def rewrite(request: IRRequest, nodes: Nodes) -> Nodes:
        return tuple(_planned(node, nodes, facts) if node.kind in MOVES else node for node in nodes)

    return graph.each(rewrite)


def _planned(transfer: IRNode, nodes: Nodes, facts: Facts) -> IRNode:
    computed = sum(
        node.end_token - node.start_token
        for node in nodes
        if node.kind is PlanNodeKind.PREFILL and node.worker_id == transfer.source_id
    )
    moved = transfer.end_token - transfer.start_token
    how = facts.how_to_transfer(transfer.source_id, transfer.worker_id, computed, moved)
    return replace(transfer, overlap=how.overlap, segment_bytes=how.segment_bytes, wire_dtype=how.wire_dtype)
