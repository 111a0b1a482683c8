"""A decode step straight into the kernels, for sequences that want the likeliest token and nothing else.

LMDeploy's model agent makes inputs, contexts and sampling for any model on any device, in tasks that hand them on: a
quarter of a small model's step. Here the same model class makes the same calls of the kernels on the same blocks.
Scheduler, blocks and sequences stay LMDeploy's, and so does every other step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sagellm_common.engines.lmdeploy.kernels.model import QuantizedCausalLM
from sagellm_common.engines.lmdeploy.kernels.ops import Batch, KvLayer


@dataclass(slots=True)
class DecodeInputs:
    """The last token of each sequence, which has no KV yet, and where that goes."""

    ids: Tensor
    batch: Batch
    room_tokens: int
    """So many more tokens has each of them room for in its blocks."""


class DirectDecode:
    """For LMDeploy's sequences, their block tables and the layers of their cache. But for `step` the pool's lock is
    held.
    """

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

    def inputs(self, seqs: Sequence[Any]) -> DecodeInputs:
        """Of sequences that have their blocks."""
        tables = [self._blocks.get_block_table(seq) for seq in seqs]
        padded = np.zeros((len(seqs), max(map(len, tables))), np.int64)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        kv_lens = np.array([seq.num_all_ids for seq in seqs])
        room = min(len(table) * seq.block_size - seq.num_all_ids for table, seq in zip(tables, seqs, strict=True))
        ids = torch.from_numpy(np.concatenate([seq.token_ids for seq in seqs]))
        batch = Batch(torch.arange(len(seqs) + 1), torch.from_numpy(kv_lens), torch.from_numpy(padded))
        return DecodeInputs(ids, batch, room)

    def has_room(self, inputs: DecodeInputs) -> bool:
        """Whether each of them gets a place for one more token without anybody giving up his."""
        return inputs.room_tokens > 0 or self._blocks.get_num_free_gpu_blocks() > inputs.ids.numel()

    def advanced(self, inputs: DecodeInputs, seqs: Sequence[Any], tokens: Tensor) -> DecodeInputs:
        """When the sequences have got these tokens and there was room: blocks for them, and the inputs that follow."""
        if not inputs.room_tokens:
            for seq in seqs:
                self._blocks.allocate(seq)
            return self.inputs(seqs)
        inputs.batch.kv_lens.add_(1)
        inputs.ids = tokens
        inputs.room_tokens -= 1
        return inputs

    @torch.inference_mode()
    def step(self, ids: Tensor, batch: Batch) -> Tensor:
        """The next token of each sequence."""
        logits = self._model.get_logits(self._model.hidden_states(ids, self._caches, batch))[0]
        # The first of equals, as torch's argmax, which takes five times as long.
        return torch.from_numpy(logits.numpy().argmax(-1))
