"""Placed requests and what is known of their workers, by hand and drawn."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.facts import Facts, TransferHow, WorkerFacts
from sagellm_common.scheduler_ir.ir_graph import IRRequest
from sagellm_common.scheduler_ir.ir_types import ExecutionPlan
from sagellm_common.scheduler_ir.strategies import Placement, RequestView

Shape = list[tuple[str, str, int, int]]


def shape(plan: ExecutionPlan) -> Shape:
    """(kind, worker, first token, end) of each node."""
    return [(node.kind.value, node.worker_id, node.start_token, node.end_token) for node in plan.nodes]


def learned_costs(links: dict[tuple[str, str], float] | None = None) -> CostModel:
    """A prompt token takes 0.1 ms, a decode step 10 ms and 1 ms more per sequence; `links` by bytes/s."""
    costs = CostModel()
    for tokens in range(100, 4100, 100):
        costs.observe_prefill([(0, tokens)], 1e-4 * tokens)
    for sequences in range(1, 100):
        costs.observe_decode(sequences, 1000 * (sequences % 7), 0.01 + 0.001 * sequences)
    for (source, target), bytes_per_s in (links or {}).items():
        for megabytes in range(1, 11):
            costs.observe_transfer(source, target, megabytes << 20, 1e-3 + (megabytes << 20) / bytes_per_s)
    return costs


WORKERS = ("p", "q", "d", "e")


@st.composite
def facts(draw: st.DrawFn) -> Facts:
    def worker() -> WorkerFacts:
        return WorkerFacts(
            block_tokens=draw(st.sampled_from([1, 4, 6, 16])),
            queued_tokens=draw(st.integers(0, 1000)),
            sequences=draw(st.integers(0, 4)),
            context_tokens=draw(st.integers(0, 1000)),
            stages=draw(st.sampled_from([1, 1, 3])),
        )

    how = TransferHow(draw(st.sampled_from([None, False, True])), draw(st.integers(0, 100)), "same")
    return Facts(
        workers={name: worker() for name in WORKERS},
        costs=draw(st.sampled_from([None, LEARNED])),
        how_to_transfer=lambda source, target, computed, moved: how,
        kv_bytes_per_token=draw(st.sampled_from([0, 1000, 10**6])),
        num_layers=draw(st.integers(1, 4)),
        chunk_tokens=draw(st.sampled_from([0, 5])),
        tpot_target_s=draw(st.sampled_from([0.012, 0.02, 1.0])),
    )


LEARNED = learned_costs({(a, b): 1e8 for a in "pq" for b in "de"})


@st.composite
def requests(draw: st.DrawFn, number: int = 0) -> IRRequest:
    prompt, new = draw(st.integers(1, 90)), draw(st.integers(1, 40))
    held = st.integers(0, 120)
    emitted = draw(st.sampled_from([0, 0, 1])) * draw(st.integers(0, new - 1))
    how: dict[str, Any] = {}
    if emitted:
        how = draw(st.sampled_from([{}, {"kv_source_worker_id": "p"}, {"migrate_from_worker_id": "e"}]))
    return IRRequest(
        RequestView(f"r{number}", prompt, draw(st.integers(-3, 3))),
        Placement(
            draw(st.sampled_from(["d", "e"])),
            draw(st.sampled_from([None, "p", "q"])),
            draw(st.sampled_from([None, "s"])),
            strategy="drawn",
            chunk_tokens=draw(st.sampled_from([0, 32])),
            switch_worker_ids=draw(st.sampled_from([(), ("d",), ("p", "e")])),
        ),
        max_new_tokens=new,
        cached_tokens={name: draw(held) for name in WORKERS},
        stored_tokens=draw(held),
        peer=draw(st.sampled_from([None, ("x", draw(held))])),
        num_emitted_tokens=emitted,
        num_draft_tokens=draw(st.sampled_from([0, 3])),
        **how,
    )


@st.composite
def batches(draw: st.DrawFn) -> list[IRRequest]:
    return [draw(requests(number)) for number in range(draw(st.integers(1, 4)))]
