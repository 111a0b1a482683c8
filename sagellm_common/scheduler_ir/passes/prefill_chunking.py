"""By how many tokens a prompt is computed at a time.

As configured; and where others decode on the same worker, as the strategy has it, or by so many that a chunk between
two of their steps leaves them within the TPOT target,

    prefill_s(chunk) + decode_s(batch) ≤ HEADROOM · target

but is no shorter than such a step: prompts get half of the worker's time at least, else they pile up. A chunk of k
tokens that ends at token n costs at most a + b·k + c·2nk (see `cost_model`), whence k. On a worker that only prefills
nobody's step waits: there the configured chunk is what more urgent prompts have to wait for.
"""

from __future__ import annotations

import math
from dataclasses import replace

from sagellm_common.scheduler_ir.facts import Facts
from sagellm_common.scheduler_ir.ir_graph import IRGraph, IRRequest, Nodes, find, full_blocks
from sagellm_common.scheduler_ir.ir_types import PlanNodeKind

HEADROOM = 0.8
"""Of the target: predictions are averages."""
LEAST_CHUNK_TOKENS = 32
"""Below, the fixed cost of a step eats what chunking saves the others, and the prompt takes forever."""


def chunk_prefills(graph: IRGraph, facts: Facts) -> IRGraph:
    def rewrite(request: IRRequest, nodes: Nodes) -> Nodes:
        prefill = find(nodes, PlanNodeKind.PREFILL)
        if prefill is None:
            return nodes
        here = request.placement.prefill_worker_id is None and request.placement.chunk_tokens
        chunk = here or chunk_tokens(prefill.worker_id, prefill.start_token, prefill.end_token, facts)
        if chunk == prefill.chunk_tokens:
            return nodes
        return tuple(replace(node, chunk_tokens=chunk) if node is prefill else node for node in nodes)

    return graph.each(rewrite)


def chunk_tokens(worker_id: str, start_token: int, end_token: int, facts: Facts) -> int:
    """Of tokens [start_token, end_token) of a prompt on this worker; 0: as it is configured."""
    worker, costs = facts.workers[worker_id], facts.costs
    if not worker.sequences or costs is None or not costs.prefill.samples or math.isinf(facts.tpot_target_s):
        return facts.chunk_tokens
    base_s, token_s, square_s = costs.prefill.coefficients
    step_s = costs.decode.mean_s(worker.sequences, worker.context_tokens)
    chunk_s = max(HEADROOM * facts.tpot_target_s - step_s, step_s) - base_s
    each_s = token_s + 2 * square_s * end_token
    most = int(chunk_s / each_s) if each_s > 0 else end_token
    if most >= end_token - start_token:
        return facts.chunk_tokens
    chunk = max(LEAST_CHUNK_TOKENS, full_blocks(most, worker.block_tokens) or most)
    return min(chunk, facts.chunk_tokens) if facts.chunk_tokens else chunk
