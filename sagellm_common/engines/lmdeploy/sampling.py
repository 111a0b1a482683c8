"""Our sampling parameters as LMDeploy's."""

from __future__ import annotations

from lmdeploy.pytorch.messages import SamplingParam

from sagellm_common.core.types import SamplingParams


def lmdeploy_sampling(
    sampling: SamplingParams, num_emitted_tokens: int, stop_token_ids: frozenset[int]
) -> SamplingParam:
    """Counts start after the emitted tokens.

    `ignore_eos` is the caller's doing: it leaves the end-of-sequence tokens out of stop_token_ids. LMDeploy's own flag
    would forbid these tokens instead, and change what is generated.
    """
    return SamplingParam(
        top_k=1 if sampling.greedy else sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        temperature=1.0 if sampling.greedy else sampling.temperature,
        repetition_penalty=sampling.repetition_penalty,
        random_seed=sampling.seed,
        stop_words=sorted(stop_token_ids),
        max_new_tokens=sampling.max_new_tokens - num_emitted_tokens,
        min_new_tokens=max(0, sampling.min_new_tokens - num_emitted_tokens),
        num_logprobs=sampling.num_logprobs if sampling.num_logprobs else -1,
    )
