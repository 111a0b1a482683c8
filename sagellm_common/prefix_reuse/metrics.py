"""What the prefix index has done and what it costs, read by whoever exports it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrefixReuseMetrics:
    """The first three are what there is, the others have counted up since the beginning."""

    blocks: int
    memory_bytes: int
    holder_sets: int
    """Different sets of holders among the blocks."""
    lookups: int
    queried_blocks: int
    matched_blocks: int
    """Of the worker that held the longest prefix."""
    forgotten_blocks: int
    """Dropped by the bound, not by who held them."""

    @property
    def hit_ratio(self) -> float:
        """Matched / queried blocks; 0 before the first lookup."""
        return self.matched_blocks / self.queried_blocks if self.queried_blocks else 0.0

    @property
    def bytes_per_block(self) -> float:
        """0 while there is none."""
        return self.memory_bytes / self.blocks if self.blocks else 0.0
