"""Which nodes a plan has, on which tokens: as built, and optimised. Blocks are of 4 tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sagellm_common.core.errors import ContextTooLong
from sagellm_common.scheduler_ir.builder import IRBuilder
from sagellm_common.scheduler_ir.facts import Facts, TransferHow, WorkerFacts
from sagellm_common.scheduler_ir.ir_graph import IRGraph, IRRequest
from sagellm_common.scheduler_ir.ir_types import ExecutionPlan, IRNode, PlanNodeKind
from sagellm_common.scheduler_ir.optimizer import IROptimizer
from sagellm_common.scheduler_ir.passes.legality import IllegalPlan, check_legal
from sagellm_common.scheduler_ir.passes.prefix_elision import elide_prefixes
from sagellm_common.scheduler_ir.strategies import Placement, RequestView
from tests.support.plans import LEARNED, shape

DISAGGREGATED = Placement("d", "p", "s", strategy="fifo", reason="because")
NO_STORE = Placement("d", "p")
LOCAL = Placement("d")
FACTS = Facts({"p": WorkerFacts(4), "d": WorkerFacts(4)})


def request(placement: Placement = NO_STORE, prompt: int = 10, new: int = 6, **how: Any) -> IRRequest:
    cached = {name: how.pop(name) for name in ("p", "d") if name in how}
    return IRRequest(RequestView("r", prompt, how.pop("priority", 0)), placement, new, cached, **how)


def optimized(one: IRRequest, facts: Facts = FACTS) -> ExecutionPlan:
    (plan,) = IROptimizer().optimize(IRBuilder(facts.workers).build([one]), facts).plans()
    return plan


def test_the_whole_way() -> None:
    plan = optimized(request(DISAGGREGATED, p=4, stored_tokens=8))
    assert shape(plan) == [
        ("lookup", "p", 4, 8),
        ("fetch", "p", 4, 8),
        ("prefill", "p", 8, 10),
        ("transfer", "d", 0, 10),
        ("decode", "d", 10, 16),
        ("offload", "d", 0, 16),
    ]
    lookup, fetch, prefill, transfer, decode, offload = plan.nodes
    assert fetch.depends_on == (lookup.node_id,) and prefill.depends_on == (fetch.node_id,)
    assert set(transfer.depends_on) == {fetch.node_id, prefill.node_id}, "what was fetched need not wait for the rest"
    assert decode.depends_on == (transfer.node_id,) and offload.depends_on == (decode.node_id,)
    assert transfer.source_id == "p" and plan.prefill_worker_id == "p"
    assert (plan.plan_id, plan.request_id, plan.strategy, plan.reason) == ("r/1", "r", "fifo", "because")


def test_what_is_built_reuses_nothing() -> None:
    (plan,) = IRBuilder(FACTS.workers).build([request(DISAGGREGATED, p=4, d=8, stored_tokens=8)]).plans()
    assert shape(plan) == [
        ("lookup", "p", 0, 8),
        ("prefill", "p", 0, 10),
        ("transfer", "d", 0, 10),
        ("decode", "d", 10, 16),
        ("offload", "d", 0, 16),
    ]


def test_what_the_source_holds_already_waits_for_nothing() -> None:
    graph = elide_prefixes(IRBuilder(FACTS.workers).build([request(p=8, d=4)]), FACTS)
    (plan,) = graph.plans()
    assert shape(plan) == [
        ("prefill", "p", 8, 10),
        ("transfer", "d", 4, 8),
        ("transfer", "d", 8, 10),
        ("decode", "d", 10, 16),
    ]
    prefill, early, late, decode = plan.nodes
    assert early.depends_on == () and set(late.depends_on) == {prefill.node_id, early.node_id}
    assert decode.depends_on == (late.node_id,)
    assert shape(optimized(request(p=8, d=4)))[1] == ("transfer", "d", 4, 10), "but it is one pull"


def test_another_workers_cache_is_asked_where_it_has_more_than_prefill_and_the_stores() -> None:
    plan = optimized(request(DISAGGREGATED, p=4, stored_tokens=4, peer=("d", 9)))
    assert shape(plan)[:2] == [("fetch", "p", 4, 8), ("prefill", "p", 8, 10)]
    assert plan.nodes[0].source_id == "d"
    stored = optimized(request(DISAGGREGATED, stored_tokens=8, peer=("d", 8)))
    assert not any(node.source_id for node in stored.nodes if node.kind is PlanNodeKind.FETCH)
    assert shape(optimized(request(stored_tokens=8, peer=("d", 8))))[0] == ("fetch", "p", 0, 8)
    # The last token is computed, whoever has it.
    assert shape(optimized(request(prompt=8, p=4, peer=("d", 8))))[0] == ("prefill", "p", 4, 8)


def test_the_store_is_not_asked_for_what_prefill_holds() -> None:
    plan = optimized(request(DISAGGREGATED, p=8, stored_tokens=8))
    assert [kind for kind, *_ in shape(plan)] == ["prefill", "transfer", "decode", "offload"]


def test_the_last_prompt_token_is_computed_even_if_its_block_is_cached() -> None:
    assert shape(optimized(request(prompt=8, p=8)))[0] == ("prefill", "p", 4, 8)


def test_each_worker_counts_in_blocks_of_its_own() -> None:
    facts = Facts({"p": WorkerFacts(6), "d": WorkerFacts(4)})
    plan = optimized(request(DISAGGREGATED, 20, 3, p=12, stored_tokens=16, d=20), facts)
    assert shape(plan) == [
        ("lookup", "p", 12, 18),
        ("prefill", "p", 12, 20),
        ("transfer", "d", 16, 20),
        ("decode", "d", 20, 23),
        ("offload", "d", 0, 20),
    ]


def test_where_nobody_else_prefills_decode_does() -> None:
    assert shape(optimized(request(LOCAL, d=5))) == [("prefill", "d", 4, 10), ("decode", "d", 10, 16)]
    plan = optimized(request(Placement("d", None, "s"), d=4, stored_tokens=8))
    assert plan.prefill_worker_id is None
    assert shape(plan) == [
        ("lookup", "d", 4, 8),
        ("fetch", "d", 4, 8),
        ("prefill", "d", 8, 10),
        ("decode", "d", 10, 16),
        ("offload", "d", 0, 16),
    ]


def test_resumed_without_a_source_what_was_emitted_is_computed_too() -> None:
    assert shape(optimized(request(num_emitted_tokens=3))) == [("prefill", "d", 0, 13), ("decode", "d", 13, 16)]


def test_resumed_with_a_source_decode_pulls() -> None:
    plan = optimized(request(LOCAL, num_emitted_tokens=1, kv_source_worker_id="p", attempt=2))
    assert shape(plan) == [("transfer", "d", 0, 10), ("decode", "d", 10, 16)]
    assert plan.plan_id == "r/2" and plan.nodes[0].source_id == "p"


def test_a_sequence_that_moves_brings_the_kv_of_all_but_its_newest_token() -> None:
    plan = optimized(request(LOCAL, d=4, num_emitted_tokens=3, migrate_from_worker_id="e"))
    assert shape(plan) == [("migrate", "d", 4, 12), ("decode", "d", 12, 16)]
    assert plan.nodes[0].source_id == "e"


def test_another_model_is_loaded_first_and_drafts_are_verified() -> None:
    plan = optimized(request(replace(LOCAL, switch_worker_ids=("d",)), num_draft_tokens=4))
    assert [kind for kind, *_ in shape(plan)] == ["switch_model", "prefill", "decode", "verify"]


def test_who_computes_hears_how_urgent_it_is_and_prefill_by_how_many_tokens() -> None:
    plan = optimized(request(priority=7), replace(FACTS, chunk_tokens=5))
    told = {node.kind.value: (node.chunk_tokens, node.priority) for node in plan.nodes}
    assert told == {"prefill": (5, 7), "transfer": (0, 0), "decode": (0, 7)}


def test_a_chunk_leaves_those_who_decode_there_their_pace() -> None:
    """0.1 ms a token and a step of 12 ms with two sequences, in 0.8 of the target."""
    busy = Facts({"d": WorkerFacts(4, sequences=2, context_tokens=1000)}, LEARNED, tpot_target_s=0.05)
    plan = optimized(request(LOCAL, prompt=1000), busy)
    assert plan.nodes[0].chunk_tokens == pytest.approx(280, abs=8)
    assert optimized(request(LOCAL, prompt=200), busy).nodes[0].chunk_tokens == 0, "all of it fits into a step"
    idle = replace(busy, workers={"d": WorkerFacts(4)})
    assert optimized(request(LOCAL, prompt=1000), idle).nodes[0].chunk_tokens == 0
    planned = replace(LOCAL, chunk_tokens=48)
    assert optimized(request(planned, prompt=1000), busy).nodes[0].chunk_tokens == 48, "the strategy's word"
    tight = replace(busy, tpot_target_s=0.001)
    assert optimized(request(LOCAL, prompt=1000), tight).nodes[0].chunk_tokens == 112, "half of the time at least"


def test_the_link_says_how_kv_crosses() -> None:
    asked = []

    def how(source: str, target: str, computed: int, moved: int) -> TransferHow:
        asked.append((source, target, computed, moved))
        return TransferHow(True, 4096, "bf16")

    transfer = optimized(request(p=4, d=8), replace(FACTS, how_to_transfer=how)).node(PlanNodeKind.TRANSFER)
    assert transfer is not None
    assert (transfer.overlap, transfer.segment_bytes, transfer.wire_dtype) == (True, 4096, "bf16")
    assert asked == [("p", "d", 6, 2)]


def test_batches_are_as_many_as_stages_and_evenly_loaded() -> None:
    facts = Facts({"p": WorkerFacts(4), "d": WorkerFacts(4, stages=2)})
    requests = [request(prompt=prompt) for prompt in (100, 90, 50, 40)]
    plans = IROptimizer().optimize(IRBuilder(facts.workers).build(requests), facts).plans()
    decodes = [plan.node(PlanNodeKind.DECODE) for plan in plans]
    assert [node.micro_batch for node in decodes if node] == [0, 1, 1, 0]


# ---- what is not legal ----


def edited(*nodes: IRNode) -> IRGraph:
    return IRGraph((request(),), (nodes,), (None,))


def node(number: int, kind: PlanNodeKind, worker: str, after: tuple[int, ...], start: int, end: int) -> IRNode:
    return IRNode(number, kind, worker, after, start, end, source_id="p" if kind is PlanNodeKind.TRANSFER else "")


PREFILL = node(0, PlanNodeKind.PREFILL, "p", (), 0, 10)
TRANSFER = node(1, PlanNodeKind.TRANSFER, "d", (0,), 0, 10)
DECODE = node(2, PlanNodeKind.DECODE, "d", (1,), 10, 16)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ((TRANSFER, PREFILL, DECODE), "depends on node 0, which does not come before it"),
        ((PREFILL, TRANSFER, replace(DECODE, node_id=1)), "has the id of another one"),
        ((PREFILL, DECODE.cut(10, 16, (0,))), "needs KV of 10 tokens on d, but only 0 are there"),
        ((PREFILL, TRANSFER, DECODE.cut(10, 16, (0,))), "writes a block of node 1 without waiting for it"),
        ((PREFILL, TRANSFER.cut(0, 8, (0,)), DECODE), "but only 8 are there"),
        ((PREFILL.cut(4, 10, ()), TRANSFER, DECODE), "needs KV of 4 tokens on p"),
        ((PREFILL, TRANSFER.cut(0, 10, ()), DECODE), "needs KV of 10 tokens on p, but only 0"),
        ((PREFILL, TRANSFER, TRANSFER.cut(8, 10, (0,), 3), DECODE), "writes tokens that node 1 writes, too"),
    ],
)
def test_what_no_worker_could_do_is_found(nodes: tuple[IRNode, ...], said: str) -> None:
    check_legal(edited(PREFILL, TRANSFER, DECODE), FACTS)
    with pytest.raises(IllegalPlan, match=said):
        check_legal(edited(*nodes), FACTS)


def test_a_prompt_that_a_pool_cannot_hold_is_told_so() -> None:
    facts = Facts({"p": WorkerFacts(4, kv_tokens=400), "d": WorkerFacts(4, kv_tokens=100)})
    optimized(request(prompt=100, new=100), facts)
    with pytest.raises(ContextTooLong, match="KV of 101 tokens on worker d, whose pool holds 100"):
        optimized(request(prompt=101), facts)
