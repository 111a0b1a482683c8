"""Token rows copied between vLLM's pages and the pool's blocks.

page    [kv_heads, page_tokens, 2 * head_dim] of one layer; how it is arranged inside is the kernel's affair
block   [keys | values, layers, block_tokens, kv_heads, head_dim], what all engines here exchange
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.platforms import current_platform

from sagellm_common.core.errors import ConfigError
from sagellm_common.core.types import BlockIds

DIGIT = 128
"""Whole numbers below it are exact in float32, float16 and bfloat16."""


def page_order(dtype: torch.dtype, page_tokens: int, head_dim: int) -> Tensor:
    """Where one head's elements are kept in a page: element order[i] of the plain [page_tokens, 2 * head_dim] is at i.

    It depends on the CPU and vLLM does not tell, but it packs a plain page when asked. So a page of numbers is packed
    and read, one digit of the numbers at a time. Raises ConfigError where packing does more than move elements.
    """
    size = page_tokens * 2 * head_dim
    numbers, order, weight = torch.arange(size), torch.zeros(size, dtype=torch.int64), 1
    while weight < size:
        page = (numbers // weight % DIGIT).to(dtype).view(1, 1, page_tokens, 2 * head_dim)
        current_platform.pack_kv_cache(page, torch.tensor([0]))
        order += page.flatten().to(torch.int64) * weight
        weight *= DIGIT
    if not torch.equal(order.sort().values, numbers):
        raise ConfigError(f"vLLM's KV pages of {dtype} are not a rearrangement of plain ones; use engine.kind=lmdeploy")
    return order


class Pages:
    """vLLM's pages beside our blocks.

    `caches` has one tensor [num_pages, kv_heads, page_tokens, 2 * head_dim] per layer, in the order of the layers;
    `blocks` is [num_blocks, 2, layers, block_tokens, kv_heads, head_dim] over the pool's memory.
    """

    def __init__(self, caches: Sequence[Tensor], blocks: Tensor) -> None:
        self._caches, self._blocks = caches, blocks
        _, self._heads, self._page_tokens, both = caches[0].shape
        self._head_dim = both // 2
        self._block_tokens = blocks.shape[3]
        self._order = page_order(caches[0].dtype, self._page_tokens, self._head_dim)
        self._rank = self._order.argsort()

    def save(self, page_ids: Sequence[int], block_ids: BlockIds, begin: int, end: int) -> None:
        """KV of tokens [begin, end) of a sequence, from its pages to its blocks."""
        first = begin // self._page_tokens
        pages = torch.tensor(page_ids[first : -(-end // self._page_tokens)])
        rows = slice(begin - first * self._page_tokens, end - first * self._page_tokens)
        where, slots = self._slots(block_ids, begin, end)
        for layer, cache in enumerate(self._caches):
            plain = cache[pages].flatten(2)[..., self._rank]
            plain = plain.view(-1, self._heads, self._page_tokens, 2, self._head_dim)
            self._blocks[where, :, layer, slots] = plain.permute(0, 2, 3, 1, 4).flatten(0, 1)[rows]

    def load(self, page_ids: Sequence[int], block_ids: BlockIds, end: int) -> None:
        """KV of the first `end` tokens of a sequence, from its blocks to its pages, the last one filled up with 0."""
        count = -(-end // self._page_tokens)
        pages = torch.tensor(page_ids[:count])
        where, slots = self._slots(block_ids, 0, end)
        for layer, cache in enumerate(self._caches):
            plain = cache.new_zeros(count * self._page_tokens, 2, self._heads, self._head_dim)
            plain[:end] = self._blocks[where, :, layer, slots]
            plain = plain.view(count, self._page_tokens, 2, self._heads, self._head_dim).permute(0, 3, 1, 2, 4)
            cache[pages] = plain.flatten(2)[..., self._order].view(count, *cache.shape[1:])

    def _slots(self, block_ids: BlockIds, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """(block, slot in it) of tokens [begin, end)."""
        tokens = torch.arange(begin, end)
        return torch.from_numpy(block_ids).long()[tokens // self._block_tokens], tokens % self._block_tokens
