"""Our sampling parameters as vLLM's, and draws that depend on seed and position alone."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams as VllmSamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from sagellm_common.core.types import SamplingParams, TokenLogprob
from sagellm_common.engines.vllm.connector import SEQUENCE

SEED = "sagellm_seed"


def vllm_sampling(
    sampling: SamplingParams, num_emitted_tokens: int, stop_token_ids: frozenset[int], sequence: str
) -> VllmSamplingParams:
    """Counts start after the emitted tokens. vLLM has no tokenizer here, so `stop_token_ids` name the end too."""
    left = sampling.max_new_tokens - num_emitted_tokens
    return VllmSamplingParams(
        temperature=0.0 if sampling.greedy else sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=left,
        min_tokens=min(left, max(0, sampling.min_new_tokens - num_emitted_tokens)),
        stop_token_ids=sorted(stop_token_ids),
        ignore_eos=True,
        logprobs=sampling.num_logprobs or None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={
            "kv_transfer_params": {SEQUENCE: sequence},
            SEED: secrets.randbits(63) if sampling.seed is None else sampling.seed,
        },
    )


def token_logprobs(
    logprobs: Sequence[dict[int, Any]] | None, tokens: Sequence[int], count: int
) -> tuple[TokenLogprob, ...]:
    """One TokenLogprob per token, `count` alternatives each; () when none were asked for."""
    if not count or logprobs is None:
        return ()
    rows = []
    for token, row in zip(tokens, logprobs, strict=True):
        best = sorted(row.items(), key=lambda item: -item[1].logprob)[:count]
        rows.append(TokenLogprob(row[token].logprob, tuple(t for t, _ in best), tuple(p.logprob for _, p in best)))
    return tuple(rows)


@dataclass(frozen=True, slots=True)
class _Row:
    params: VllmSamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    """vLLM's own list, which grows with each step."""


class PositionSeeded(LogitsProcessor):
    """Draws the token of each sampled row itself and leaves only that one possible.

    vLLM's own seeded draws depend on how many came before: a sequence that goes on elsewhere would go on differently.
    It comes after penalties, temperature and min_p; top_k and top_p, which vLLM applies later, are applied here.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """As vLLM understands it: greedy rows need not come here."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            self._rows.pop(index, None)
            if params.temperature > 0:
                self._rows[index] = _Row(params, prompt or [], output)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and direction is MoveDirectionality.SWAP:
                self._rows[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        for index, row in self._rows.items():
            position = len(row.prompt) + len(row.output)
            token = draw(logits[index], row.params, position)
            logits[index] = -torch.inf
            logits[index, token] = 0.0
        return logits


def draw(logits: Tensor, params: VllmSamplingParams, position: int) -> int:
    """One token by top_k and top_p of logits [vocab] that have their temperature already."""
    values, tokens = logits.sort(descending=True, stable=True)
    if params.top_k > 0:
        values, tokens = values[: params.top_k], tokens[: params.top_k]
    probabilities = values.softmax(-1)
    if params.top_p < 1.0:
        probabilities[probabilities.cumsum(-1) - probabilities >= params.top_p] = 0.0
    seed = params.extra_args[SEED]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + position) & 0x7FFF_FFFF_FFFF_FFFF)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
