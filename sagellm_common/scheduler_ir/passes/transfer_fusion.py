"""One pull per handoff: transfers of a request between the same two workers become one.

The receiver's lease, handshake and digest check are per pull, and a pull follows what its source computes: what was
there before goes first, without waiting for the rest (`overlap` says whether it goes at once). How many bytes share a
message is `overlap`'s segment, from the link's measured costs.
"""

from __future__ import annotations

from sagellm_common.scheduler_ir.facts import Facts
from sagellm_common.scheduler_ir.ir_graph import IRGraph, IRRequest, Nodes
from sagellm_common.scheduler_ir.ir_types import IRNode, PlanNodeKind


def fuse_transfers(graph: IRGraph, facts: Facts) -> IRGraph:
    return graph.each(_fuse)


def _fuse(request: IRRequest, nodes: Nodes) -> Nodes:
    whole: dict[tuple[str, str], IRNode] = {}
    """By source and receiver: what was fused so far, under the id of its last part."""
    parts: dict[int, int] = {}
    """A part's id → that of the next one."""
    for node in nodes:
        if node.kind is not PlanNodeKind.TRANSFER:
            continue
        pair = node.source_id, node.worker_id
        so_far = whole.get(pair)
        if so_far is not None and so_far.end_token == node.start_token:
            parts[so_far.node_id] = node.node_id
            depends_on = dict.fromkeys((*so_far.depends_on, *node.depends_on))
            depends_on.pop(so_far.node_id, None)
            node = node.cut(so_far.start_token, node.end_token, tuple(depends_on))
        whole[pair] = node
    if not parts:
        return nodes
    fused = {node.node_id: node for node in whole.values()}
    return tuple(_follow(fused.get(node.node_id, node), parts) for node in nodes if node.node_id not in parts)


def _follow(node: IRNode, parts: dict[int, int]) -> IRNode:
    """What waited for a part waits for the whole."""
    if parts.keys().isdisjoint(node.depends_on):
        return node
    depends_on = list(node.depends_on)
    while not parts.keys().isdisjoint(depends_on):
        depends_on = [parts.get(one, one) for one in depends_on]
    return node.cut(node.start_token, node.end_token, tuple(dict.fromkeys(depends_on)))
