"""In which of its worker's batches a sequence steps: as many batches as its pipeline has stages, evenly loaded.

While one batch is in a stage the others keep the rest busy. A worker of one stage has one batch, for another one would
read all weights once more per step (the `a` of the decode cost); all of today's engines have one, so their plans stay.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from sagellm_common.scheduler_ir.facts import Facts
from sagellm_common.scheduler_ir.ir_graph import IRGraph, find
from sagellm_common.scheduler_ir.ir_types import PlanNodeKind


def batch_decodes(graph: IRGraph, facts: Facts) -> IRGraph:
    if all(worker.stages == 1 for worker in facts.workers.values()):
        return graph
    staged: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for i, nodes in enumerate(graph.nodes):
        decode = find(nodes, PlanNodeKind.DECODE)
        if decode is not None and facts.workers[decode.worker_id].stages > 1:
            staged[decode.worker_id].append((-decode.end_token, i))
    batch_of: dict[int, int] = {}
    for worker_id, sequences in staged.items():
        # The longest first, each to the batch with the least context so far (Graham's LPT rule).
        context = [0] * facts.workers[worker_id].stages
        for minus_end, i in sorted(sequences):
            batch_of[i] = min(range(len(context)), key=lambda batch: (context[batch], batch))
            context[batch_of[i]] -= minus_end
    rewritten = tuple(
        tuple(
            replace(node, micro_batch=batch_of[i]) if node.kind is PlanNodeKind.DECODE and i in batch_of else node
            for node in nodes
        )
        for i, nodes in enumerate(graph.nodes)
    )
    return replace(graph, nodes=rewritten)
