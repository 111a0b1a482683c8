"""What of a growing KV can be sent next: blocks × layers, each of them once, none before it is ready."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sagellm_common.core.kv import KvMemory, KvRegion
from sagellm_common.core.kv_progress import Watermark


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers [first_layer, end_layer) of blocks [first_block, end_block), counted in token order."""

    first_block: int
    end_block: int
    first_layer: int
    end_layer: int

    @property
    def num_blocks(self) -> int:
        return self.end_block - self.first_block

    @property
    def num_layers(self) -> int:
        return self.end_layer - self.first_layer


class SegmentCutter:
    """Cuts the blocks from first_block on as the watermark rises.

    A block that two chunks share belongs to the second: it is sent when nothing in it changes any more. Layers of a
    chunk are gathered until they come to min_block_layers (blocks × layers), or the chunk is done.
    """

    def __init__(
        self, first_block: int, num_tokens: int, block_size_tokens: int, num_layers: int, min_block_layers: int = 1
    ) -> None:
        self._num_tokens = num_tokens
        self._block_size = block_size_tokens
        self._num_blocks = -(-num_tokens // block_size_tokens)
        self._num_layers = num_layers
        self._min_block_layers = min_block_layers
        self._done = first_block
        """Blocks before it are sent."""
        self._chunk_end = first_block
        self._chunk_layers = 0
        """Of blocks [_done, _chunk_end), this many layers are sent."""

    @property
    def finished(self) -> bool:
        return self._done >= self._num_blocks

    def cut(self, mark: Watermark) -> list[Segment]:
        """What has become ready since the last call. `mark` never falls."""
        found = []
        ready = self._blocks(mark.tokens)
        if self._chunk_end > self._done and ready >= self._chunk_end:
            found.append(Segment(self._done, self._chunk_end, self._chunk_layers, self._num_layers))
            self._done, self._chunk_layers = self._chunk_end, 0
        if ready > self._done and self._chunk_end <= self._done:
            found.append(Segment(self._done, ready, 0, self._num_layers))
            self._done = self._chunk_end = ready
        num_blocks, num_layers = self._blocks(mark.chunk_end) - self._done, mark.layers - self._chunk_layers
        if num_blocks > 0 and num_layers > 0 and num_blocks * num_layers >= self._min_block_layers:
            self._chunk_end = self._done + num_blocks
            found.append(Segment(self._done, self._chunk_end, self._chunk_layers, mark.layers))
            self._chunk_layers = mark.layers
        return [segment for segment in found if segment.num_layers]

    def _blocks(self, tokens: int) -> int:
        """Blocks in which nothing after the first `tokens` tokens will be written."""
        return self._num_blocks if tokens >= self._num_tokens else tokens // self._block_size


def split(segment: Segment, layer_bytes: int, max_bytes: int) -> Iterator[Segment]:
    """The segment in runs of whole blocks of at most max_bytes each, but at least one block."""
    step = max(1, max_bytes // (segment.num_layers * layer_bytes))
    for at in range(segment.first_block, segment.end_block, step):
        yield Segment(at, min(at + step, segment.end_block), segment.first_layer, segment.end_layer)


def layers_apart(memory: KvMemory) -> int:
    """Layers of a block that can be read and written apart; 1: only whole blocks can."""
    return memory.num_layers if isinstance(memory, KvRegion) else 1
