"""What every plan must be, checked before it is handed out.

acyclic      nodes come after what they depend on
tokens       who reads KV finds it: held by the worker, or written there before by what the reader depends on
one owner    no token's KV is written twice on a worker, and blocks with two writers are written one after the other
budgets      what is written on a worker fits into its pool
"""

from __future__ import annotations

from sagellm_common.core.errors import ContextTooLong
from sagellm_common.scheduler_ir.facts import Facts
from sagellm_common.scheduler_ir.ir_graph import IRGraph, IRRequest, Nodes
from sagellm_common.scheduler_ir.ir_types import WRITES_KV, IRNode, PlanNodeKind


class IllegalPlan(ValueError):
    """A builder or a pass is wrong."""


def check_legal(graph: IRGraph, facts: Facts) -> IRGraph:
    """The graph as it came. Raises IllegalPlan, and ContextTooLong for what fits into no pool that it was placed on."""
    for request, nodes in zip(graph.requests, graph.nodes, strict=True):
        before = _ancestors(request, nodes)
        _check_writers(request, nodes, before, facts)
        _check_readers(request, nodes, before, facts)
    return graph


def _ancestors(request: IRRequest, nodes: Nodes) -> dict[int, int]:
    """Node id → bits of the places of all nodes that it comes after."""
    places: dict[int, int] = {}
    before: dict[int, int] = {}
    for place, node in enumerate(nodes):
        bits = 0
        for one in node.depends_on:
            if one not in before:
                raise _illegal(request, node, f"depends on node {one}, which does not come before it")
            bits |= before[one] | 1 << places[one]
        if node.node_id in before:
            raise _illegal(request, node, "has the id of another one")
        before[node.node_id], places[node.node_id] = bits, place
    return before


def _check_writers(request: IRRequest, nodes: Nodes, before: dict[int, int], facts: Facts) -> None:
    writers = [
        (place, node) for place, node in enumerate(nodes) if node.kind in WRITES_KV or node.kind is PlanNodeKind.DECODE
    ]
    for at, (_, node) in enumerate(writers):
        worker = facts.workers[node.worker_id]
        # What is generated may end sooner than it may at most: only what is known to come has to fit.
        needed = node.end_token if node.kind in WRITES_KV else node.start_token
        if 0 < worker.kv_tokens < needed:
            raise ContextTooLong(
                f"request {request.view.request_id} needs KV of {needed} tokens on worker {node.worker_id}, whose pool "
                f"holds {worker.kv_tokens}: shorten the prompt or raise engine.num_blocks"
            )
        for place, other in writers[:at]:
            if other.worker_id != node.worker_id:
                continue
            if other.start_token < node.end_token and node.start_token < other.end_token:
                raise _illegal(request, node, f"writes tokens that node {other.node_id} writes, too")
            size = worker.block_tokens
            shares = (
                other.start_token // size <= (node.end_token - 1) // size
                and node.start_token // size <= (other.end_token - 1) // size
            )
            if shares and not before[node.node_id] >> place & 1:
                raise _illegal(request, node, f"writes a block of node {other.node_id} without waiting for it")


def _check_readers(request: IRRequest, nodes: Nodes, before: dict[int, int], facts: Facts) -> None:
    """A prefill or decode reads all tokens before its own, a transfer those that it moves."""
    for node in nodes:
        match node.kind:
            case PlanNodeKind.PREFILL | PlanNodeKind.DECODE:
                where, wanted = node.worker_id, node.start_token
            case PlanNodeKind.TRANSFER if node.source_id != request.kv_source_worker_id:
                where, wanted = node.source_id, node.end_token
            case _:
                continue
        there = request.held_tokens(where, facts.workers[where].block_tokens)
        parts = sorted(
            (other.start_token, other.end_token)
            for place, other in enumerate(nodes)
            if other.worker_id == where and other.kind in WRITES_KV and before[node.node_id] >> place & 1
        )
        for start, end in parts:
            if start > there:
                break
            there = max(there, end)
        if there < wanted:
            raise _illegal(request, node, f"needs KV of {wanted} tokens on {where}, but only {there} are there by then")


def _illegal(request: IRRequest, node: IRNode, what: str) -> IllegalPlan:
    return IllegalPlan(
        f"request {request.view.request_id}: node {node.node_id} ({node.kind} on {node.worker_id}) {what}"
    )
