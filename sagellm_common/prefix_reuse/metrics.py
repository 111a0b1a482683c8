"""Counters of the prefix index, read by whoever exports them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class IndexMetrics:
    lookups: int = 0
    queried_blocks: int = 0
    matched_blocks: int = 0
    forgotten_blocks: int = 0  # dropped by the bound, not by their worker

    def record_lookup(self, queried_blocks: int, matched_blocks: int) -> None:
        self.lookups += 1
        self.queried_blocks += queried_blocks
        self.matched_blocks += matched_blocks

    @property
    def hit_ratio(self) -> float:
        """Matched / queried blocks; 0 before the first lookup."""
        return self.matched_blocks / self.queried_blocks if self.queried_blocks else 0.0
