"""LMDeploy on the CPU: what it does beyond the contract of engines (`tests/contract/test_engine.py`)."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sagellm_common.core.errors import ConfigError, EngineFailed
from sagellm_common.core.types import FinishReason
from sagellm_common.engines import make_engine
from sagellm_common.engines.lmdeploy import hooks
from tests.support.engines import copied, engine_config, handed_over, prompts, running_engine

Greedy = Callable[[Path, list[int], int], list[int]]


@pytest.mark.parametrize("bits", [8, 4])
async def test_quantised_kv_survives_a_handover(tiny_llama: Path, bits: int) -> None:
    async with running_engine(tiny_llama, kv_quant_bits=bits, prefix_caching=False) as driver:
        assert driver.engine.kv.layout.dtype == f"int{bits}/float32"
        for tokens in prompts(2, (5, 40)):
            undisturbed, _ = await driver.run(tokens, 10)
            assert await handed_over(driver, tokens, 10) == undisturbed


@pytest.mark.parametrize(
    ("sampling", "neighbour"),
    [
        ({"repetition_penalty": 0.05}, {}),  # rewards what was said: the neighbour's padding must not count as said
        ({"repetition_penalty": 5.0}, {"repetition_penalty": 2.0}),
        ({"temperature": 50.0, "seed": 8}, {"stop_token_ids": (1, 2, 3)}),  # says token 0, with which stop tokens pad
        ({"temperature": 50.0, "seed": 8, "stop_token_ids": (0,), "min_new_tokens": 150}, {"stop_token_ids": (1, 2)}),
        ({"temperature": 1.5, "top_k": 50, "seed": 3}, {"temperature": 1.0, "seed": 4}),
        ({"temperature": 1.5, "min_p": 0.02, "seed": 3}, {"temperature": 0.5, "top_p": 0.5, "seed": 4}),
    ],
)
async def test_tokens_do_not_depend_on_who_else_is_in_the_batch(
    tiny_llama: Path, sampling: dict[str, Any], neighbour: dict[str, Any]
) -> None:
    tokens, other = prompts(8, (5, 90))
    async with running_engine(tiny_llama) as driver:
        alone, last = await driver.run(tokens, 150, **sampling)
        assert last.error is None
        assert len(alone) == 150
        if sampling.get("temperature") == 50.0:
            assert (0 in alone) is ("stop_token_ids" not in sampling)
        neighbours = {"min_new_tokens": 150, "ignore_eos": False} | neighbour
        (crowded, _), _ = await asyncio.gather(
            driver.run(tokens, 150, **sampling), driver.run(other, 150, **neighbours)
        )
        assert crowded == alone


async def test_a_cancelled_long_prompt_is_not_computed_to_its_end(
    tiny_llama: Path, hf_greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its chunks are one step: what was asked for in between must not wait for the last of them."""
    from sagellm_common.engines.lmdeploy.device_cpu.install import CpuModelAgent

    forward, chunks = CpuModelAgent._forward_impl, []
    tokens, other = prompts(12, (1600, 40))
    async with running_engine(tiny_llama, max_prefill_tokens=16) as driver:

        def counted(agent: CpuModelAgent, inputs: Any) -> Any:
            chunks.append(inputs)
            if len(chunks) == 3:
                driver.engine.cancel(request_id)
            return forward(agent, inputs)

        with monkeypatch.context() as patch:
            patch.setattr(CpuModelAgent, "_forward_impl", counted)
            request_id = driver.submit(tokens, 5)
            (last,) = [output async for output in driver.outputs(request_id)]
        assert (last.finish_reason, last.token_ids, len(chunks)) == (FinishReason.CANCELLED, (), 3)
        assert driver.engine.kv.cached_hashes() == []  # nothing that was not computed is shared
        assert driver.engine.kv.get_utilization().used_blocks == 0
        for prompt in (other, tokens):
            found, _ = await driver.run(prompt, 5)
            assert found == hf_greedy(tiny_llama, prompt, 5)


async def test_a_failing_step_ends_its_sequences_not_the_engine(
    tiny_llama: Path, hf_greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sagellm_common.engines.lmdeploy.device_cpu.install import CpuModelAgent

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("an injected fault")

    async with running_engine(tiny_llama) as driver:
        with monkeypatch.context() as patch:
            patch.setattr(CpuModelAgent, "_forward_impl", broken)
            _, last = await driver.run(prompts()[4], 5)
        assert last.finish_reason is FinishReason.ERROR
        assert isinstance(last.error, EngineFailed)
        assert "injected" not in last.error.message
        assert driver.engine.kv.get_utilization().used_blocks == 0
        assert driver.engine.kv.cached_hashes() == []  # nothing that was not computed is shared
        found, _ = await driver.run(prompts()[4], 5)
        assert found == hf_greedy(tiny_llama, prompts()[4], 5)


async def test_an_engine_that_stops_says_so_to_everybody(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sagellm_common.engines.lmdeploy.core import EngineCore

    def broken(_: EngineCore) -> None:
        raise RuntimeError("an injected fault")

    async with running_engine(tiny_llama) as driver:
        request_id = driver.submit(prompts()[0], 1000)
        await anext(driver.outputs(request_id))
        with monkeypatch.context() as patch:
            patch.setattr(EngineCore, "_schedule", broken)
            *_, last = [output async for output in driver.outputs(request_id)]
        assert isinstance(last.error, EngineFailed)
        with pytest.raises(EngineFailed):
            driver.submit(prompts()[0], 1)
        async with asyncio.timeout(30):
            await driver.engine.ended.wait()


async def test_a_model_whose_kv_is_not_kept_whole_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64}
    path = copied(tiny_llama, tmp_path, **mistral)
    engine = make_engine(engine_config(path))
    with pytest.raises(ConfigError, match="window of 64 tokens needs engine.context_length_tokens"):
        await engine.start(lambda _: None)
    await engine.close()


@pytest.mark.usefixtures("hooked")
async def test_the_patched_copy_is_what_runs(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_engine(tiny_llama, patches="required") as driver:
        assert driver.engine.description.startswith("LMDeploy 0.11.0, all 7 hooks; on cpu: ")
    monkeypatch.setattr(hooks, "available", lambda: frozenset(hooks.HOOKS) - {"policy", "on_evict"})
    engine = make_engine(engine_config(tiny_llama, patches="required"))
    with pytest.raises(ConfigError, match="'required', but LMDeploy lacks on_evict, policy; `sagellm engine patches"):
        await engine.start(lambda _: None)
    await engine.close()


def test_another_lmdeploy_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.12.0")
    with pytest.raises(ConfigError, match=r"lmdeploy 0\.12\.0 is installed, 0\.11\.0 is wanted"):
        make_engine(engine_config(tiny_llama))
