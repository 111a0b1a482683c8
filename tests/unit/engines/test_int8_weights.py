"""engine.weights int8 and int8x2: what they compute, and that a handed-over block is the block that was computed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagellm_common.core.config import Config
from sagellm_common.core.errors import ConfigError, EngineFailed
from sagellm_common.core.kv import Allocation
from sagellm_common.engines import make_engine
from sagellm_common.engines.base import SequenceOutput
from sagellm_common.engines.lmdeploy.core import EngineCore
from sagellm_common.engines.lmdeploy.kernels import native
from sagellm_common.engines.lmdeploy.kernels.direct import DirectDecode
from tests.support.engines import Driver, copied, handed_over, prompts, running_engine
from tests.support.kernels import native as built

Greedy = Callable[[Path, list[int], int], list[int]]
LENGTHS = (2, 17, 100, 33, 64, 15, 41, 80)


@pytest.fixture(autouse=True)
def compiled() -> None:
    """The best library of this machine, as `make setup` builds it."""
    for isa in native.supported_isas()[:1]:
        built(isa)
    native.native_ops.cache_clear()


async def prefilled(driver: Driver, batches: list[list[list[int]]]) -> list[bytes]:
    """The bytes of the KV that the prompts leave, batch after batch; only what their tokens wrote."""
    found = []
    for batch in batches:
        pool = driver.engine.kv
        for tokens, (_, last) in zip(
            batch,
            await asyncio.gather(*(driver.run(p, 1, request={"hold_blocks": True}) for p in batch)),
            strict=True,
        ):
            assert last.held is not None
            layout = pool.layout
            blocks = [np.frombuffer(pool.regions().block(int(b)), np.float32) for b in last.held.block_ids]
            shape = (-1, layout.block_size_tokens, layout.num_kv_heads * layout.head_dim)  # keys and values by layer
            kv = np.concatenate([block.reshape(shape) for block in blocks], axis=1)[:, : len(tokens)]
            assert np.abs(kv).min(axis=-1).max() > 0
            found.append(kv.tobytes())
            pool.free(last.held)
    return found


@pytest.mark.parametrize("weights", ["int8", "int8x2"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2"])
async def test_prefilled_blocks_are_the_same_bytes_however_they_came_about(
    model: str, weights: str, request: pytest.FixtureRequest
) -> None:
    path, work = request.getfixturevalue(model), prompts(1, LENGTHS)
    found = []
    for batches, chunk, threads in (
        ([[p] for p in work], 512, 1),
        ([[p] for p in work], 16, 1),
        ([work], 512, 2),
        ([work], 48, 1),
    ):
        async with running_engine(
            path, weights=weights, max_prefill_tokens=chunk, threads=threads, prefix_caching=False
        ) as driver:
            found.append(await prefilled(driver, batches))
    assert all(kv == found[0] for kv in found[1:])


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2"])
async def test_two_planes_say_what_float32_says(model: str, request: pytest.FixtureRequest, hf_greedy: Greedy) -> None:
    path, work = request.getfixturevalue(model), prompts(2, (2, 17, 40, 100))
    expected = [hf_greedy(path, p, 16) for p in work]
    async with running_engine(path, weights="int8x2", max_prefill_tokens=32) as driver:
        for _ in range(2):  # the second time from the prefix cache
            found = await asyncio.gather(*(driver.run(p, 16) for p in work))
            assert [tokens for tokens, _ in found] == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
async def test_a_handover_changes_nothing(tiny_llama: Path, dtype: str) -> None:
    async with running_engine(tiny_llama, weights="int8", dtype=dtype) as driver:
        assert driver.engine.kv.layout.dtype == dtype
        for tokens in prompts(3, (5, 40)):
            undisturbed, _ = await driver.run(tokens, 10)
            assert await handed_over(driver, tokens, 10) == undisturbed


@pytest.fixture
def by_way_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How each decode step was computed."""
    found: list[str] = []
    step, create = DirectDecode.step, EngineCore.create_model_inputs

    def direct(self: DirectDecode, *args: Any) -> Any:
        found.append("direct")
        return step(self, *args)

    def agent(self: EngineCore, batch: list[Any], is_prefill: bool) -> Any:
        if not is_prefill:
            found.append("agent")
        return create(self, batch, is_prefill)

    monkeypatch.setattr(DirectDecode, "step", direct)
    monkeypatch.setattr(EngineCore, "create_model_inputs", agent)
    return found


