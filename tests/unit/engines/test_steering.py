"""Policies and plans steer LMDeploy's scheduler; whatever they decide, the tokens stay the same."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagellm_common.core.errors import ConfigError
from sagellm_common.core.types import as_token_ids
from sagellm_common.engines.lmdeploy import hooks
from sagellm_common.engines.lmdeploy.engine import LmdeployEngine
from sagellm_common.engines.lmdeploy.progress import StepProgress
from sagellm_common.scheduler_ir.engine_policy import RankedPolicy, StepPlan
from tests.support.engines import Driver, running_engine
from tests.support.waiting import TIMEOUT_S

Greedy = Callable[[Path, list[int], int], list[int]]


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 259, size=length).tolist()


def engine_of(driver: Driver) -> LmdeployEngine:
    assert isinstance(driver.engine, LmdeployEngine)
    return driver.engine


def started_in_order(driver: Driver, request_ids: Iterable[str]) -> list[str]:
    """Of these, who had a token, by the first one."""
    first = dict.fromkeys(output.request_id for step in driver.steps for output in step if output.token_ids)
    return [request_id for request_id in first if request_id in request_ids]


def finished_in_order(driver: Driver) -> list[str]:
    return [output.request_id for step in driver.steps for output in step if output.finish_reason]


async def tokens_of(driver: Driver, request_id: str) -> list[int]:
    return [token async for output in driver.outputs(request_id) for token in output.token_ids]


async def blocked(driver: Driver) -> str:
    """A sequence that has the only slot until it is cancelled."""
    request_id = driver.submit(prompt(5, 0), 1000)
    await anext(driver.outputs(request_id))
    return request_id


@pytest.mark.usefixtures("hooked")
async def test_a_later_request_of_higher_priority_overtakes_who_waits(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama, max_batch_size=1) as driver:
        running = await blocked(driver)
        waiting = [driver.submit(prompt(9, i), 2, {"priority": priority}) for i, priority in enumerate((0, -1, 0, 7))]
        driver.engine.cancel(running)
        await asyncio.gather(*(tokens_of(driver, request_id) for request_id in waiting))
        assert started_in_order(driver, waiting) == [waiting[i] for i in (3, 0, 2, 1)]


@pytest.mark.usefixtures("hooked")
async def test_deadline_puts_the_more_urgent_of_equals_first(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama, max_batch_size=1, policy="deadline") as driver:
        running = await blocked(driver)
        waiting = [driver.submit(prompt(9, i), 2, {"timeout_s": timeout_s}) for i, timeout_s in enumerate((90, 50, 70))]
        driver.engine.cancel(running)
        await asyncio.gather(*(tokens_of(driver, request_id) for request_id in waiting))
        assert started_in_order(driver, waiting) == [waiting[i] for i in (1, 2, 0)]


@pytest.mark.usefixtures("hooked")
async def test_on_time_sets_aside_what_is_late_anyway(tiny_llama: Path) -> None:
    asked = [{"first_token_within_s": 40.0, "needed_s": 50.0}] + [
        {"first_token_within_s": within_s, "needed_s": 20.0} for within_s in (60.0, 50.0)
    ]
    async with running_engine(tiny_llama, max_batch_size=1, policy="on_time") as driver:
        running = await blocked(driver)
        waiting = [driver.submit(prompt(9, i), 2, {"timeout_s": 90} | how) for i, how in enumerate(asked)]
        driver.engine.cancel(running)
        await asyncio.gather(*(tokens_of(driver, request_id) for request_id in waiting))
        assert started_in_order(driver, waiting) == [waiting[i] for i in (2, 1, 0)]


@pytest.mark.parametrize(("policy", "last"), [("fifo", 2), ("priority", 0)])
@pytest.mark.usefixtures("hooked")
async def test_the_policy_says_who_gives_way_when_memory_runs_out(
    tiny_llama: Path, hf_greedy: Greedy, policy: str, last: int
) -> None:
    prompts = [prompt(40, seed) for seed in range(3)]
    async with running_engine(tiny_llama, num_blocks=12, policy=policy) as driver:
        ids = [driver.submit(p, 60, {"priority": priority}) for p, priority in zip(prompts, (0, 1, 1), strict=True)]
        found = await asyncio.gather(*(tokens_of(driver, request_id) for request_id in ids))
        assert found == [hf_greedy(tiny_llama, p, 60) for p in prompts]
        assert finished_in_order(driver)[-1] == ids[last]
        assert driver.engine.kv.get_utilization().balanced


@pytest.mark.usefixtures("hooked")
async def test_handed_over_kv_outlives_what_is_cheap_to_compute_again(tiny_llama: Path, hf_greedy: Greedy) -> None:
    own, other = prompt(60, 1), prompt(60, 2)
    async with running_engine(tiny_llama, num_blocks=12, max_prefill_tokens=32) as driver:
        pool = driver.engine.kv
        first, last = await driver.run(other, 1, request={"hold_blocks": True})
        held = last.held
        assert held is not None
        target = pool.allocate(as_token_ids(other), len(other), "elsewhere")
        for source, destination in zip(held.block_ids, target.block_ids, strict=True):
            pool.regions().block(int(destination))[:] = pool.regions().block(int(source))
        pool.free(held)
        target.num_cached_tokens = len(other)
        resident = driver.submit(own, 60)
        await anext(driver.outputs(resident))
        handed = driver.submit(other + first, 60, {"allocation": target, "num_emitted_tokens": 1})
        found = await asyncio.gather(tokens_of(driver, resident), tokens_of(driver, handed))
        assert finished_in_order(driver)[-2:] == [handed, resident]  # by arrival it would be the other way round
        assert found[0] == hf_greedy(tiny_llama, own, 60)[1:]
        assert first + found[1] == hf_greedy(tiny_llama, other, 60)


@pytest.mark.usefixtures("hooked")
async def test_an_injected_plan_is_obeyed_and_can_be_taken_away(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama, max_batch_size=2) as driver:
        engine = engine_of(driver)
        engine.inject(StepPlan(prefill=False))
        waiting = [driver.submit(prompt(9, i), 2, {"priority": i}) for i in range(3)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await tokens_of(driver, waiting[0])
        assert driver.steps == []
        engine.inject(StepPlan(start=(waiting[1], waiting[0])))
        await asyncio.gather(*(tokens_of(driver, request_id) for request_id in waiting))
        assert started_in_order(driver, waiting) == [waiting[i] for i in (1, 0, 2)]
        engine.inject(None)
        assert len((await driver.run(prompt(9, 9), 2))[0]) == 2


@pytest.mark.usefixtures("hooked")
async def test_a_plans_victim_gives_way_and_still_says_the_same(tiny_llama: Path, hf_greedy: Greedy) -> None:
    prompts = [prompt(40, seed) for seed in range(3)]
    async with running_engine(tiny_llama, num_blocks=12) as driver:
        engine_of(driver).inject(StepPlan(give_way=("request-0",)))
        found = await asyncio.gather(*(driver.run(p, 60) for p in prompts))
        assert [tokens for tokens, _ in found] == [hf_greedy(tiny_llama, p, 60) for p in prompts]
        assert finished_in_order(driver)[-1] == "request-0"


async def test_prompts_wait_for_the_budget_they_were_given(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama, prefill_tokens_per_decode_step=4, max_prefill_tokens=16) as driver:
        running = driver.submit(prompt(20, 0), 40)
        stream = driver.outputs(running)
        await anext(stream)
        others = [driver.submit(prompt(16, i), 1) for i in (1, 2)]
        await asyncio.gather(*(tokens_of(driver, request_id) for request_id in others))
        turns = [next((o.request_id for o in step if o.request_id in others), "") for step in driver.steps]
        first, second = (turns.index(request_id) for request_id in started_in_order(driver, others))
        assert second - first - 1 == 4  # decode steps in between: 16 tokens at 4 for each


async def test_a_policy_that_fails_stops_nobody(
    tiny_llama: Path, hf_greedy: Greedy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("an injected fault")

    for name in ("order_waiting", "order_victims", "prefill_next"):
        monkeypatch.setattr(RankedPolicy, name, broken)
    prompts = [prompt(40, seed) for seed in range(2)]
    with caplog.at_level(logging.ERROR, "sagellm_common.engines.lmdeploy.scheduler"):
        async with running_engine(tiny_llama, num_blocks=10) as driver:
            found = await asyncio.gather(*(driver.run(p, 40) for p in prompts))
    assert [tokens for tokens, _ in found] == [hf_greedy(tiny_llama, p, 40) for p in prompts]
    assert "the policy failed" in caplog.text


async def test_without_the_hook_arrival_decides_and_plans_are_refused(tiny_llama: Path, stock_hooks: None) -> None:
    async with running_engine(tiny_llama, max_batch_size=1) as driver:
        assert driver.engine.description.startswith(f"LMDeploy 0.11.0, without hooks {', '.join(hooks.HOOKS)};")
        running = await blocked(driver)
        waiting = [driver.submit(prompt(9, i), 2, {"priority": i}) for i in range(2)]
        driver.engine.cancel(running)
        await asyncio.gather(*(tokens_of(driver, request_id) for request_id in waiting))
        assert started_in_order(driver, waiting) == waiting
        with pytest.raises(ConfigError, match="takes no plans: patch 0003 is missing"):
            engine_of(driver).inject(StepPlan())


def turns_of(driver: Driver) -> list[set[str]]:
    """Who had a token, step by step."""
    return [{output.request_id for output in step if output.token_ids} for step in driver.steps]


@pytest.mark.parametrize("priority", [0, 1])
@pytest.mark.usefixtures("hooked")
async def test_between_the_chunks_of_a_prompt_goes_who_is_more_urgent(
    tiny_llama: Path, hf_greedy: Greedy, monkeypatch: pytest.MonkeyPatch, priority: int
) -> None:
    long, short = prompt(90, 1), prompt(9, 2)
    async with running_engine(tiny_llama, max_prefill_tokens=64) as driver:
        submitted = threading.Event()
        forward = StepProgress.forward

        @contextmanager
        def after_the_first_chunk(self: StepProgress, history: Any, lengths: Any) -> Iterator[None]:
            with forward(self, history, lengths):
                yield
            if history.tolist() == [0] and lengths.tolist() == [16]:
                loop.call_soon_threadsafe(submit_short)
                assert submitted.wait(TIMEOUT_S)

        def submit_short() -> None:
            ids.append(driver.submit(short, 3, {"priority": priority}))
            submitted.set()

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(StepProgress, "forward", after_the_first_chunk)
        ids = [driver.submit(long, 3, {"chunk_tokens": 16})]
        found = [await tokens_of(driver, ids[0]), await tokens_of(driver, ids[1])]
        assert found == [hf_greedy(tiny_llama, p, 3) for p in (long, short)]
        assert started_in_order(driver, ids) == (ids[::-1] if priority else ids)


async def test_between_the_chunks_of_a_prompt_others_decode_as_often_as_they_have_earned(
    tiny_llama: Path, hf_greedy: Greedy
) -> None:
    first, long = prompt(9, 1), prompt(64, 2)
    settings = {"max_prefill_tokens": 64, "prefill_tokens_per_decode_step": 8}
    async with running_engine(tiny_llama, **settings) as driver:
        running = driver.submit(first, 60)
        await anext(driver.outputs(running))
        waiting = driver.submit(long, 3, {"chunk_tokens": 16})
        found = await tokens_of(driver, waiting)
        assert found == hf_greedy(tiny_llama, long, 3)
        turns = turns_of(driver)
        start = turns.index({waiting})
        # 16 tokens at 8 for each step: two steps after each of the chunks but the last.
        assert turns[start - 6 : start] == [{running}] * 6
        before = driver.engine.stats().steps
        assert before >= start + 4
        driver.engine.cancel(running)
        await tokens_of(driver, running)


async def test_prompts_in_chunks_share_no_step_with_others(tiny_llama: Path, hf_greedy: Greedy) -> None:
    prompts = [prompt(40, 1), prompt(12, 2), prompt(30, 3), prompt(8, 4)]
    async with running_engine(tiny_llama, max_batch_size=4, max_prefill_tokens=128) as driver:
        blocker = await blocked(driver)
        chunks = (16, 0, 7, 0)
        ids = [driver.submit(p, 4, {"chunk_tokens": chunk}) for p, chunk in zip(prompts, chunks, strict=True)]
        found = await asyncio.gather(*(tokens_of(driver, request_id) for request_id in ids))
        assert found == [hf_greedy(tiny_llama, p, 4) for p in prompts]
        driver.engine.cancel(blocker)
        await tokens_of(driver, blocker)
        assert driver.engine.kv.get_utilization().balanced
