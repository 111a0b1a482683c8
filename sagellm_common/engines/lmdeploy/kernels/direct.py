"""A decode step straight into the kernels, for sequences that want the likeliest token and nothing else.

LMDeploy's model agent makes inputs, contexts and sampling for any model on any device, in tasks that hand them on: a
quarter of a small model's step. Here the same model class makes the same calls of the kernels on the same blocks.
Scheduler, blocks and sequences stay LMDeploy's, and so does every other step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sagellm_common.engines.lmdeploy.kernels.model import QuantizedCausalLM
from sagellm_common.engines.lmdeploy.kernels.ops import Batch, KvLayer


class DirectDecode:
    """For LMDeploy's sequences, their block tables and the layers of their cache."""

    def __init__(self, model: QuantizedCausalLM, caches: Sequence[KvLayer], block_manager: Any) -> None:
        self._model, self._caches, self._blocks = model, caches, block_manager

    def takes(self, seqs: Sequence[Any]) -> bool:
        """Whether all want no more than that."""
        return all(
            p.top_k == 1
            and p.temperature == p.repetition_penalty == 1.0
            and p.num_logprobs < 0
            and not p.bad_words
            and seq.num_new_tokens >= p.min_new_tokens
            for seq, p in ((seq, seq.sampling_param) for seq in seqs)
        )

    def inputs(self, seqs: Sequence[Any]) -> tuple[Tensor, Batch]:
        """The last token of each, which has no KV yet, and where that goes. The pool's lock is held."""
        tables = [self._blocks.get_block_table(seq) for seq in seqs]
        padded = np.zeros((len(seqs), max(map(len, tables))), np.int64)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        kv_lens = torch.tensor([seq.num_all_ids for seq in seqs])
        ids = torch.from_numpy(np.concatenate([seq.token_ids for seq in seqs]))
        return ids, Batch(torch.arange(len(seqs) + 1), kv_lens, torch.from_numpy(padded))

    @torch.inference_mode()
    def step(self, ids: Tensor, batch: Batch) -> Tensor:
        """The next token of each sequence."""
        logits = self._model.get_logits(self._model.hidden_states(ids, self._caches, batch))[0]
        # The first of equals, as torch's argmax, which takes five times as long.
        return torch.from_numpy(logits.numpy().argmax(-1))
