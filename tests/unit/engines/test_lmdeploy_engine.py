"""LMDeploy on the CPU behind the Engine contract, against Hugging Face transformers on the same weights."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagellm_common.core.config import Config
from sagellm_common.core.errors import ConfigError, ContextTooLong, EngineFailed, InvalidRequest, KvExhausted
from sagellm_common.core.kv import BlockEvent
from sagellm_common.core.types import FinishReason, as_token_ids
from sagellm_common.engines import make_engine
from sagellm_common.engines.lmdeploy import hooks
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from tests.unit.engines.conftest import Driver, running_engine

Greedy = Callable[[Path, list[int], int], list[int]]
LENGTHS = (1, 2, 15, 16, 17, 32, 33, 100)


def prompts(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 259, size=n).tolist() for n in lengths]


def copied(model: Path, target: Path, **config: Any) -> Path:
    """The checkpoint with another config.json."""
    shutil.copytree(model, target, dirs_exist_ok=True)
    (target / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | config))
    return target


async def handed_over(driver: Driver, tokens: list[int], max_new_tokens: int, **sampling: Any) -> list[int]:
    """Prefill with held blocks, copy them byte by byte to new ones, go on from there: a handoff without a wire."""
    pool = driver.engine.kv
    first, last = await driver.run(tokens, 1, request={"hold_blocks": True}, **sampling)
    held = last.held
    assert held is not None
    assert held.num_cached_tokens == len(tokens)
    target = pool.allocate(as_token_ids(tokens), len(tokens), "a salt of its own, so that nothing is shared")
    assert target.num_shared_blocks == 0
    for source, destination in zip(held.block_ids, target.block_ids, strict=True):
        pool.regions().block(int(destination))[:] = pool.regions().block(int(source))
    pool.free(held)
    target.num_cached_tokens = len(tokens)
    request = {"allocation": target, "num_emitted_tokens": 1}
    rest, _ = await driver.run(tokens + first, max_new_tokens, request=request, **sampling)
    return first + rest


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2"])
async def test_batched_chunked_greedy_equals_transformers(
    model: str, request: pytest.FixtureRequest, hf_greedy: Greedy
) -> None:
    path = request.getfixturevalue(model)
    async with running_engine(path, max_prefill_tokens=32) as driver:
        for _ in range(2):  # the second time from the prefix cache
            found = await asyncio.gather(*(driver.run(p, 12) for p in prompts()))
            assert [tokens for tokens, _ in found] == [hf_greedy(path, p, 12) for p in prompts()]
            assert {last.finish_reason for _, last in found} == {FinishReason.LENGTH}
        assert driver.engine.kv.get_utilization().balanced
        assert driver.engine.kv.get_utilization().used_blocks == 0


async def test_handed_over_kv_continues_exactly_and_is_really_used(tiny_llama: Path, hf_greedy: Greedy) -> None:
    async with running_engine(tiny_llama) as driver:
        for tokens in prompts(1):
            assert await handed_over(driver, tokens, 10) == hf_greedy(tiny_llama, tokens, 10)
        # The same with KV zeroed: different tokens, so the blocks are what is read.
        tokens = prompts(1)[-1]
        first, last = await driver.run(tokens, 1, request={"hold_blocks": True})
        driver.engine.kv.free(last.held)
        target = driver.engine.kv.allocate(as_token_ids(tokens), len(tokens), "unshared")
        for block in target.block_ids:
            view = driver.engine.kv.regions().block(int(block))
            view[:] = bytes(len(view))
        target.num_cached_tokens = len(tokens)
        request = {"allocation": target, "num_emitted_tokens": 1}
        rest, _ = await driver.run(tokens + first, 10, request=request)
        assert first + rest != hf_greedy(tiny_llama, tokens, 10)


@pytest.mark.parametrize("bits", [8, 4])
async def test_quantised_kv_survives_a_handover(tiny_llama: Path, bits: int) -> None:
    async with running_engine(tiny_llama, kv_quant_bits=bits, prefix_caching=False) as driver:
        assert driver.engine.kv.layout.dtype == f"int{bits}/float32"
        for tokens in prompts(2, (5, 40)):
            undisturbed, _ = await driver.run(tokens, 10)
            assert await handed_over(driver, tokens, 10) == undisturbed


async def test_seeded_sampling_depends_on_seed_and_position_alone(tiny_llama: Path) -> None:
    sampling = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 7}
    tokens, other = prompts(3, (20, 33))
    async with running_engine(tiny_llama) as driver:
        alone, _ = await driver.run(tokens, 16, **sampling)
        (crowded, _), _ = await asyncio.gather(driver.run(tokens, 16, **sampling), driver.run(other, 16))
        assert crowded == alone
        request = {"num_emitted_tokens": 6}
        resumed, _ = await driver.run(tokens + alone[:6], 16, request=request, **sampling)
        assert alone[:6] + resumed == alone
        differently, _ = await driver.run(tokens, 16, **(sampling | {"seed": 8}))
        assert differently != alone


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


async def test_next_to_no_temperature_is_greedy_and_breaks_nobodys_batch(tiny_llama: Path) -> None:
    tokens, other = prompts(9, (20, 33))
    async with running_engine(tiny_llama) as driver:
        greedy, _ = await driver.run(tokens, 8)
        (cold, _), (_, last) = await asyncio.gather(
            driver.run(tokens, 8, temperature=1e-40, seed=1), driver.run(other, 8, temperature=1e-5, seed=1)
        )
        assert cold == greedy
        assert last.finish_reason is FinishReason.LENGTH


async def test_what_unwritten_slots_hold_does_not_matter(tiny_llama: Path, hf_greedy: Greedy) -> None:
    """A failed pull leaves anything in the blocks it was to fill."""
    async with running_engine(tiny_llama) as driver:
        pool = driver.engine.kv.regions().view
        pool[:] = b"\xff" * len(pool)  # NaN
        found = await asyncio.gather(*(driver.run(p, 12) for p in prompts()))
        assert [tokens for tokens, _ in found] == [hf_greedy(tiny_llama, p, 12) for p in prompts()]


async def test_a_new_sequence_takes_a_free_slot_at_once(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama, max_batch_size=4) as driver:
        running = [driver.submit(p, 500) for p in prompts(10, (10, 11, 12))]
        for request_id in running:
            await anext(driver.outputs(request_id))
        await driver.run(prompts(11, (5,))[0], 2)
        assert driver.engine.stats().running == 3
        for request_id in running:
            driver.engine.cancel(request_id)


async def test_tokens_leave_one_by_one_and_others_join_between_steps(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as driver:
        slow = driver.submit(prompts()[0], 200)
        stream = driver.outputs(slow)
        first = await anext(stream)
        assert len(first.token_ids) == 1
        await driver.run(prompts()[1], 3)  # joins and finishes while the other one runs
        rest = [output async for output in stream]
        assert [len(output.token_ids) for output in rest] == [1] * 199
        assert any(len(step) == 2 for step in driver.steps)


async def test_stop_tokens_end_a_sequence_and_are_not_emitted(tiny_llama: Path, hf_greedy: Greedy) -> None:
    tokens = prompts()[3]
    greedy = hf_greedy(tiny_llama, tokens, 12)
    stop = next(t for i, t in enumerate(greedy) if i >= 3 and t not in greedy[:i])
    before = greedy[: greedy.index(stop)]
    async with running_engine(tiny_llama) as driver:
        found, last = await driver.run(tokens, 12, stop_token_ids=(stop,))
        assert (found, last.finish_reason) == (before, FinishReason.STOP)
        found, _ = await driver.run(tokens, 12, stop_token_ids=(stop,), min_new_tokens=len(before) + 2)
        assert stop not in found[: len(before) + 2]


async def test_logprobs_are_those_of_the_emitted_tokens(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as driver:
        with_logprobs = driver.submit(prompts()[4], 3, num_logprobs=4)
        plain = driver.submit(prompts()[5], 3)
        outputs = [output async for output in driver.outputs(with_logprobs)]
        assert [output.logprobs async for output in driver.outputs(plain)] == [()] * 3
    for output in outputs:
        (logprob,) = output.logprobs
        assert logprob.top_token_ids[0] == output.token_ids[0]  # greedy takes the best
        assert logprob.top_logprobs[0] == logprob.logprob <= 0
        assert list(logprob.top_logprobs) == sorted(logprob.top_logprobs, reverse=True)
        assert len(logprob.top_token_ids) == 4


async def test_cancel_frees_everything_running_or_waiting(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama, max_batch_size=1) as driver:
        running, waiting = driver.submit(prompts()[7], 1000), driver.submit(prompts()[6], 1000)
        await anext(driver.outputs(running))
        for request_id in (waiting, running):
            driver.engine.cancel(request_id)
            driver.engine.cancel(request_id)
            *_, last = [output async for output in driver.outputs(request_id)]
            assert last.finish_reason is FinishReason.CANCELLED
        driver.engine.cancel("unknown")
        stats = driver.engine.kv.get_utilization()
        assert stats.balanced
        assert stats.used_blocks == 0
        assert (driver.engine.stats().running, driver.engine.stats().waiting) == (0, 0)


async def test_sequences_that_outgrow_the_pool_are_preempted_and_still_right(
    tiny_llama: Path, hf_greedy: Greedy
) -> None:
    async with running_engine(tiny_llama, num_blocks=12) as driver:
        found = await asyncio.gather(*(driver.run(p, 40) for p in prompts(4, (30, 40, 50))))
        assert [tokens for tokens, _ in found] == [hf_greedy(tiny_llama, p, 40) for p in prompts(4, (30, 40, 50))]
        assert driver.engine.kv.get_utilization().balanced


async def test_prefix_cache_publishes_computed_blocks_and_keeps_salts_apart(tiny_llama: Path) -> None:
    tokens = prompts(5, (40,))[0]
    async with running_engine(tiny_llama) as driver:
        pool, events = driver.engine.kv, list[BlockEvent]()
        pool.watch(events.append)
        await driver.run(tokens, 1)
        expected = block_hashes(as_token_ids(tokens), 16, root_hash(pool.layout))
        assert [h for event in events for h in event.stored] == expected == pool.cached_hashes()
        hit = pool.allocate(as_token_ids(tokens), len(tokens))
        assert (hit.num_cached_tokens, hit.num_shared_blocks, len(hit.block_ids)) == (32, 2, 3)
        miss = pool.allocate(as_token_ids(tokens), len(tokens), "another tenant")
        assert (miss.num_cached_tokens, miss.num_shared_blocks) == (0, 0)
        whole_blocks = pool.allocate(as_token_ids(tokens[:32]), 32)
        assert whole_blocks.num_cached_tokens == 16  # one token at least is left to compute
        for allocation in (hit, miss, whole_blocks, hit):
            pool.free(allocation)
        assert pool.get_utilization().used_blocks == 0
        assert pool.get_utilization().cached_blocks == 2


async def test_exhaustion_takes_nothing_and_evicts_the_cache_first(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama, num_blocks=16) as driver:
        pool = driver.engine.kv
        await driver.run(prompts(6, (64,))[0], 1)
        assert pool.get_utilization().cached_blocks == 4
        other = as_token_ids(prompts(7, (200,))[0])
        everything = pool.allocate(other, 16 * 16)
        assert pool.get_utilization().free_blocks == pool.get_utilization().cached_blocks == 0
        with pytest.raises(KvExhausted, match="raise engine.num_blocks") as caught:
            pool.allocate(other, 16)
        assert caught.value.retry_after_s
        assert pool.get_utilization().used_blocks == 16
        pool.free(everything)
        assert pool.get_utilization().free_blocks == 16


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


async def test_bad_requests_are_refused_at_once(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as driver:
        with pytest.raises(InvalidRequest, match="token_ids is empty"):
            driver.submit([], 1)
        with pytest.raises(ContextTooLong, match="exceed the context"):
            driver.submit([5] * 100, 10**6)
        with pytest.raises(InvalidRequest, match="leaves nothing to generate"):
            driver.submit([5], 1, request={"num_emitted_tokens": 1})
        whole = driver.engine.kv.allocate(as_token_ids([5] * 20), 20)
        whole.num_cached_tokens = 20
        with pytest.raises(InvalidRequest, match="leaves nothing to compute"):
            driver.submit([5] * 20, 1, request={"allocation": whole})
        driver.engine.kv.free(whole)
        assert driver.engine.kv.get_utilization().used_blocks == 0
        assert (driver.engine.stats().running, driver.engine.stats().waiting) == (0, 0)


async def test_closing_ends_what_runs_and_later_calls_say_so(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as driver:
        request_id = driver.submit(prompts()[0], 1000)
        await anext(driver.outputs(request_id))
        await driver.engine.close()
        await driver.engine.close()
        *_, last = [output async for output in driver.outputs(request_id)]
        assert last.finish_reason is FinishReason.CANCELLED
        with pytest.raises(EngineFailed, match="was stopped"):
            driver.submit(prompts()[0], 1)


async def test_a_model_whose_kv_is_not_kept_whole_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64}
    path = copied(tiny_llama, tmp_path, **mistral)
    engine = make_engine(Config.model_validate({"model": {"path": str(path)}}))
    with pytest.raises(ConfigError, match="window of 64 tokens needs engine.context_length_tokens"):
        await engine.start(lambda _: None)
    await engine.close()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"config.json": "{}"}, r"no \*.safetensors"),
        ({"config.json": "{", "model.safetensors": ""}, "not valid JSON"),
    ],
)
def test_a_path_that_is_no_checkpoint_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        make_engine(Config.model_validate({"model": {"path": str(tmp_path)}}))


async def test_the_patched_copy_is_what_runs(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if hooks.missing():
        pytest.skip("LMDeploy is not patched; `make setup` does it (it needs the patch command)")
    async with running_engine(tiny_llama, patches="required") as driver:
        assert driver.engine.description.startswith("LMDeploy 0.11.0, all 7 hooks; on cpu: ")
    monkeypatch.setattr(hooks, "available", lambda: frozenset(hooks.HOOKS) - {"policy", "on_evict"})
    engine = make_engine(Config.model_validate({"model": {"path": str(tiny_llama)}, "engine": {"patches": "required"}}))
    with pytest.raises(ConfigError, match="'required', but LMDeploy lacks on_evict, policy; `sagellm engine patches"):
        await engine.start(lambda _: None)
    await engine.close()


def test_another_lmdeploy_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.12.0")
    with pytest.raises(ConfigError, match=r"lmdeploy 0\.12\.0 is installed, 0\.11\.0 is wanted"):
        make_engine(Config.model_validate({"model": {"path": str(tiny_llama)}}))


async def test_an_unsupported_model_fails_the_start_with_its_cause(tiny_llama: Path, tmp_path: Path) -> None:
    path = copied(tiny_llama, tmp_path, architectures=["NoSuchModel"], model_type="x")
    engine = make_engine(Config.model_validate({"model": {"path": str(path)}}))
    with pytest.raises(ConfigError, match=r"model\.path: .*NoSuchModel.*"):
        await engine.start(lambda _: None)
    await engine.close()
