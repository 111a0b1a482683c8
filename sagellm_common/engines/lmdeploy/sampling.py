"""Our sampling parameters as LMDeploy's, and sampling that no neighbour in the batch has a say in."""

from __future__ import annotations

from typing import Any

import torch
from lmdeploy.pytorch.engine.logits_process import (
    FusedLogitsProcessor,
    _filter_minp_sorted_,
    _filter_topk_sorted_,
    _filter_topp_sorted_,
    _multinomial_sampling,
)
from lmdeploy.pytorch.messages import SamplingParam
from lmdeploy.pytorch.strategies.ar.sampling import ARSamplingStrategy
from torch import Tensor

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


class RowwiseSampling(ARSamplingStrategy):
    """LMDeploy's, with padding that has no effect.

    LMDeploy pads the rows of a batch to one length with token 0 or the model's first, and these count: they are
    penalised as if they had been said, and they stop whoever has fewer stop tokens than its neighbours. Here a row is
    padded with what it has anyway, and the engine looks for stop tokens itself (`stopped`).
    """

    def make_sampling_inputs(self, seqs: list[Any]) -> Any:
        inputs = super().make_sampling_inputs(seqs)
        if inputs.all_ids is not None:
            for row, seq in zip(inputs.all_ids, seqs, strict=True):
                row[: len(row) - seq.num_valid_ids] = int(seq.all_ids[0])
        if inputs.bad_words is not None:  # stop tokens, too, as long as min_new_tokens forbids them
            some = inputs.bad_mask[:, :1]
            inputs.bad_words = torch.where(inputs.bad_mask, inputs.bad_words, inputs.bad_words[:, :1])
            inputs.bad_mask = inputs.bad_mask | some
        inputs.stop_words = inputs.stop_mask = None
        return inputs


class RowwiseLogitsProcessor(FusedLogitsProcessor):
    """LMDeploy's, with equal logits in one order: the lower token id first.

    LMDeploy takes argmax, topk or an unstable sort, whichever the whole batch allows, and these disagree about ties:
    what a sequence says would depend on its neighbours. In bfloat16 the two best logits tie every few dozen tokens.
    """

    @torch.inference_mode()
    def sampling(self, logits: Tensor) -> Tensor:
        """logits [B, vocabulary] → token ids [B]. Without guided decoding, which nobody can ask for."""
        inputs = self.sampling_inputs
        if inputs.max_top_k == 1:
            return logits.argmax(-1)
        count = inputs.max_top_k or logits.size(1)
        scores, ids = best_first(logits, count)
        if inputs.top_k is not None:
            scores = _filter_topk_sorted_(scores, inputs.top_k.masked_fill(inputs.top_k <= 0, count))
        if inputs.top_p is not None:
            scores = _filter_topp_sorted_(scores, inputs.top_p)
        if inputs.min_p is not None:
            scores = _filter_minp_sorted_(scores, inputs.min_p)
        tokens: Tensor = _multinomial_sampling(scores.softmax(1), inputs.random_seeds, inputs.random_offsets, ids)
        return tokens


def best_first(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of each row and their indices, [B, count]; of equal ones the lower index first."""
    if count < logits.size(1):
        values, ids = logits.topk(count + 1)  # one more, for it tells whether there was a choice
        if not (values[:, -1] == values[:, -2]).any():
            ids, order = ids[:, :count].sort(1)
            values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
            return values, ids.gather(1, order)
    values, ids = logits.sort(dim=1, descending=True, stable=True)
    return values[:, :count], ids[:, :count]


def stopped(seq: Any, token: int) -> bool:
    """Whether `token`, not yet appended, is the last one of LMDeploy's sequence."""
    param = seq.sampling_param
    return token in param.stop_words or seq.num_new_tokens + 1 >= param.max_new_tokens
