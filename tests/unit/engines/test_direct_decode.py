"""Greedy sequences with int8 weights decode without the scheduler until there is something to decide."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from sagellm_common.core.errors import EngineFailed
from sagellm_common.core.types import FinishReason
from sagellm_common.engines.lmdeploy.core import EngineCore
from sagellm_common.engines.lmdeploy.kernels.direct import DirectDecode
from sagellm_common.engines.lmdeploy.kv_manager import LmdeployKvPool
from tests.support.engines import Driver, prompts, running_engine

NEW_TOKENS = 40
"""More than two blocks."""


@pytest.fixture
async def driver(tiny_llama: Path) -> AsyncIterator[Driver]:
    async with running_engine(tiny_llama, weights="int8", prefix_caching=False) as driver:
        yield driver


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences in each decode step."""
    found: list[int] = []
    step = DirectDecode.step

    def counted(self: DirectDecode, ids: Any, batch: Any) -> Any:
        found.append(ids.numel())
        return step(self, ids, batch)

    monkeypatch.setattr(DirectDecode, "step", counted)
    return found


@pytest.fixture
def scheduled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the scheduler chose, each time: a prefill, or not."""
    found: list[bool] = []
    schedule = EngineCore._schedule

    def counted(self: EngineCore) -> tuple[list[Any], bool]:
        batch, is_prefill = schedule(self)
        if batch:
            found.append(is_prefill)
        return batch, is_prefill

    monkeypatch.setattr(EngineCore, "_schedule", counted)
    return found


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Runs `act` on the engine's thread while that decode step computes."""
    step, left = DirectDecode.step, [number]

    def watched(self: DirectDecode, ids: Any, batch: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            act()
        return step(self, ids, batch)

    monkeypatch.setattr(DirectDecode, "step", watched)


async def test_one_decision_is_enough_for_a_sequence_alone(
    driver: Driver, scheduled: list[bool], batches: list[int]
) -> None:
    [prompt] = prompts(1, (30,))
    tokens, last = await driver.run(prompt, NEW_TOKENS)
    assert (len(tokens), last.finish_reason) == (NEW_TOKENS, FinishReason.LENGTH)
    assert scheduled == [True, False]
    assert batches == [1] * (NEW_TOKENS - 1)
    assert driver.engine.stats().steps == NEW_TOKENS
    assert [len(step) for step in driver.steps] == [1] * NEW_TOKENS  # each token left at once


async def test_a_stop_token_ends_a_sequence_and_the_others_go_on(driver: Driver) -> None:
    work = prompts(2, (5, 16, 30))
    alone = [(await driver.run(p, NEW_TOKENS))[0] for p in work]
    stop = alone[1][20]
    at = alone[1].index(stop)
    found = await asyncio.gather(
        driver.run(work[0], NEW_TOKENS),
        driver.run(work[1], NEW_TOKENS, stop_token_ids=(stop,)),
        driver.run(work[2], NEW_TOKENS),
    )
    assert [tokens for tokens, _ in found] == [alone[0], alone[1][:at], alone[2]]
    assert found[1][1].finish_reason is FinishReason.STOP


async def test_who_comes_is_in_the_next_step_but_one(
    driver: Driver, batches: list[int], scheduled: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, late = prompts(3, (20, 9))
    alone = [(await driver.run(p, NEW_TOKENS))[0] for p in (first, late)]
    ids: list[str] = []
    batches.clear()
    scheduled.clear()
    at_step(monkeypatch, 5, lambda: ids.append(driver.submit(late, NEW_TOKENS)))
    assert (await driver.run(first, NEW_TOKENS))[0] == alone[0]
    found = [token async for output in driver.outputs(ids[0]) for token in output.token_ids]
    assert found == alone[1]
    assert batches[:7] == [1] * 5 + [2] * 2
    assert scheduled[:4] == [True, False, True, False]


async def test_who_is_cancelled_gets_no_token_more(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, stays = prompts(4, (20, 9))
    alone = [(await driver.run(p, NEW_TOKENS))[0] for p in (gone, stays)]
    third = "request-2"  # it may be computed before `submit` has returned
    at_step(monkeypatch, 5, lambda: driver.engine.cancel(third))
    assert driver.submit(gone, NEW_TOKENS) == third
    beside = asyncio.create_task(driver.run(stays, NEW_TOKENS))
    outputs = [output async for output in driver.outputs(third)]
    assert outputs[-1].finish_reason is FinishReason.CANCELLED
    said = [token for output in outputs for token in output.token_ids]
    assert said == alone[0][: len(said)]
    assert len(said) <= 5  # of the prompt, and of four steps
    assert (await beside)[0] == alone[1]


async def test_who_is_taken_out_leaves_after_the_step_with_its_blocks(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = prompts(4, (20,))
    alone, _ = await driver.run(prompt, NEW_TOKENS)
    second = "request-1"  # it may be computed before `submit` has returned
    at_step(monkeypatch, 5, lambda: driver.engine.take_out(second))
    assert driver.submit(prompt, NEW_TOKENS) == second
    outputs = [output async for output in driver.outputs(second)]
    assert outputs[-1].finish_reason is FinishReason.CANCELLED
    said = [token for output in outputs for token in output.token_ids]
    assert said == alone[:6], "of the prompt, and of five steps: the one under way counts"
    held = outputs[-1].held
    assert held is not None and held.num_cached_tokens == len(prompt) + len(said) - 1
    driver.engine.kv.free(held)


async def test_where_blocks_run_out_the_scheduler_finds_a_victim(
    tiny_llama: Path, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, late = prompts(5, (60, 60))
    ids: list[str] = []
    async with running_engine(tiny_llama, weights="int8", num_blocks=10, prefix_caching=False) as driver:
        alone = [(await driver.run(p, NEW_TOKENS))[0] for p in (first, late)]
        batches.clear()
        at_step(monkeypatch, 1, lambda: ids.append(driver.submit(late, NEW_TOKENS)))
        assert (await driver.run(first, NEW_TOKENS))[0] == alone[0]
        assert [token async for output in driver.outputs(ids[0]) for token in output.token_ids] == alone[1]
        assert set(batches) == {1, 2}
        stats = driver.engine.kv.get_utilization()
        assert stats.balanced
        assert stats.used_blocks == 0


async def test_results_that_are_lost_end_the_batch_and_nobody_else(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = prompts(6, (9, 20))
    alone = [(await driver.run(p, NEW_TOKENS))[0] for p in work]

    def broken(*_: Any) -> Any:
        raise RuntimeError("an injected fault")

    with monkeypatch.context() as patch:
        patch.setattr(EngineCore, "_append", broken)
        for _, last in await asyncio.gather(*(driver.run(p, NEW_TOKENS) for p in work)):
            assert isinstance(last.error, EngineFailed)
    assert [(await driver.run(p, NEW_TOKENS))[0] for p in work] == alone
    assert driver.engine.kv.get_utilization().balanced


async def test_blocks_that_wait_to_be_moved_are_moved_at_the_next_step(
    driver: Driver, scheduled: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    [prompt] = prompts(7, (30,))
    alone, _ = await driver.run(prompt, NEW_TOKENS)
    scheduled.clear()
    pool = driver.engine.kv
    assert isinstance(pool, LmdeployKvPool)
    at_step(monkeypatch, 5, lambda: pool.defragment(1 << 30))
    assert (await driver.run(prompt, NEW_TOKENS))[0] == alone
    assert scheduled == [True, False, False]
