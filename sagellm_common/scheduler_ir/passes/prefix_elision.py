"""What workers and stores hold already is neither computed nor moved.

    before   Lookup [0, n) ─► Prefill [0, n) ─────────────────► Transfer [0, n)
    after    Lookup [p, n) ─► Fetch [p, s) ─► Prefill [s, n) ─► Transfer [s, n)
                                        └───► Transfer [d, s) ────┘

p, d and s of the n prompt tokens are held by who computes, by who decodes and by the kv_stores. What the source holds
before it computes waits for nothing but the fetch.
"""

from __future__ import annotations

from sagellm_common.scheduler_ir.facts import Facts
from sagellm_common.scheduler_ir.ir_graph import IRGraph, IRRequest, Nodes, find, full_blocks
from sagellm_common.scheduler_ir.ir_types import IRNode, PlanNodeKind


def elide_prefixes(graph: IRGraph, facts: Facts) -> IRGraph:
    def rewrite(request: IRRequest, nodes: Nodes) -> Nodes:
        prefill = next((node for node in nodes if node.kind is PlanNodeKind.PREFILL), None)
        if prefill is None:
            return _elide_pulled(request, nodes, facts)
        return _elide_moved(request, *_elide_computed(request, nodes, prefill, facts), facts)

    return graph.each(rewrite)


def _elide_pulled(request: IRRequest, nodes: Nodes, facts: Facts) -> Nodes:
    """Of KV that is all there: from an earlier attempt, or of a sequence that moves."""

    def pulled(node: IRNode) -> IRNode:
        held = request.held_tokens(node.worker_id, facts.workers[node.worker_id].block_tokens)
        return node if node.start_token == held else node.cut(held, node.end_token, node.depends_on)

    kinds = PlanNodeKind.TRANSFER, PlanNodeKind.MIGRATE
    return tuple(pulled(node) if node.kind in kinds else node for node in nodes)


def _elide_computed(request: IRRequest, nodes: Nodes, prefill: IRNode, facts: Facts) -> tuple[Nodes, IRNode]:
    """And the prefill as it is now. Another worker's cache is asked where it has more than this one and the stores."""
    worker, size = prefill.worker_id, facts.workers[prefill.worker_id].block_tokens
    held = request.held_tokens(worker, size)
    lookup = find(nodes, PlanNodeKind.LOOKUP)
    fetched = full_blocks(min(request.stored_tokens, lookup.end_token), size) if lookup is not None else 0
    source = ""
    if request.peer is not None and worker == request.placement.prefill_worker_id:
        on_peer = full_blocks(min(request.peer[1], request.prompt_tokens - 1), size)
        if on_peer > max(held, fetched):
            source, fetched = request.peer[0], on_peer
    fetch = find(nodes, PlanNodeKind.FETCH)
    after = (fetch or prefill).depends_on
    rewritten: list[IRNode] = []
    for node in nodes:
        if node is lookup:
            if source or held >= node.end_token:
                after = node.depends_on
            else:
                rewritten.append(node.cut(held, node.end_token, node.depends_on))
                after = (node.node_id,)
        elif node.kind is PlanNodeKind.PREFILL:
            if fetched > held:
                number = fetch.node_id if fetch is not None else 1 + max(node.node_id for node in nodes)
                found = IRNode(number, PlanNodeKind.FETCH, worker, after, held, fetched, source_id=source)
                rewritten.append(found)
                after = (number,)
            prefill = node.cut(max(held, fetched), node.end_token, after)
            rewritten.append(prefill)
        elif node is not fetch:
            rewritten.append(node)
    return tuple(rewritten), prefill


def _elide_moved(request: IRRequest, nodes: Nodes, prefill: IRNode, facts: Facts) -> Nodes:
    """Cuts what the receiver holds off the transfer, and parts it where the source begins to compute."""
    moves = [node for node in nodes if node.kind is PlanNodeKind.TRANSFER]
    if not moves:
        return nodes
    early, move = moves[0], moves[-1]
    size = facts.workers[move.worker_id].block_tokens
    held = request.held_tokens(move.worker_id, size)
    ready = full_blocks(prefill.start_token, size)
    if ready <= held:
        late = move.cut(held, move.end_token, move.depends_on)
        return tuple(late if node is move else node for node in nodes)
    early_id = early.node_id if early is not move else 1 + max(node.node_id for node in nodes)
    early = move.cut(held, ready, prefill.depends_on, early_id)
    rewritten: list[IRNode] = []
    for node in nodes:
        if node is move:
            in_order = move.depends_on if early_id in move.depends_on else (*move.depends_on, early_id)
            rewritten += (early, move.cut(ready, move.end_token, in_order))
        elif node.kind is not PlanNodeKind.TRANSFER:
            rewritten.append(node)
    return tuple(rewritten)
