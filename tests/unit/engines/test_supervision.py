"""One bad request never ends the engine, nor its neighbours: faults are injected at every stage of a step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagellm_common.core.errors import EngineFailed
from sagellm_common.core.types import FinishReason, as_token_ids
from tests.support.engines import Driver, running_engine

Greedy = Callable[[Path, list[int], int], list[int]]
NEW_TOKENS = 12
POISON_LENGTH = 50
"""No other sequence is ever that long, nor NEW_TOKENS shorter."""
PROMPTS = [np.random.default_rng(n).integers(3, 259, size=n).tolist() for n in (3, 20, 33, POISON_LENGTH - 4, 70)]
POISONED = 3

Fault = Callable[[pytest.MonkeyPatch], None]


class Injected(RuntimeError):
    pass


def when(patch: pytest.MonkeyPatch, owner: Any, name: str, bad: Callable[..., bool]) -> None:
    """The method raises where `bad` says so of its arguments."""
    original = getattr(owner, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        if bad(*args, **kwargs):
            raise Injected("an injected fault")
        return original(*args, **kwargs)

    patch.setattr(owner, name, method)


def poisoned(*args: Any, **_: Any) -> bool:
    """Whether LMDeploy's sequence that is about to get token number POISON_LENGTH + 1 is among the arguments."""
    seqs = [seq for arg in args for seq in (arg if isinstance(arg, list) else [arg])]
    return any(getattr(seq, "num_all_ids", 0) == POISON_LENGTH for seq in seqs)


def in_the_model(patch: pytest.MonkeyPatch) -> None:
    from sagellm_common.engines.lmdeploy.device_cpu.install import CpuModelAgent

    def bad(_: Any, inputs: Any, *__: Any, **___: Any) -> bool:
        return POISON_LENGTH in (inputs.history_lengths + inputs.seq_length).tolist()

    when(patch, CpuModelAgent, "_forward_impl", bad)


def in_the_inputs(patch: pytest.MonkeyPatch) -> None:
    from sagellm_common.engines.lmdeploy.sampling import RowwiseSampling

    when(patch, RowwiseSampling, "make_sampling_inputs", poisoned)


def in_scheduling(patch: pytest.MonkeyPatch) -> None:
    from sagellm_common.engines.lmdeploy.block_manager import KvBlockManager

    when(patch, KvBlockManager, "allocate_msg", poisoned)


STAGES: dict[str, Fault] = {"model": in_the_model, "inputs": in_the_inputs, "scheduling": in_scheduling}


async def check_all_but_the_poisoned_survive(driver: Driver, model: Path, oracle: Greedy, emitted: int) -> None:
    found = await asyncio.gather(*(driver.run(prompt, NEW_TOKENS) for prompt in PROMPTS))
    for i, (prompt, (tokens, last)) in enumerate(zip(PROMPTS, found, strict=True)):
        expected = oracle(model, prompt, NEW_TOKENS)
        if i != POISONED:
            assert (tokens, last.finish_reason, last.error) == (expected, FinishReason.LENGTH, None)
            continue
        assert (tokens, last.finish_reason) == (expected[:emitted], FinishReason.ERROR)
        assert isinstance(last.error, EngineFailed)
        assert "injected" not in last.error.message
    stats = driver.engine.kv.get_utilization()
    assert stats.balanced
    assert stats.used_blocks == 0
    assert (driver.engine.stats().running, driver.engine.stats().waiting) == (0, 0)


@pytest.mark.parametrize("stage", STAGES)
async def test_a_request_that_fails_every_step_ends_alone(
    tiny_llama: Path, hf_greedy: Greedy, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    async with running_engine(tiny_llama) as driver:
        with monkeypatch.context() as patch:
            STAGES[stage](patch)
            await check_all_but_the_poisoned_survive(driver, tiny_llama, hf_greedy, emitted=4)
        assert (await driver.run(PROMPTS[POISONED], 6))[0] == hf_greedy(tiny_llama, PROMPTS[POISONED], 6)


@pytest.mark.parametrize("stage", STAGES)
async def test_a_prompt_that_cannot_even_start_ends_alone(
    tiny_llama: Path, hf_greedy: Greedy, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr(f"{__name__}.POISON_LENGTH", len(PROMPTS[POISONED]))
    async with running_engine(tiny_llama) as driver:
        STAGES[stage](monkeypatch)
        await check_all_but_the_poisoned_survive(driver, tiny_llama, hf_greedy, emitted=0)


async def test_a_failure_that_does_not_come_again_ends_nobody(
    tiny_llama: Path, hf_greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sagellm_common.engines.lmdeploy.device_cpu.install import CpuModelAgent

    calls = iter(range(1000))
    when(monkeypatch, CpuModelAgent, "_forward_impl", lambda *_, **__: next(calls) in (0, 4, 9))
    async with running_engine(tiny_llama) as driver:
        found = await asyncio.gather(*(driver.run(prompt, NEW_TOKENS) for prompt in PROMPTS))
        assert [tokens for tokens, _ in found] == [hf_greedy(tiny_llama, prompt, NEW_TOKENS) for prompt in PROMPTS]


async def test_an_executor_that_cannot_be_started_again_ends_the_engine_and_everybody_hears_it(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sagellm_common.engines.lmdeploy.core import EngineCore

    async with running_engine(tiny_llama) as driver:
        await driver.run(PROMPTS[0], 1)  # it has started
        with monkeypatch.context() as patch:
            in_the_model(patch)
            when(patch, EngineCore, "_start_executor", lambda _: True)
            outcomes = await asyncio.gather(*(driver.run(PROMPTS[i], 500) for i in (0, POISONED)))
        assert {type(last.error) for _, last in outcomes} == {EngineFailed}
        with pytest.raises(EngineFailed, match="the engine (was )?stopped"):
            driver.submit(PROMPTS[0], 1)


async def test_blocks_that_were_given_back_are_refused_and_nothing_is_queued(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as driver:
        allocation = driver.engine.kv.allocate(as_token_ids(PROMPTS[1]), len(PROMPTS[1]))
        driver.engine.kv.free(allocation)
        with pytest.raises(ValueError, match="freed or handed over"):
            driver.submit(PROMPTS[1], 2, {"allocation": allocation})
        assert driver.engine.stats().waiting == 0
        assert len((await driver.run(PROMPTS[1], 2))[0]) == 2


async def test_lost_results_end_their_batch_and_not_the_engine(
    tiny_llama: Path, hf_greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sagellm_common.engines.lmdeploy.kv_manager import EnginePrefixCache

    async with running_engine(tiny_llama) as driver:
        with monkeypatch.context() as patch:
            when(patch, EnginePrefixCache, "publish", lambda *_: True)
            _, last = await driver.run(PROMPTS[1], NEW_TOKENS)
        assert isinstance(last.error, EngineFailed)
        assert driver.engine.kv.get_utilization().used_blocks == 0
        assert (await driver.run(PROMPTS[1], 6))[0] == hf_greedy(tiny_llama, PROMPTS[1], 6)