async def test_direct_steps_leave_the_same_tokens_and_the_same_kv_as_lmdeploys(
    tiny_llama: Path, by_way_of: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, found = prompts(6, LENGTHS), []
    for takes in (DirectDecode.takes, lambda *_: False):
        monkeypatch.setattr(DirectDecode, "takes", takes)
        by_way_of.clear()
        async with running_engine(tiny_llama, weights="int8", prefix_caching=False) as driver:
            ends = await asyncio.gather(*(driver.run(p, 20, request={"hold_blocks": True}) for p in work))
            blocks = [driver.engine.kv.regions().block(int(b)) for _, last in ends for b in held(last).block_ids]
            found.append(([tokens for tokens, _ in ends], [bytes(block) for block in blocks]))
            for _, last in ends:
                driver.engine.kv.free(held(last))
        assert set(by_way_of) == {"direct" if len(found) == 1 else "agent"}
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.8, "seed": 3},
        {"temperature": 1.0, "top_k": 5, "seed": 3},
        {"repetition_penalty": 1.2},
        {"num_logprobs": 2},
        {"min_new_tokens": 12, "stop_token_ids": (7,), "ignore_eos": False},
    ],
)
async def test_who_wants_more_than_the_likeliest_token_goes_lmdeploys_way(
    tiny_llama: Path, by_way_of: list[str], sampling: dict[str, Any]
) -> None:
    [one, other] = prompts(8, (20, 30))
    async with running_engine(tiny_llama, weights="int8") as driver:
        alone, _ = await driver.run(one, 12)
        assert set(by_way_of) == {"direct"}
        by_way_of.clear()
        beside, _ = await asyncio.gather(driver.run(one, 12), driver.run(other, 12, **sampling))
        assert beside[0] == alone
        assert "agent" in by_way_of


async def test_a_direct_step_that_fails_ends_nobody_but_the_culprit(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = prompts(9, (9, 20, 31))
    async with running_engine(tiny_llama, weights="int8", prefix_caching=False) as driver:
        expected = [(await driver.run(p, 8))[0] for p in work]
        step = DirectDecode.step

        def broken(self: DirectDecode, ids: Any, batch: Any) -> Any:
            if 24 in batch.kv_lens.tolist():  # of the second, in its fourth decode step
                raise MemoryError("an injected fault")
            return step(self, ids, batch)

        monkeypatch.setattr(DirectDecode, "step", broken)
        found = await asyncio.gather(*(driver.run(p, 8) for p in work))
        assert [tokens for tokens, _ in found] == [expected[0], expected[1][:4], expected[2]]
        assert isinstance(found[1][1].error, EngineFailed)
        assert driver.engine.kv.get_utilization().balanced


def held(output: SequenceOutput) -> Allocation:
    assert output.held is not None
    return output.held


async def test_kv_of_other_weights_is_another_models_kv(tiny_llama: Path) -> None:
    fingerprints = set()
    for weights in ("dtype", "int8", "int8x2"):
        async with running_engine(tiny_llama, weights=weights) as driver:
            fingerprints.add(driver.engine.kv.layout.model_fingerprint)
    assert len(fingerprints) == 3


async def test_without_compiled_kernels_torch_computes_the_same_and_says_so(
    tiny_llama: Path,
    hf_greedy: Greedy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("SAGELLM_CACHE", str(tmp_path))  # nothing was built here
    work = prompts(4, (3, 20))
    with caplog.at_level(logging.WARNING):
        async with running_engine(tiny_llama, weights="int8x2") as driver:
            assert "torch in place of compiled kernels" in driver.engine.description
            found = await asyncio.gather(*(driver.run(p, 8) for p in work))
    assert [tokens for tokens, _ in found] == [hf_greedy(tiny_llama, p, 8) for p in work]
    assert "torch computes instead" in caplog.text
    native.native_ops.cache_clear()


async def test_compiled_kernels_are_named(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama, weights="int8") as driver:
        assert f"int8 weights, {native.supported_isas()[0]} kernels" in driver.engine.description


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "serves LlamaForCausalLM and Qwen2"),
        ({"hidden_size": 72, "num_attention_heads": 4, "head_dim": 16}, "hidden_size 72 is no multiple of 32"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rotary embeddings of type 'dynamic'"),
    ],
)
async def test_a_model_that_does_not_fit_is_refused(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    path = copied(tiny_llama, tmp_path, **changes)
    engine = make_engine(Config.model_validate({"model": {"path": str(path)}, "engine": {"weights": "int8"}}))
    with pytest.raises(ConfigError, match=words):
        await engine.start(lambda _: None)


@pytest.mark.parametrize("other", [{"kv_quant_bits": 8}, {"tensor_parallel": 2}, {"device": "cuda"}])
def test_what_int8_weights_do_not_go_with(other: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"weights 'int8' needs {next(iter(other))}"):
        Config.model_validate({"engine": {"weights": "int8", **other}})


async def test_two_planes_say_what_float32_says_of_a_real_model(smollm2: Path, hf_greedy: Greedy) -> None:
    """Its weights come from a 4-bit file: four bits hold them exactly."""
    from tokenizers import Tokenizer

    text = (Path(__file__).parents[3] / "LICENSE").read_text()
    ids = Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(text).ids
    work = [ids[:30], ids[200:320]]
    async with running_engine(smollm2, weights="int8x2") as driver:
        found = await asyncio.gather(*(driver.run(p, 20) for p in work))
    assert [tokens for tokens, _ in found] == [hf_greedy(smollm2, p, 20) for p in work]
