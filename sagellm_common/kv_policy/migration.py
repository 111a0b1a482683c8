"""Where a block goes when its tier needs the room, and when it is used in a tier that is not the fastest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from sagellm_common.core.errors import ConfigError
from sagellm_common.core.fitting import OnlineFit
from sagellm_common.core.registry import Registry

HALF_LIFE_COPIES = 64
MIN_COPIES = 4
"""Before what they took is believed."""


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
    that brought it; `depth` is its number in its sequence, 0 where that is not known; `num_bytes` is its size as it is
    copied. `recompute_s` is what computing it again takes, None: not known."""

    tier: int
    uses: int
    depth: int = 0
    num_bytes: int = 0
    idle: int = 0
    """Blocks that were accessed since it was used last."""
    recompute_s: float | None = None


class MigrationPolicy(Protocol):
    """Pure and quick: the hierarchy asks with its lock held. Tiers that are away or full are the hierarchy's matter:
    it takes a DEMOTE it cannot carry out for a DROP, and a PROMOTE for a KEEP."""

    def on_evict(self, block: BlockFacts) -> Decision:
        """The block's tier needs room, and its eviction policy named this block: DEMOTE or DROP. KEEP asks for another
        victim; where there is none the block is dropped."""

    def on_use(self, block: BlockFacts) -> Decision:
        """The block was used where it lies: PROMOTE or KEEP."""

    def came(self, uses: int) -> None:
        """A block was used for the so manieth time, wherever; 1: it is new."""

    def copied(self, source: int, target: int, num_bytes: int, seconds: float) -> None:
        """Blocks were copied from one tier to another, together."""


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

    def came(self, uses: int) -> None:
        """It makes no difference."""

    def copied(self, source: int, target: int, num_bytes: int, seconds: float) -> None:
        """It makes no difference."""


class ByCost:
    """Blocks go down where that is expected to spare more time than it takes, and come up where that takes less time
    than computing them again.

        worth of a copy in a tier = chance of another use × (recompute − read from there) − write to there

    The chance is learned by how often blocks were used before, reads and writes are fitted to what copies have taken.
    So a block may go down at its second use only, a deep one sooner than one at the beginning of a prompt, which is
    computed faster. What is not known yet is tried; and so is every RETRY_EVERY-th block that is refused, for a disk
    or a worker may have become another.
    """

    RETRY_EVERY = 64
    MAX_USES = 4
    """Beyond these blocks are alike."""
    PRIOR_BLOCKS = 32.0
    """As good as seen, half of them used again."""
    MEMORY_BLOCKS = 1 << 14
    """Counts are halved after so many."""

    def __init__(self, num_tiers: int) -> None:
        """Raises ConfigError."""
        if num_tiers < 1:
            raise ConfigError(f"num_tiers is {num_tiers}, but must be at least 1")
        self._last = num_tiers - 1
        self._links: dict[tuple[int, int], _Link] = {}
        self._came = [0.0] * (self.MAX_USES + 1)
        self._again = [0.0] * (self.MAX_USES + 1)
        self._refused = 0

    def came(self, uses: int) -> None:
        at = min(uses, self.MAX_USES)
        self._came[at] += 1
        if uses > 1:
            self._again[min(uses - 1, self.MAX_USES)] += 1
        if self._came[at] > self.MEMORY_BLOCKS:
            self._came = [count / 2 for count in self._came]
            self._again = [count / 2 for count in self._again]

    def copied(self, source: int, target: int, num_bytes: int, seconds: float) -> None:
        if num_bytes > 0 and seconds > 0:
            self._links.setdefault((source, target), _Link()).observe(num_bytes, seconds)

    def reuse_probability(self, uses: int) -> float:
        at = min(uses, self.MAX_USES)
        return (self._again[at] + self.PRIOR_BLOCKS / 2) / (self._came[at] + self.PRIOR_BLOCKS)

    def on_evict(self, block: BlockFacts) -> Decision:
        if block.tier >= self._last:
            return Decision(Move.DROP)
        chance, best, most = self.reuse_probability(block.uses), None, 0.0
        for target in range(block.tier + 1, self._last + 1):
            write_s = self._copy_s(block.tier, target, block.num_bytes)
            if write_s is None or block.recompute_s is None:
                return Decision(Move.DEMOTE, target)
            read_s = self._copy_s(target, 0, block.num_bytes)
            worth_s = chance * (block.recompute_s - (write_s if read_s is None else read_s)) - write_s
            if worth_s > most:
                best, most = target, worth_s
        if best is None and not self._tries_again():
            return Decision(Move.DROP)
        return Decision(Move.DEMOTE, block.tier + 1 if best is None else best)

    def on_use(self, block: BlockFacts) -> Decision:
        if block.tier == 0:
            return Decision(Move.KEEP)
        read_s = self._copy_s(block.tier, 0, block.num_bytes)
        if read_s is None or block.recompute_s is None or read_s <= block.recompute_s or self._tries_again():
            return Decision(Move.PROMOTE, 0)
        return Decision(Move.KEEP)

    def _copy_s(self, source: int, target: int, num_bytes: int) -> float | None:
        link = self._links.get((source, target))
        return None if link is None or link.byte_s is None else link.byte_s * num_bytes

    def _tries_again(self) -> bool:
        self._refused += 1
        return self._refused % self.RETRY_EVERY == 0


class _Link:
    """From one tier to another. `byte_s`: of a byte, in a copy of the usual size; None until enough were seen."""

    def __init__(self) -> None:
        self.byte_s: float | None = None
        self._fit = OnlineFit((1.0, 1e8), HALF_LIFE_COPIES)
        self._usual_bytes = 0.0

    def observe(self, num_bytes: int, seconds: float) -> None:
        self._fit.observe((1.0, num_bytes), seconds)
        weight = max(1 / self._fit.samples, 1 / HALF_LIFE_COPIES)
        self._usual_bytes += weight * (num_bytes - self._usual_bytes)
        if self._fit.samples >= MIN_COPIES:
            self.byte_s = self._fit.predict((1.0, self._usual_bytes)).seconds / self._usual_bytes


MIGRATION: Registry[Callable[[int], MigrationPolicy]] = Registry("migration policy")
"""By a number of tiers."""
MIGRATION.register("all")(ByUses)
MIGRATION.register("cost")(ByCost)
