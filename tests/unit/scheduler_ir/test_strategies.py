from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm_common.core.errors import ConfigError, NoWorker
from sagellm_common.core.types import WorkerRole
from sagellm_common.scheduler_ir.strategies import Placement, RequestView, WorkerView, make_strategy
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
