"""Where a block goes when its tier needs the room, and when it is used in a tier that is not the fastest."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from sagellm_common.core.errors import ConfigError


class Move(StrEnum):
    DROP = "drop"
    KEEP = "keep"
    DEMOTE = "demote"
    PROMOTE = "promote"


@dataclass(frozen=True, slots=True)
class Decision:
    """`tier` is where the block goes with DEMOTE and PROMOTE; None otherwise. Tiers count from 0, the fastest."""

    move: Move
    tier: int | None = None


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """What is known of a block. `uses` counts those since it came into the hierarchy, this one included, and the one
    that brought it; `depth` is its number in its path; `num_bytes` is its size where it lies."""

    tier: int
    uses: int
    depth: int = 0
    num_bytes: int = 0
    idle: int = 0
    """Blocks that were accessed since it was used last."""


class MigrationPolicy(Protocol):
    """Pure and quick: the hierarchy asks with its lock held. Tiers that are away or full are the hierarchy's matter:
    it takes a DEMOTE it cannot carry out for a DROP, and a PROMOTE for a KEEP."""

    def on_evict(self, block: BlockFacts) -> Decision:
        """The block's tier needs room, and its eviction policy named this block: DEMOTE or DROP. KEEP asks for another
        victim; where there is none the block is dropped."""

    def on_use(self, block: BlockFacts) -> Decision:
        """The block was used where it lies: PROMOTE or KEEP."""


class ByUses:
    """Blocks go one tier down if they were used `demote_uses` times, and up to the fastest at their n-th use.

    `promote_on_use` 1 brings every block up that is used, 2 those that are used again where they lie.
    """

    def __init__(self, num_tiers: int, demote_uses: int = 1, promote_on_use: int = 2) -> None:
        """Raises ConfigError."""
        for name, value in (("num_tiers", num_tiers), ("demote_uses", demote_uses), ("promote_on_use", promote_on_use)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1")
        self._last = num_tiers - 1
        self._demote_uses = demote_uses
        self._promote_on_use = promote_on_use

    def on_evict(self, block: BlockFacts) -> Decision:
        if block.tier >= self._last or block.uses < self._demote_uses:
            return Decision(Move.DROP)
        return Decision(Move.DEMOTE, block.tier + 1)

    def on_use(self, block: BlockFacts) -> Decision:
        if block.tier == 0 or block.uses < self._promote_on_use:
            return Decision(Move.KEEP)
        return Decision(Move.PROMOTE, 0)
