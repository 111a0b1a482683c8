"""Ties: what a sequence says must not depend on who else is in the batch."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engines import running_engine


@settings(deadline=None)  # the first example imports LMDeploy
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 5))
def test_of_equal_logits_the_lower_token_is_first(seed: int, count: int, values: int) -> None:
    import sagellm_common.engines.lmdeploy.device_cpu  # noqa: F401  before LMDeploy: a CPU is enough
    from sagellm_common.engines.lmdeploy.sampling import best_first

    rows = np.random.default_rng(seed).integers(0, values, (3, 12)).tolist()
    scores, ids = best_first(torch.tensor(rows, dtype=torch.float32), count)
    for row, found_scores, found_ids in zip(rows, scores.tolist(), ids.tolist(), strict=True):
        expected = sorted(range(12), key=lambda token: (-row[token], token))[:count]
        assert found_ids == expected
        assert found_scores == [row[token] for token in expected]


async def test_a_bfloat16_model_says_the_same_alone_and_in_company(tiny_llama: Path) -> None:
    """Its best logits tie often: greedy sequences alone take the argmax, beside sampled ones the first of a sort."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 259, size=n).tolist() for n in (1, 17, 33, 60, 64, 100)]
    sampling = [{}, {"temperature": 0.9, "top_k": 50, "seed": 7}, {}, {"temperature": 0.8, "seed": 3}, {}, {}]
    async with running_engine(tiny_llama, dtype="bfloat16", prefix_caching=False) as driver:
        work = list(zip(prompts, sampling, strict=True))
        alone = [(await driver.run(prompt, 40, **params))[0] for prompt, params in work]
        together = await asyncio.gather(*(driver.run(prompt, 40, **params) for prompt, params in work))
        assert [tokens for tokens, _ in together] == alone
