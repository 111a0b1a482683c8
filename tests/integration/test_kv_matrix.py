"""PD with everything: each kind of KV, in blocks of equal and of different sizes and numbers, with prefix caching,
chunked prefill, seeded sampling, stop conditions and logprobs, all requests at once, twice.

Two LMDeploy engines in the real services, over gRPC and the byte path, against one undisturbed engine with the same
kind of KV, that caches nothing, never chunks and has one request at a time. Quantised KV is read as it was stored, by
the chunk that stored it too: chunks and the handover change no more than the rounding of sums.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sagellm_common.core.config import Config
from sagellm_common.core.topology_embedded import EmbeddedTopology
from sagellm_common.core.types import FinishReason, GenerationRequest, TokenLogprob, WorkerRole
from sagellm_common.engines import make_engine
from tests.support.engines import Driver, running_engine
from tests.support.topology_server import topology_server
from tests.support.workers import Generated, Worker, generate, request, test_config, worker

KV = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "kv_quant_bits": 8},
    "int4": {"dtype": "float32", "kv_quant_bits": 4},
    "int4-bf16": {"dtype": "bfloat16", "kv_quant_bits": 4},
}
BLOCKS = {
    "one size": ({"num_blocks": 160}, {"num_blocks": 90}),
    "to larger": ({"block_size_tokens": 16, "num_blocks": 160}, {"block_size_tokens": 32, "num_blocks": 50}),
    "to smaller": ({"block_size_tokens": 32, "num_blocks": 80}, {"block_size_tokens": 8, "num_blocks": 200}),
    "odd": ({"block_size_tokens": 24, "num_blocks": 110}, {"block_size_tokens": 10, "num_blocks": 150}),
}
CHUNK_TOKENS = 48
LENGTHS = (1, 15, 16, 17, 33, 64, 130, 150)
NEW_TOKENS = 20
SAMPLED = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 7}
RTOL = {"float32": 1e-3, "bfloat16": 3e-2}


def requests() -> list[GenerationRequest]:
    """Greedy, sampled, with logprobs, with a least number of tokens, ending at the model's end-of-sequence token."""
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, 259, size=n).tolist() for n in LENGTHS]
    prompts += [prompts[-1][:100] + tail for tail in ([], [9, 8, 7], prompts[3])]  # these share their beginning
    variants: tuple[dict[str, Any], ...] = (
        {"num_logprobs": 3},
        SAMPLED | {"num_logprobs": 2},
        {"repetition_penalty": 1.3},
        SAMPLED | {"min_new_tokens": 5, "ignore_eos": False},
    )
    return [
        request(prompt, NEW_TOKENS, f"r{n}", **({"ignore_eos": True} | variants[n % len(variants)]))
        for n, prompt in enumerate(prompts)
    ]


@dataclass(frozen=True, slots=True)
class Expected:
    """What the undisturbed engine says."""

    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None

    @classmethod
    async def of(cls, driver: Driver, wanted: GenerationRequest) -> Expected:
        sampling = {name: getattr(wanted.sampling, name) for name in wanted.sampling.__slots__}
        submitted = driver.submit(wanted.prompt_token_ids.tolist(), **sampling)
        outputs = [output async for output in driver.outputs(submitted)]
        return cls(
            [token for output in outputs for token in output.token_ids],
            [logprob for output in outputs for logprob in output.logprobs],
            outputs[-1].finish_reason,
        )


async def undisturbed(model: Path, kv: dict[str, Any]) -> list[tuple[GenerationRequest, Expected]]:
    """Each request, and again with one of its tokens for a stop token."""
    async with running_engine(model, prefix_caching=False, max_prefill_tokens=512, **kv) as driver:
        work = [(wanted, await Expected.of(driver, wanted)) for wanted in requests()]
        for wanted, found in [one for one in work if len(one[1].tokens) == NEW_TOKENS][::3]:
            stop = {"ignore_eos": True, "stop_token_ids": (found.tokens[len(found.tokens) // 2],), "num_logprobs": 1}
            again = request(wanted.prompt_token_ids.tolist(), NEW_TOKENS, f"{wanted.request_id}-stop", **stop)
            work.append((again, await Expected.of(driver, again)))
        return work


@asynccontextmanager
async def pair(
    model: Path, kv: dict[str, Any], blocks: tuple[dict[str, Any], dict[str, Any]]
) -> AsyncIterator[tuple[Worker, Worker]]:
    def engine(**settings: Any) -> Any:
        section = {"max_prefill_tokens": CHUNK_TOKENS, **kv, **settings}
        return make_engine(Config.model_validate({"model": {"path": str(model)}, "engine": section}))

    async with (
        topology_server(EmbeddedTopology()) as router,
        worker(WorkerRole.PREFILL, router, engine=engine(**blocks[0]), config=test_config()) as prefill,
        worker(WorkerRole.DECODE, router, engine=engine(**blocks[1]), config=test_config()) as decode,
    ):
        yield prefill, decode


def check_logprobs(found: list[TokenLogprob], expected: list[TokenLogprob], rtol: float) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert len(mine.top_logprobs) == len(theirs.top_logprobs)
        np.testing.assert_allclose(
            [mine.logprob, *mine.top_logprobs], [theirs.logprob, *theirs.top_logprobs], rtol=rtol, atol=rtol
        )


def matrix() -> list[Any]:
    """Every kind of KV over blocks of one size and over odd ones; the others with the extremes."""
    cases = [(kv, blocks) for kv in KV for blocks in ("one size", "odd")]
    cases += [(kv, blocks) for kv in ("fp32", "int4-bf16") for blocks in ("to larger", "to smaller")]
    return [pytest.param(kv, blocks, id=f"{kv}, {blocks}") for kv, blocks in sorted(cases)]


@pytest.fixture(scope="module")
def oracle() -> dict[str, list[tuple[GenerationRequest, Expected]]]:
    """What the undisturbed engine says, by kind of KV: filled as it is needed."""
    return {}


@pytest.mark.parametrize(("kv", "blocks"), matrix())
async def test_tokens_equal_the_single_engine(
    tiny_llama: Path, oracle: dict[str, list[tuple[GenerationRequest, Expected]]], kv: str, blocks: str
) -> None:
    if kv not in oracle:
        oracle[kv] = await undisturbed(tiny_llama, KV[kv])
    work = oracle[kv]
    async with pair(tiny_llama, KV[kv], BLOCKS[blocks]) as (prefill, decode):
        for attempt in (1, 2):
            done: list[Generated] = await asyncio.gather(
                *(generate(prefill, decode, wanted, attempt) for wanted, _ in work)
            )
            for (wanted, expected), found in zip(work, done, strict=True):
                assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason), wanted
                logprobs = [*found.prefill.logprobs, *(lp for step in found.steps for lp in step.logprobs)]
                check_logprobs(logprobs, expected.logprobs, RTOL[KV[kv]["dtype"]])
                transfer = found.steps[0].transfer if found.steps else None
                if transfer and attempt == 2 and len(wanted.prompt_token_ids) > 32:
                    assert found.prefill.cached_tokens > 0
                    assert transfer.blocks_reused > 0
            assert any(expected.finish_reason is FinishReason.STOP for _, expected in work)
            await prefill.idle()
            await decode.idle()
