"""Which nodes a plan has, on which tokens. Blocks are of 4 tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sagellm_common.scheduler_ir.builder import IRBuilder
from sagellm_common.scheduler_ir.ir_types import ExecutionPlan, PlanNodeKind
from sagellm_common.scheduler_ir.strategies import Placement, RequestView

DISAGGREGATED = Placement("d", "p", "s", strategy="fifo", reason="because")
NO_STORE = Placement("d", "p")
LOCAL = Placement("d")


def build(placement: Placement, prompt: int = 10, new: int = 6, **cached: object) -> ExecutionPlan:
    return IRBuilder(4, 4).build(RequestView("r", prompt), placement, max_new_tokens=new, **cached)  # type: ignore[arg-type]


def shape(plan: ExecutionPlan) -> list[tuple[str, str, int, int]]:
    return [(node.kind.value, node.worker_id, node.start_token, node.end_token) for node in plan.nodes]


def test_the_whole_way() -> None:
    plan = build(DISAGGREGATED, prefill_cached_tokens=4, store_cached_tokens=8)
    assert shape(plan) == [
        ("lookup", "p", 4, 8),
        ("fetch", "p", 4, 8),
        ("prefill", "p", 8, 10),
        ("transfer", "d", 0, 10),
        ("decode", "d", 10, 16),
        ("offload", "d", 0, 16),
    ]
    assert [node.depends_on for node in plan.nodes] == [(), (0,), (1,), (2,), (3,), (4,)]
    assert (plan.plan_id, plan.request_id, plan.strategy, plan.reason) == ("r/1", "r", "fifo", "because")


def test_who_computes_hears_how_urgent_it_is_and_prefill_by_how_many_tokens() -> None:
    plan = IRBuilder(4, 4).build(RequestView("r", 10, 7), DISAGGREGATED, max_new_tokens=6, chunk_tokens=5)
    told = {node.kind.value: (node.chunk_tokens, node.priority) for node in plan.nodes}
    assert {kind: how for kind, how in told.items() if how != (0, 0)} == {"prefill": (5, 7), "decode": (0, 7)}


def test_the_store_is_not_asked_for_what_prefill_holds() -> None:
    plan = build(DISAGGREGATED, prefill_cached_tokens=8, store_cached_tokens=8)
    assert [kind for kind, *_ in shape(plan)] == ["prefill", "transfer", "decode", "offload"]


def test_another_workers_cache_is_asked_where_it_has_more_than_prefill_and_the_stores() -> None:
    plan = build(DISAGGREGATED, prefill_cached_tokens=4, store_cached_tokens=4, peer=("d", 9))
    assert shape(plan)[:2] == [("fetch", "p", 4, 8), ("prefill", "p", 8, 10)]
    assert plan.nodes[0].source_id == "d"
    assert not any(node.source_id for node in build(DISAGGREGATED, store_cached_tokens=8, peer=("d", 8)).nodes)
    assert shape(build(NO_STORE, store_cached_tokens=8, peer=("d", 8)))[0] == ("fetch", "p", 0, 8)
    # The last token is computed, whoever has it.
    assert shape(build(NO_STORE, prompt=8, prefill_cached_tokens=4, peer=("d", 8)))[0] == ("prefill", "p", 4, 8)


def test_the_last_prompt_token_is_computed_even_if_its_block_is_cached() -> None:
    plan = build(NO_STORE, prompt=8, prefill_cached_tokens=8)
    assert shape(plan)[0] == ("prefill", "p", 4, 8)


def test_decode_pulls_only_what_it_does_not_hold() -> None:
    assert shape(build(NO_STORE, decode_cached_tokens=8))[1] == ("transfer", "d", 8, 10)


def test_each_worker_counts_in_blocks_of_its_own() -> None:
    plan = IRBuilder(6, 4).build(
        RequestView("r", 20),
        DISAGGREGATED,
        max_new_tokens=3,
        prefill_cached_tokens=12,
        store_cached_tokens=16,
        decode_cached_tokens=20,
    )
    assert shape(plan) == [
        ("lookup", "p", 12, 18),
        ("prefill", "p", 12, 20),
        ("transfer", "d", 16, 20),
        ("decode", "d", 20, 23),
        ("offload", "d", 0, 20),
    ]


def test_local_prefill() -> None:
    assert shape(build(LOCAL, decode_cached_tokens=5)) == [("decode", "d", 4, 16)]


def test_resumed_without_a_source_decode_recomputes() -> None:
    assert shape(build(NO_STORE, num_emitted_tokens=3)) == [("decode", "d", 0, 16)]


def test_resumed_with_a_source_decode_pulls() -> None:
    plan = build(LOCAL, num_emitted_tokens=1, kv_source_worker_id="p", attempt=2)
    assert shape(plan) == [("transfer", "d", 0, 10), ("decode", "d", 10, 16)]
    assert plan.plan_id == "r/2"


tokens = st.integers(0, 200)


placements = st.sampled_from([DISAGGREGATED, NO_STORE, LOCAL])


@given(st.integers(1, 100), st.integers(1, 50), tokens, tokens, tokens, placements)
def test_every_prompt_token_is_computed_fetched_or_cached(
    prompt: int, new: int, on_prefill: int, on_decode: int, in_store: int, placement: Placement
) -> None:
    plan = build(
        placement,
        prompt,
        new,
        prefill_cached_tokens=on_prefill,
        decode_cached_tokens=on_decode,
        store_cached_tokens=in_store,
    )
    decode = plan.node(PlanNodeKind.DECODE)
    assert decode is not None and decode.end_token == prompt + new
    computed = plan.node(PlanNodeKind.PREFILL) or decode
    fetched = plan.node(PlanNodeKind.FETCH)
    cached = on_prefill if placement.prefill_worker_id else on_decode
    assert computed.start_token < prompt, "the last prompt token's output is the first new token"
    assert (fetched.start_token if fetched else computed.start_token) <= cached
    if fetched:
        assert fetched.end_token == computed.start_token <= in_store
    transfer = plan.node(PlanNodeKind.TRANSFER)
    if transfer:
        assert transfer.start_token <= on_decode and transfer.end_token == prompt == decode.start_token


def test_without_a_prefill_worker_decode_fetches() -> None:
    plan = build(Placement("d", None, "s"), decode_cached_tokens=4, store_cached_tokens=8)
    assert shape(plan) == [("lookup", "d", 4, 8), ("fetch", "d", 4, 8), ("decode", "d", 8, 16), ("offload", "d", 0, 16)]
    assert [kind for kind, *_ in shape(build(Placement("d", None, "s"), store_cached_tokens=3))] == [
        "decode",
        "offload",
    ]
