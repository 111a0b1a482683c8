"""Disaggregate or not in the router: decided by what it has learned, told to workers, people and Prometheus."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from sagellm_common.client.router import RouterClient
from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.types import SamplingParams
from sagellm_common.scheduler_ir.executor_api import NodeState
from tests.support.plans import learned_costs
from tests.support.router_harness import PROMPT, RouterHarness, router_harness
from tests.support.scripted_workers import LAYOUT, ScriptedDecode, ScriptedPrefill, oracle
from tests.support.waiting import eventually

GREEDY_6 = SamplingParams(max_new_tokens=6)
LONG = list(range(20, 220))


def learned_file(path: Path, bytes_per_s: float) -> str:
    costs = learned_costs({("prefill-0", "decode-0"): bytes_per_s})
    path.write_text(json.dumps(costs.to_dict()))
    return str(path)


def decided(router: RouterHarness, way: str, by: str = "costs") -> float:
    return router.metric("sagellm_router_separations_total", way=way, by=by)


async def test_where_the_link_is_slow_the_decode_worker_computes(tmp_path: Path) -> None:
    path = learned_file(tmp_path / "costs.json", 1e3)
    async with router_harness(cost_model_path=path, prefill_chunk_tokens=64) as router:
        prefill, decode = await router.pair()
        generated = await router.generate()
        assert generated.tokens == oracle(PROMPT, GREEDY_6)
        assert generated.summary.prefill_worker_id == "" and not prefill.requests
        assert decode.requests[0].chunk_tokens == 64
        assert "aggregated" in generated.plan.reason and "disaggregated" in generated.plan.reason
        assert decided(router, "aggregated") == 1
        assert router.metric("sagellm_router_separation_compared_total", way="aggregated") == 1
        expected_s, taken_s, other_s = (
            router.metric(f"sagellm_router_separation_{name}_seconds_total", way="aggregated")
            for name in ("expected", "taken", "other_expected")
        )
        moved_bytes = len(PROMPT) * LAYOUT.block_bytes / LAYOUT.block_size_tokens
        assert other_s > moved_bytes / 1e3 / LAYOUT.num_layers, "the last layer is not hidden behind the prefill"
        assert 0 < expected_s < other_s and taken_s > 0
        async with RouterClient(router.router.address) as client:
            told_people = await client.explain("r")
        counterfactual = told_people.counterfactual
        assert counterfactual is not None and not counterfactual.disaggregated
        assert counterfactual.expected_ms == pytest.approx(1e3 * expected_s)
        assert counterfactual.taken_ms == pytest.approx(1e3 * taken_s)
        assert counterfactual.other_expected_ms == pytest.approx(1e3 * other_s)
        assert counterfactual.regret_ms == pytest.approx(max(0.0, 1e3 * (taken_s - other_s)))
        assert {*told_people.node_states.values()} == {"done"}
        await router.assert_nothing_held()


async def test_where_it_pays_it_is_disaggregated(tmp_path: Path) -> None:
    """Others decode on the worker, and would be held up."""
    path = learned_file(tmp_path / "costs.json", 1e9)
    async with router_harness(cost_model_path=path) as router:
        prefill, decode = await router.pair()
        gate = asyncio.Event()
        decode.on("token:1", decode.wait_for(gate))
        held_up = asyncio.create_task(router.generate(LONG, request_id="held up"))
        await eventually(lambda: router.link(decode).work.sequences)
        await eventually(lambda: not router.link(decode).work.queued_prompts)
        other = await router.generate(LONG, request_id="other")
        gate.set()
        assert other.summary.prefill_worker_id == "prefill-0" and len(prefill.requests) == 1
        alone = await held_up
        assert alone.summary.prefill_worker_id == "" and alone.tokens == other.tokens == oracle(LONG, GREEDY_6)
        assert (decided(router, "disaggregated"), decided(router, "aggregated")) == (1, 1)
        await router.assert_nothing_held()


async def test_without_learned_costs_the_rule_decides(router: RouterHarness) -> None:
    await router.pair()
    await router.generate()
    assert decided(router, "disaggregated", by="rule") == 1
    explained = await router.explain()
    assert not explained.HasField("counterfactual")
    candidates = {one.worker_id: one for one in explained.candidates}
    assert {*candidates} == {"prefill-0", "decode-0"}
    assert all(one.chosen and one.score == 0.5 and not one.HasField("expected_ms") for one in candidates.values())


async def test_never_means_never() -> None:
    async with router_harness(disaggregate="never") as router:
        prefill, _ = await router.pair()
        assert (await router.generate()).tokens == oracle(PROMPT, GREEDY_6)
        assert not prefill.requests


async def test_who_was_not_chosen_is_shown_as_it_was(router: RouterHarness) -> None:
    prefills = [await router.add(ScriptedPrefill(f"prefill-{i}")) for i in range(2)]
    await router.add(ScriptedDecode(prefills=prefills))
    gate = asyncio.Event()
    prefills[0].on("prefill", gate.wait)
    first = asyncio.create_task(router.generate(request_id="first"))
    await eventually(lambda: router.link(prefills[0]).outstanding)
    await router.generate(request_id="second")
    gate.set()
    await first
    busy, idle = [one for one in (await router.explain("second")).candidates if one.worker_id != "decode-0"][::-1]
    assert (busy.worker_id, busy.chosen, busy.outstanding, busy.queued_tokens) == ("prefill-0", False, 1, len(PROMPT))
    assert (idle.worker_id, idle.chosen, idle.outstanding) == ("prefill-1", True, 0)
    assert idle.score > busy.score


# ---- the executor ----


async def test_a_plan_under_way_tells_how_far_it_is_and_can_be_ended(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    gate = asyncio.Event()
    prefill.on("prefill", gate.wait)
    decode.on("token:2", decode.hang)
    executor = router.router.pipeline._inner._executor  # type: ignore[attr-defined]
    generating = asyncio.create_task(router.generate())
    await eventually(lambda: prefill.requests)

    def states() -> list[NodeState]:
        return list(executor.status("r/1").nodes.values())

    assert states() == [NodeState.RUNNING, NodeState.PENDING, NodeState.PENDING]
    work, progress = executor._under_way["r/1"]
    with pytest.raises(InvalidRequest, match="under way already"):
        executor.submit_plan(progress.plan, work)
    gate.set()
    await eventually(lambda: states() == [NodeState.DONE, NodeState.DONE, NodeState.RUNNING], states)
    assert not executor.status("r/1").ended
    assert executor.cancel("r/1")
    assert (await generating).finish_reason == "cancelled"
    assert executor.status("r/1") is None and not executor.cancel("r/1")
    explained = await router.explain()
    assert [node.state for node in explained.node_states] == ["done", "done", "cancelled"]
    await router.assert_nothing_held()


async def test_a_failed_attempt_is_a_failed_plan(router: RouterHarness) -> None:
    prefill, _ = await router.pair()
    for _ in range(3):
        prefill.on("prefill", prefill.refuse(InvalidRequest("no")))
    with pytest.raises(InvalidRequest):
        await router.generate()
    assert [node.state for node in (await router.explain()).node_states] == ["failed", "cancelled", "cancelled"]
