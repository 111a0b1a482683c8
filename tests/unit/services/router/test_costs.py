"""What the router makes of what it sees: costs as they are, without the queue; and the file they are kept in."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.step_costs import StepCost
from sagellm_common.rpc.sessions import PrefillOutcome, TransferReport
from sagellm_common.scheduler_ir.cost_model import CostModel
from services.router.cost_file import kept, load_costs
from services.router.costs import PART_AT_ONCE, PART_EVERY_S, STEPS, CostLearner
from services.router.load import Sent, WorkerLoad
from tests.support.router_harness import PROMPT, RouterHarness, router_harness
from tests.support.scripted_workers import ScriptedDecode, ScriptedPrefill
from tests.support.waiting import eventually


class Link:
    """As much of a WorkerLink as the learner looks at."""

    def __init__(self) -> None:
        self.work = WorkerLoad()


class Recorded(CostModel):
    def __init__(self) -> None:
        super().__init__()
        self.prefills: list[tuple[list[tuple[int, int]], float]] = []
        self.steps: list[tuple[int, int, float]] = []

    def observe_prefill(self, chunks: Any, seconds: float, steps: int = 1) -> None:
        assert steps == len(chunks)
        self.prefills.append((list(chunks), pytest.approx(seconds)))

    def observe_decode(self, num_sequences: int, context_tokens: int, seconds: float) -> None:
        self.steps.append((num_sequences, context_tokens, pytest.approx(seconds)))


def outcome(cached: int, engine_s: float) -> PrefillOutcome:
    return PrefillOutcome((1,), (), None, None, cached, 0, 0.0, engine_s * 1e3 + 1.0, 0.0, engine_s * 1e3)


def test_prompts_of_a_queue_are_timed_together() -> None:
    clock, costs, link = ManualClock(), Recorded(), Link()
    learner: Any = CostLearner(costs, clock)

    def done(after_s: float, start: int, end: int) -> None:
        clock.advance(after_s)
        link.work.queued_prompts -= 1
        learner.prefilled(link, end, outcome(start, 1.0))

    link.work.queued_prompts = 6
    done(0.3, 0, 1000)  # how much of its second was its own is not known
    for after_s, start, end in ((0.1, 0, 800), (0.001, 100, 500), (0.2, 0, 2000)):
        done(after_s, start, end)
    done(0.04, 0, 300)
    done(0.03, 0, 400)
    assert costs.prefills == [([(0, 800), (100, 500), (0, 2000)], 0.301), ([(0, 300), (0, 400)], 0.07)]
    link.work.queued_prompts = 2
    done(1.0, 0, 300)
    done(0.01, 0, 300)
    assert len(costs.prefills) == 2, "too short to tell"


def test_a_queue_that_ends_with_a_failure_is_over() -> None:
    clock, costs, link = ManualClock(), Recorded(), Link()
    learner: Any = CostLearner(costs, clock)
    decode = WorkerLoad()

    def sent() -> Sent:
        return Sent(decode, 100, link.work, start_token=0, prompt_tokens=100)

    with sent() as first, sent():  # the second fails
        first.prefilled()
        learner.prefilled(link, 100, outcome(0, 0.1))
    clock.advance(60.0)
    with sent() as third:
        clock.advance(0.2)
        third.prefilled()
        learner.prefilled(link, 100, outcome(0, 0.1))
    assert costs.prefills == [([(0, 100)], 0.1)]


def test_a_prompt_after_a_pause_counts_by_the_engines_clock() -> None:
    clock, costs, link = ManualClock(), Recorded(), Link()
    learner: Any = CostLearner(costs, clock)
    for _ in range(2):
        clock.advance(60.0)
        learner.prefilled(link, 1000, outcome(0, 0.1))
    assert costs.prefills == [([(0, 1000)], 0.1)] * 2


def test_steps_are_timed_along_one_sequence_over_a_while() -> None:
    clock, costs, link = ManualClock(), Recorded(), Link()
    learner: Any = CostLearner(costs, clock)
    with Sent(link.work, 300) as other:
        with Sent(link.work, 100) as first:
            for _ in range(11):
                for sent in (first, other):
                    sent.step(1)
                    learner.stepped(link, sent, 1)
                clock.advance(0.02)
        # Steps 2 to 4, 5 to 7, 8 to 10, as `first` saw them before `other` got its token.
        assert costs.steps == [(2, context, 0.02) for context in (405, 411, 417)]
        for _ in range(4):  # the one that was followed is over
            other.step(1)
            learner.stepped(link, other, 1)
            clock.advance(0.02)
        assert costs.steps[3:] == [(1, 314, 0.02)]


def test_a_short_sequence_counts_when_it_is_over() -> None:
    clock, costs, link = ManualClock(), Recorded(), Link()
    learner: Any = CostLearner(costs, clock)
    for num_tokens in (STEPS, STEPS + 1, STEPS + 1):
        clock.advance(1.0)
        with Sent(link.work, 100) as sent:
            for _ in range(num_tokens):
                clock.advance(0.001)
                sent.step(1)
                learner.stepped(link, sent, 1)
    # The first was too short, the third is not known to be over.
    assert costs.steps == [(1, 106, 0.001)]


def test_an_engine_that_tells_its_steps_is_believed() -> None:
    clock, costs, link = ManualClock(), Recorded(), Link()
    learner: Any = CostLearner(costs, clock)
    prefill, decode = StepCost(0.5, 2, 300, 50_000), StepCost(0.02, 0, 0, 0, 3, 900)
    learner.told(link, [prefill, decode])
    learner.prefilled(link, 1000, outcome(0, 0.1))
    with Sent(link.work, 100) as sent:
        for _ in range(2 * STEPS):
            clock.advance(0.02)
            learner.stepped(link, sent, 1)
    assert (costs.prefills, costs.steps) == ([], []), "what the router sees is told already"
    assert costs.prefill.samples == costs.decode.samples == 1
    assert costs.step_s(prefill).seconds == pytest.approx(0.5, rel=1e-3)
    assert costs.step_s(decode).seconds == pytest.approx(0.02, rel=1e-3)
    learner.prefilled(another := Link(), 1000, outcome(0, 0.1))
    assert len(costs.prefills) == 1, f"{another} tells nothing"


def test_each_part_learns_no_oftener_than_it_may() -> None:
    clock, costs = ManualClock(), CostModel()
    learner = CostLearner(costs, clock)
    learner.transferred("p0", "d0", TransferReport(0, 0.0, 0, 8, "tcp"))  # all of it was there
    assert not costs.links
    for _ in range(1000):
        learner.transferred("p0", "d0", TransferReport(1000, 1.0, 1, 0, "tcp"))
        clock.advance(PART_EVERY_S / 10)
    assert costs.links["p0", "d0"].samples == pytest.approx(100 + PART_AT_ONCE, abs=1)


# ---- the file ----


async def test_costs_outlive_the_router(tmp_path: Path) -> None:
    path, costs = tmp_path / "costs.json", CostModel()
    async with kept(costs, path):
        costs.observe_prefill([(0, 1000)], 0.1)
        costs.observe_transfer("p0", "d0", 1 << 20, 0.01)
    assert load_costs(path).to_dict() == costs.to_dict()
    assert os.listdir(tmp_path) == [path.name]


async def test_they_are_written_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    async with kept(CostModel(), path, every_s=0.01):
        await eventually(path.exists)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 0}', json.dumps({"format": 1, "prefill": "?"})])
def test_a_broken_file_is_told_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    assert load_costs(path).prefill.samples == 0
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and str(path) in record.getMessage()


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="router.cost_model_path .*gone is no directory"):
        load_costs(tmp_path / "gone" / "costs.json")


# ---- in the router ----


def samples(router: RouterHarness, part: str) -> float:
    return router.metric("sagellm_router_cost_samples_total", part=part)


async def two_prefills(router: RouterHarness) -> None:
    prefills = [await router.add(ScriptedPrefill(f"prefill-{i}")) for i in range(2)]
    await router.add(ScriptedDecode(prefills=prefills))


async def test_hybrid_learns_and_explains_what_it_expected(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    settings = {"strategy": "hybrid", "ttft_target_ms": 1000.0, "cost_model_path": str(path)}
    async with router_harness(**settings) as router:
        await two_prefills(router)
        first, second = [await router.generate(request_id=name) for name in ("first", "second")]
        assert first.tokens == second.tokens
        assert first.plan.strategy == second.plan.strategy == "hybrid"
        assert "expected" not in first.plan.reason, "nothing was learned yet"
        assert "first token expected in 1 ms" in second.plan.reason
        # The scripted engines say 0.75 ms for each prompt.
        (event,) = [event for event in (await router.explain("second")).events if event.stage == "first token"]
        here, there = second.summary.prefill_worker_id, {"prefill-0": "prefill-1", "prefill-1": "prefill-0"}
        assert event.detail.startswith(f"{here}: 1 ms expected, ")
        assert event.detail.endswith(f"; expected 1 ms on {there[here]}")
        assert 0 < event.duration_ms <= second.summary.ttft_ms
        told = [request for worker in router.workers[:2] for request in worker.requests]
        assert {0 < request.first_token_within_ms <= 1000 for request in told} == {True}
        assert sorted(request.needed_ms for request in told) == [0.0, pytest.approx(0.75)]
        assert samples(router, "prefill") == 2
        assert router.metric("sagellm_router_cost_mape_ratio", part="prefill") == pytest.approx(0.0, abs=1e-6)
        await router.assert_nothing_held()
    assert (await asyncio.to_thread(load_costs, path)).prefill.samples == 2


async def test_hybrid_sends_prompts_past_a_queue() -> None:
    async with router_harness(strategy="hybrid") as router:
        await two_prefills(router)
        learned = await router.generate(request_id="learned")
        busy, idle = router.workers[:2]
        if learned.summary.prefill_worker_id == busy.worker_id:
            busy, idle = idle, busy  # by turns, the next goes to `busy`
        gate = asyncio.Event()
        busy.on("prefill", gate.wait)
        stuck = asyncio.create_task(router.generate(request_id="stuck"))
        async with asyncio.timeout(10):
            await busy.reached["prefill"].wait()
        assert router.link(busy).work.queued_tokens == len(PROMPT)
        others = [await router.generate(request_id=f"r{i}") for i in range(3)]
        assert {other.summary.prefill_worker_id for other in others} == {idle.worker_id}
        gate.set()
        assert (await stuck).summary.prefill_worker_id == busy.worker_id
        await router.assert_nothing_held()


async def test_fifo_learns_nothing_unless_asked(router: RouterHarness, tmp_path: Path) -> None:
    await router.pair()
    await router.generate()
    assert samples(router, "prefill") == 0
    async with router_harness(cost_model_path=str(tmp_path / "costs.json")) as asked:
        await asked.pair()
        generated = await asked.generate()
        assert generated.plan.strategy == "fifo"
        assert not asked.workers[0].requests[0].HasField("first_token_within_ms"), "there is no target"
        assert samples(asked, "prefill") == 1
        assert math.isnan(asked.metric("sagellm_router_cost_mape_ratio", part="decode"))
