from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm_common.core.errors import ConfigError, NoWorker
from sagellm_common.core.types import WorkerRole
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.strategies import STRATEGIES, Placement, RequestView, WorkerView, make_strategy
from sagellm_common.scheduler_ir.strategies.scoring import affinity_minus_load

REQUEST = RequestView("r", 100)


def worker(worker_id: str, role: WorkerRole, **state: int) -> WorkerView:
    return WorkerView(worker_id, role, **state)


def place(*workers: WorkerView) -> Placement:
    return make_strategy("fifo").place(REQUEST, workers)


def test_unknown_strategies_list_the_known() -> None:
    with pytest.raises(ConfigError, match="'lifo'; known: adaptive, aegaeon, fifo"):
        make_strategy("lifo")


def test_the_idlest_of_each_role() -> None:
    placement = place(
        worker("p0", WorkerRole.PREFILL, outstanding=3),
        worker("p1", WorkerRole.PREFILL),
        worker("d0", WorkerRole.DECODE, outstanding=1),
        worker("d1", WorkerRole.DECODE),
        worker("s0", WorkerRole.KV_STORE),
    )
    assert (placement.prefill_worker_id, placement.decode_worker_id) == ("p1", "d1")
    assert placement.kv_store_worker_id == "s0" and placement.strategy == "fifo"
    assert "disaggregated" in placement.reason and "d1" in placement.reason


def test_equals_take_turns() -> None:
    assert place(worker("d0", WorkerRole.DECODE, assigned=1), worker("d1", WorkerRole.DECODE)).decode_worker_id == "d1"


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"d0": 0.1, "d1": 0.01}, "d1"),
        ({"d0": 0.1, "d1": 0.09}, "d0"),  # about as near: they take turns
        ({"d0": 0.1}, "d0"),
        ({"d1": 0.01}, "d0"),  # nobody knows how far d0 is
        ({"d0": 0.1, "d1": 0.01, "busy": 0.0001}, "d1"),
    ],
)
def test_of_equal_decode_workers_the_one_that_kv_comes_to_soonest(seconds: dict[str, float], chosen: str) -> None:
    request = replace(REQUEST, pull_seconds=lambda source, target: seconds.get(target) if source == "p0" else None)
    workers = [
        worker("p0", WorkerRole.PREFILL),
        worker("d0", WorkerRole.DECODE),
        worker("d1", WorkerRole.DECODE, assigned=7),
        worker("busy", WorkerRole.DECODE, outstanding=2),
    ]
    assert make_strategy("fifo").place(request, workers).decode_worker_id == chosen


def test_a_cached_prefix_outweighs_load_until_the_load_is_high() -> None:
    holder = {"matched_tokens": 60}
    busy, idle = worker("a", WorkerRole.DECODE, outstanding=1, **holder), worker("b", WorkerRole.DECODE)
    assert place(busy, idle).decode_worker_id == "a"
    swamped = worker("a", WorkerRole.DECODE, outstanding=20, **holder)
    assert place(swamped, idle).decode_worker_id == "b"


def test_local_prefill_without_a_prefill_worker() -> None:
    placement = place(worker("d0", WorkerRole.DECODE))
    assert placement.prefill_worker_id is None and "no prefill worker" in placement.reason


def test_a_worker_of_both_roles_does_not_hand_over_to_itself() -> None:
    placement = place(worker("b0", WorkerRole.BOTH))
    assert (placement.prefill_worker_id, placement.decode_worker_id) == (None, "b0")
    placement = place(worker("b0", WorkerRole.BOTH), worker("p0", WorkerRole.PREFILL, outstanding=9))
    assert (placement.prefill_worker_id, placement.decode_worker_id) == ("p0", "b0")


@pytest.mark.parametrize("roles", [[], [WorkerRole.PREFILL], [WorkerRole.KV_STORE]])
def test_nobody_decodes(roles: list[WorkerRole]) -> None:
    with pytest.raises(NoWorker, match="no decode worker"):
        place(*(worker(role.value, role) for role in roles))


views = st.builds(
    WorkerView,
    worker_id=st.text("abc", min_size=1, max_size=2),
    role=st.just(WorkerRole.DECODE),
    outstanding=st.integers(0, 1000),
    assigned=st.integers(0, 1000),
    matched_tokens=st.integers(0, 200),
)


@given(st.lists(views, min_size=1, max_size=5, unique_by=lambda view: view.worker_id))
def test_scores_are_within_0_and_1_and_the_choice_is_deterministic(workers: list[WorkerView]) -> None:
    assert all(0.0 <= affinity_minus_load(REQUEST, one, workers) <= 1.0 for one in workers)
    assert place(*workers) == place(*reversed(workers))


@pytest.mark.parametrize(
    ("stored", "on_decode", "local"), [(80, 0, True), (68, 64, True), (67, 0, False), (80, 80, False), (0, 0, False)]
)
def test_what_the_stores_hold_nearly_all_of_needs_no_prefill_worker(stored: int, on_decode: int, local: bool) -> None:
    """32 of 100 prompt tokens may be left to compute, and decode must hold less itself."""
    placement = place(
        worker("p0", WorkerRole.PREFILL),
        worker("d0", WorkerRole.DECODE, matched_tokens=on_decode),
        worker("s0", WorkerRole.KV_STORE, matched_tokens=stored),
    )
    assert (placement.prefill_worker_id is None) == local
    assert (f"the kv_store holds all but {100 - stored} prompt tokens" in placement.reason) == local


seconds = st.floats(1e-6, 10.0)
tokens = st.integers(0, 10_000)
clusters = st.lists(
    st.builds(
        WorkerView,
        worker_id=st.text("abcdef", min_size=1, max_size=2),
        role=st.sampled_from([WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.BOTH]),
        matched_tokens=st.integers(0, 5000),
        queued_tokens=tokens,
        queued_squares=st.integers(0, 10**9),
        sequences=st.integers(0, 300),
        context_tokens=tokens,
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda view: view.worker_id,
)


@settings(max_examples=40)
@given(
    st.sampled_from([*STRATEGIES]),
    clusters,
    st.lists(st.tuples(st.integers(1, 5000), seconds), max_size=4),
    st.lists(st.tuples(st.integers(1, 300), tokens, seconds), max_size=4),
    st.sampled_from([0.001, 0.05, 1.0, math.inf]),
    st.integers(1, 5000),
)
def test_whatever_was_learned_the_answer_is_a_plan_that_can_be_done(
    name: str,
    workers: list[WorkerView],
    prefills: list[tuple[int, float]],
    decodes: list[tuple[int, int, float]],
    target_s: float,
    prompt: int,
) -> None:
    costs = CostModel()
    for length, took_s in prefills:
        costs.observe_prefill([(0, length)], took_s)
    for sequences, context, took_s in decodes:
        costs.observe_decode(sequences, context, took_s)
    request = RequestView("r", prompt, ttft_target_s=target_s, tpot_target_s=target_s)
    by_id = {one.worker_id: one for one in workers}
    try:
        placement = make_strategy(name, costs).place(request, workers)
    except NoWorker:
        assert not any(one.decodes for one in workers)
        return
    assert by_id[placement.decode_worker_id].decodes
    assert placement.prefill_worker_id is None or by_id[placement.prefill_worker_id].prefills
    assert placement.prefill_worker_id != placement.decode_worker_id
    assert 0 <= placement.chunk_tokens <= prompt
    assert all(math.isfinite(expected_s) for _, expected_s in placement.expected_s)
