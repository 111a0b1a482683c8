"""Every pass, and all of them together: tokens and dependencies are kept, twice is once, legal stays legal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_common.scheduler_ir.builder import IRBuilder
from sagellm_common.scheduler_ir.facts import Facts
from sagellm_common.scheduler_ir.ir_graph import IRGraph, IRRequest, Nodes, find
from sagellm_common.scheduler_ir.ir_types import WRITES_KV, PlanNodeKind
from sagellm_common.scheduler_ir.optimizer import REWRITES, IROptimizer
from sagellm_common.scheduler_ir.passes import Pass
from sagellm_common.scheduler_ir.passes.legality import check_legal
from sagellm_common.scheduler_ir.pd_separation import PDSeparator
from tests.support import plans

PASSES: tuple[Pass, ...] = (*REWRITES, PDSeparator().split, IROptimizer().optimize)
NAMES = [*(one.__name__ for one in REWRITES), "split", "optimize"]

some_passes = st.lists(st.sampled_from(PASSES), max_size=4)


def rewritten(requests: list[IRRequest], facts: Facts, passes: list[Pass]) -> IRGraph:
    graph = IRBuilder(facts.workers).build(requests)
    for one in passes:
        graph = one(graph, facts)
    return graph


def there_when_it_decodes(request: IRRequest, nodes: Nodes, facts: Facts) -> set[int]:
    """Tokens whose KV the decode worker holds when it begins to generate, by following what each node needs."""
    decode = find(nodes, PlanNodeKind.DECODE)
    assert decode is not None
    by_id = {node.node_id: node for node in nodes}
    before, todo = set[int](), list(decode.depends_on)
    while todo:
        if (one := todo.pop()) not in before:
            before.add(one)
            todo += by_id[one].depends_on

    def held(worker_id: str) -> set[int]:
        size = facts.workers[worker_id].block_tokens
        found = set(range(request.held_tokens(worker_id, size)))
        for one in before:
            node = by_id[one]
            if node.worker_id != worker_id or node.kind not in WRITES_KV:
                continue
            written = set(range(node.start_token, node.end_token))
            if node.kind is PlanNodeKind.TRANSFER and node.source_id != request.kv_source_worker_id:
                written &= held(node.source_id)
            elif node.kind is PlanNodeKind.FETCH:
                written &= set(range(request.peer[1] if node.source_id and request.peer else request.stored_tokens))
            found |= written
        return found

    return held(decode.worker_id)


@given(plans.batches(), plans.facts(), some_passes)
def test_every_token_is_there_when_it_is_read_and_generated_once(
    requests: list[IRRequest], facts: Facts, passes: list[Pass]
) -> None:
    graph = rewritten(requests, facts, passes)
    assert len(graph.nodes) == len(requests)
    for request, nodes in zip(graph.requests, graph.nodes, strict=True):
        (decode,) = [node for node in nodes if node.kind is PlanNodeKind.DECODE]
        assert there_when_it_decodes(request, nodes, facts) >= set(range(decode.start_token))
        assert decode.end_token == request.end_token
        # The last known token is computed, not only held: its output is the next one.
        computed = [node for node in nodes if node.kind is PlanNodeKind.PREFILL] or [decode]
        pulled = request.kv_source_worker_id is not None
        assert pulled or computed[-1].start_token < request.known_tokens <= computed[-1].end_token
        assert all(node.priority == request.view.priority for node in (decode, *computed))


@pytest.mark.parametrize("one", PASSES, ids=NAMES)
@given(plans.batches(), plans.facts(), some_passes)
def test_legal_in_legal_out_and_twice_is_once(
    one: Pass, requests: list[IRRequest], facts: Facts, before: list[Pass]
) -> None:
    graph = rewritten(requests, facts, before)
    check_legal(graph, facts)
    once = one(graph, facts)
    check_legal(once, facts)
    assert one(once, facts) == once


@given(plans.batches(), plans.facts())
def test_requests_do_not_get_in_each_others_way(requests: list[IRRequest], facts: Facts) -> None:
    """Together they are planned as alone; only which batch they step in depends on the others."""
    optimizer = IROptimizer()
    together = optimizer.optimize(IRBuilder(facts.workers).build(requests), facts).plans()
    for request, plan in zip(requests, together, strict=True):
        (alone,) = optimizer.optimize(IRBuilder(facts.workers).build([request]), facts).plans()
        if all(worker.stages == 1 for worker in facts.workers.values()):
            assert plan == alone
        assert plans.shape(plan) == plans.shape(alone)


@given(plans.batches(), plans.facts())
def test_what_is_optimised_computes_and_moves_no_more(requests: list[IRRequest], facts: Facts) -> None:
    graph = IRBuilder(facts.workers).build(requests)
    optimized = IROptimizer().optimize(graph, facts)
    for kind in (PlanNodeKind.PREFILL, PlanNodeKind.TRANSFER):
        assert _tokens(optimized, kind) <= _tokens(graph, kind)
    assert all(sum(node.kind is PlanNodeKind.TRANSFER for node in nodes) <= 1 for nodes in optimized.nodes)


def _tokens(graph: IRGraph, kind: PlanNodeKind) -> int:
    return sum(node.end_token - node.start_token for nodes in graph.nodes for node in nodes if node.kind is kind)
