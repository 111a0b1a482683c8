"""Whether disaggregating pays, by costs that the test knows: 0.1 ms a prompt token, 1000 bytes of KV each."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from sagellm_common.scheduler_ir.builder import IRBuilder
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.facts import Facts, WorkerFacts
from sagellm_common.scheduler_ir.ir_graph import IRRequest
from sagellm_common.scheduler_ir.ir_types import ExecutionPlan
from sagellm_common.scheduler_ir.pd_separation import Mode, PDSeparator, Separation
from sagellm_common.scheduler_ir.strategies import Placement, RequestView
from tests.support.plans import learned_costs, shape


def facts(bytes_per_s: float = 1e9, costs: CostModel | None = None, **workers: WorkerFacts) -> Facts:
    known = {"p": WorkerFacts(16), "d": WorkerFacts(16)} | workers
    return Facts(known, costs or learned_costs({("p", "d"): bytes_per_s}), kv_bytes_per_token=1000, num_layers=10)


PLACED = Placement("d", "p")


def request(prompt: int = 1000, new: int = 10, placement: Placement = PLACED, **how: Any) -> IRRequest:
    return IRRequest(RequestView("r", prompt), placement, new, **how)


def split(one: IRRequest, known: Facts, separator: PDSeparator | None = None) -> tuple[Separation, ExecutionPlan]:
    graph = (separator or PDSeparator()).split(IRBuilder(known.workers).build([one]), known)
    (separation,), (plan,) = graph.separations, graph.plans()
    assert separation is not None
    assert separation.disaggregate == (plan.prefill_worker_id is not None)
    return separation, plan


def busy(**load: int) -> WorkerFacts:
    return WorkerFacts(16, **load)


@pytest.mark.parametrize(
    ("known", "disaggregates"),
    [
        (facts(), False),  # nobody is held up, and the last layer has to cross
        (facts(d=busy(sequences=4)), True),
        (facts(1e6, d=busy(sequences=4)), False),  # 1 s on the link, of which 0.1 s are hidden
        (facts(1e6, d=busy(sequences=11)), True),
        (facts(d=busy(sequences=4), p=busy(queued_tokens=6000)), False),
        (facts(d=busy(sequences=4, queued_tokens=6000), p=busy(queued_tokens=6000)), True),
        (facts(d=busy(sequences=4), p=busy(sequences=5)), False),  # those on the prefill worker count as well
    ],
    ids=["idle", "held up", "slow link", "slow link, many held up", "queue", "both queue", "prefill decodes, too"],
)
def test_what_costs_less_in_all_is_done(known: Facts, disaggregates: bool) -> None:
    separation, plan = split(request(), known)
    assert separation.disaggregate == disaggregates
    assert separation.chosen is not None and separation.other is not None
    assert separation.chosen.total_s <= separation.other.total_s
    if not disaggregates:
        assert shape(plan) == [("prefill", "d", 0, 1000), ("decode", "d", 1000, 1010)]
        assert "aggregated" in plan.reason and "decode on d" in plan.reason


def test_the_expected_costs_are_those_of_the_model() -> None:
    separation, _ = split(request(), facts(1e7, d=busy(sequences=4, context_tokens=1000, queued_tokens=500)))
    apart, together = separation.chosen, separation.other
    assert apart is not None and together is not None
    step_s = 0.01 + 5 * 0.001
    # 1 ms and 0.1 s on the link, of which nine layers of ten hide behind 0.1 s of compute.
    assert apart.delay_s == pytest.approx(0.1 + 0.1 * 0.101 + step_s, rel=0.02)
    assert apart.held_up_s == 0
    assert together.delay_s == pytest.approx(0.05 + 0.1 + step_s, rel=0.02)
    assert together.held_up_s == pytest.approx(0.4, rel=0.02)
    unhidden, _ = split(request(), replace(facts(1e7, d=busy(sequences=4)), overlaps=False))
    assert unhidden.chosen is not None and unhidden.chosen.transfer_s == pytest.approx(0.101, rel=0.02)


def test_what_is_cached_is_neither_computed_nor_moved() -> None:
    known = facts(1e7, d=busy(sequences=4))
    cached, _ = split(request(cached_tokens={"p": 800, "d": 480}), known)
    apart, together = cached.chosen, cached.other
    assert apart is not None and together is not None
    assert (apart.compute_s, together.compute_s) == pytest.approx((0.02, 0.052), rel=0.05)
    assert apart.transfer_s == pytest.approx(0.053 - 0.02, rel=0.05), "no more is hidden than computed"
    assert split(request(stored_tokens=960), known)[0].chosen.compute_s == pytest.approx(0.004, rel=0.1)  # type: ignore[union-attr]


def test_a_single_new_token_needs_no_transfer() -> None:
    known = facts(1e3, d=busy(sequences=1))
    assert not split(request(), known)[0].disaggregate
    assert split(request(new=1), known)[0].disaggregate


@pytest.mark.parametrize("how", [{"num_emitted_tokens": 3}, {"num_emitted_tokens": 1, "kv_source_worker_id": "p"}])
def test_what_was_computed_is_not_decided_again(how: dict[str, Any]) -> None:
    graph = IRBuilder(facts().workers).build([request(placement=Placement("d"), **how)])
    after = PDSeparator().split(graph, facts())
    assert after.nodes == graph.nodes and after.separations[0].chosen is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("costs", "mode", "disaggregates"),
    [
        (CostModel(), "auto", True),
        (learned_costs(), "auto", True),  # nobody knows the link
        (learned_costs({("p", "d"): 1e9}), "auto", False),
        (learned_costs({("p", "d"): 1e9}), "always", True),
        (CostModel(), "never", False),
    ],
)
def test_before_enough_is_known_it_stays_as_placed(costs: CostModel, mode: Mode, disaggregates: bool) -> None:
    separation, _ = split(request(), facts(costs=costs), PDSeparator(mode))
    assert separation.disaggregate == disaggregates


def test_a_link_that_was_only_probed_counts_as_probed() -> None:
    known = facts(costs=learned_costs(), d=busy(sequences=4))
    probed = RequestView("r", 1000, pull_seconds=lambda source, target: 2.0)
    assert not split(replace(request(), view=probed), known)[0].disaggregate
    separation, _ = split(replace(request(cached_tokens={"d": 960}), view=probed), known)
    assert separation.other is not None or separation.chosen is not None
    nearer = replace(probed, pull_seconds=lambda source, target: 0.02)
    assert split(replace(request(), view=nearer), known)[0].disaggregate


def test_what_a_way_takes_beyond_the_model_is_learned_and_forgotten() -> None:
    known, separator = facts(d=busy(sequences=2)), PDSeparator()
    first, _ = split(request(prompt=100), known, separator)
    assert first.disaggregate and first.chosen is not None
    for _ in range(50):  # handing over takes 50 ms, whatever the prompt
        separator.observe(first, first.chosen.delay_s + 0.05)
    again, _ = split(request(prompt=100), known, separator)
    assert not again.disaggregate and again.other is not None
    assert again.other.beyond_s == pytest.approx(0.05, rel=0.02)
    assert split(request(prompt=1000), known, separator)[0].disaggregate, "it pays for longer ones"
    for _ in range(3000):
        separator.observe(again, again.chosen.delay_s)  # type: ignore[union-attr]
    assert split(request(prompt=100), known, separator)[0].disaggregate, "it is tried again"


def test_regret_is_what_the_other_way_would_have_saved() -> None:
    separation, _ = split(request(), facts(d=busy(sequences=4)))
    assert separation.chosen is not None and separation.other is not None
    assert separation.regret_s(separation.chosen.delay_s) == 0
    assert separation.regret_s(separation.other.total_s + 0.1) == pytest.approx(0.1)
    assert Separation(True, "a rule").regret_s(math.inf) == 0
