"""Where hybrid places requests, by costs that the test knows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from sagellm_common.core.errors import NoWorker
from sagellm_common.core.types import WorkerRole
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.strategies import RequestView, WorkerView, make_strategy

REQUEST = RequestView("r", 1000, ttft_target_s=1.0, tpot_target_s=0.05)
DECODE = WorkerView("d0", WorkerRole.DECODE, sequences=100)
"""Too busy for anybody's prompt."""


def learned() -> CostModel:
    """0.1 ms a prompt token; a decode step of 10 ms and 1 ms more for each sequence."""
    costs = CostModel()
    for tokens in range(100, 1100, 100):
        costs.observe_prefill([(0, tokens)], 1e-4 * tokens)
    for sequences in range(1, 100):
        costs.observe_decode(sequences, 1000 * (sequences % 7), 0.01 + 0.001 * sequences)
    return costs


def prefill(name: str, queued: int = 0, matched: int = 0) -> WorkerView:
    return WorkerView(name, WorkerRole.PREFILL, matched_tokens=matched, queued_tokens=queued)


def decode(name: str, sequences: int = 0, matched: int = 0) -> WorkerView:
    return WorkerView(name, WorkerRole.DECODE, matched_tokens=matched, sequences=sequences)


@pytest.mark.parametrize(
    ("workers", "chosen"),
    [
        ([prefill("p0", queued=4000), prefill("p1", queued=1000)], "p1"),
        ([prefill("p0"), prefill("p1", queued=3000, matched=900)], "p1"),  # in time there, and 900 tokens saved
        ([prefill("p0"), prefill("p1", queued=9000, matched=900)], "p0"),  # its target would be missed
        ([prefill("p0", queued=90_000), prefill("p1", queued=80_000)], "p1"),  # missed anyway: the sooner
    ],
    ids=["shorter queue", "prefix in time", "prefix too late", "all too late"],
)
def test_prefill_goes_where_least_is_computed_in_time(workers: list[WorkerView], chosen: str) -> None:
    placement = make_strategy("hybrid", learned()).place(REQUEST, [*workers, DECODE])
    assert placement.prefill_worker_id == chosen
    assert placement.late == all(worker.queued_tokens > 10_000 for worker in workers)
    assert chosen in placement.reason


@pytest.mark.parametrize(
    ("workers", "chosen"),
    [
        ([decode("d0", sequences=8), decode("d1", sequences=3)], "d1"),
        ([decode("d0", sequences=3), decode("d1", sequences=8, matched=800)], "d1"),  # less to move, still in time
        ([decode("d0", sequences=3), decode("d1", sequences=60, matched=800)], "d0"),
    ],
    ids=["fewer sequences", "prefix in time", "prefix too slow"],
)
def test_decode_goes_where_tokens_keep_their_pace(workers: list[WorkerView], chosen: str) -> None:
    assert make_strategy("hybrid", learned()).place(REQUEST, workers).decode_worker_id == chosen


def test_slo_aware_takes_the_soonest_and_looks_no_further() -> None:
    workers = [
        *(prefill("p0"), prefill("p1", queued=1000, matched=900)),
        *(decode("d0", sequences=20), decode("d1", sequences=23, matched=400)),
    ]
    both = {name: make_strategy(name, learned()).place(REQUEST, workers) for name in ("slo_aware", "hybrid")}
    chosen = {name: (found.prefill_worker_id, found.decode_worker_id) for name, found in both.items()}
    assert chosen == {"slo_aware": ("p0", "d0"), "hybrid": ("p1", "d1")}
    soonest, expected = both["slo_aware"].expected_s[0], both["hybrid"].expected_s
    assert soonest == ("p0", pytest.approx(0.1, rel=1e-3))
    assert expected[0] == ("p1", pytest.approx(0.11, rel=1e-3))
    assert soonest in expected[1:]


@pytest.mark.parametrize(
    ("queued", "sequences", "where"),
    [
        (0, 3, ("p0", "d0")),  # nobody waits there: who decodes is left in peace
        (8000, 3, (None, "d0")),  # 0.9 s there; here 34 ms of a step of 47.5 are left for it
        (8000, 35, ("p0", "d0")),  # a step takes 46 ms as it is
        (1500, 25, ("p0", "d0")),  # it would come later here
    ],
)
def test_a_decode_worker_computes_prompts_between_its_steps_where_that_is_sooner(
    queued: int, sequences: int, where: tuple[str | None, str]
) -> None:
    placement = make_strategy("hybrid", learned()).place(
        REQUEST, [prefill("p0", queued=queued), decode("d0", sequences=sequences)]
    )
    assert (placement.prefill_worker_id, placement.decode_worker_id) == where
    if where[0] is None:
        assert placement.chunk_tokens == pytest.approx(345, rel=0.05)
        assert placement.expected_s[0] == ("d0", pytest.approx(0.1 * 47.5 / 34.5, rel=0.05))
    else:
        assert placement.chunk_tokens == 0


def test_without_a_target_for_later_tokens_nobody_is_held_up() -> None:
    workers = [prefill("p0", queued=100_000), decode("d0", sequences=1)]
    placement = make_strategy("hybrid", learned()).place(replace(REQUEST, tpot_target_s=math.inf), workers)
    assert placement.prefill_worker_id == "p0"


def test_before_anything_was_learned_it_goes_by_prefix_and_load() -> None:
    busy = WorkerView("p0", WorkerRole.PREFILL, outstanding=5)
    idle = WorkerView("p1", WorkerRole.PREFILL)
    placement = make_strategy("hybrid").place(REQUEST, [busy, idle, DECODE])
    assert (placement.prefill_worker_id, placement.decode_worker_id, placement.late) == ("p1", "d0", False)


def test_without_a_decode_worker_there_is_no_placement() -> None:
    with pytest.raises(NoWorker):
        make_strategy("hybrid").place(REQUEST, [prefill("p0")])


def test_without_prefill_workers_a_prompt_goes_where_it_is_computed_soonest() -> None:
    queued = WorkerView("d0", WorkerRole.DECODE, sequences=1, queued_tokens=5000)
    placement = make_strategy("hybrid", learned()).place(REQUEST, [queued, decode("d1", sequences=10)])
    assert (placement.prefill_worker_id, placement.decode_worker_id) == (None, "d1")
    assert placement.chunk_tokens > 0
