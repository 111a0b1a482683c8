"""How a pool's blocks are shared out among tenants.

    guaranteed   a tenant gets this many whenever it asks, as soon as nobody is computing in them
    borrowed     what it has beyond: blocks that were idle. Their owner's need takes them back: cached ones at once, and
                 while it waits for the others nobody borrows more
    limit        it never has more

Idle cached blocks can be borrowed, too, but those of a tenant within its guarantee go last, and only for work.

A block is charged to the tenant that brought it, for as long as it is held or cached. `QuotaManager` keeps no books: it
reads the pool's (`BlockManager.charged`) and says who may take how much, and from whom.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sagellm_common.core.clock import Clock
from sagellm_common.core.config import TenantConfig
from sagellm_common.core.errors import TenantQuota
from sagellm_common.core.types import TenantUsage

OTHERS = "default"
"""The tenant of all that have no share of their own: they have one together."""
RETRY_AFTER_S = 0.5
CLAIM_TTL_S = 2.0
"""An owner that does not ask again within this wants its blocks no longer."""


@dataclass(slots=True)
class _Account:
    name: str
    guaranteed: int
    limit: int
    claim_ends_s: float = 0.0
    rejections: int = 0


class QuotaManager:
    """Shares of `num_blocks` blocks. Guarded by its pool's lock. Without tenants everything is allowed.

    `charged(account)` tells how many blocks an account has. The guarantees of `tenants` add up to 1 at most.
    """

    def __init__(
        self, num_blocks: int, tenants: Mapping[str, TenantConfig], clock: Clock, charged: Callable[[int], int]
    ) -> None:
        self._clock = clock
        self._charged = charged
        shares = {OTHERS: tenants.get(OTHERS, TenantConfig())} | dict(tenants)
        self._accounts = [
            _Account(name, _blocks(share.guaranteed, num_blocks), _blocks(share.limit, num_blocks))
            for name, share in shares.items()
        ]
        self._numbers = {account.name: number for number, account in enumerate(self._accounts)}
        self.enabled = bool(tenants)

    @property
    def num_accounts(self) -> int:
        return len(self._accounts)

    def account_of(self, tenant: str) -> int:
        """The number its blocks are charged to."""
        return self._numbers.get(tenant, 0)

    def tenant_of(self, account: int) -> str:
        return self._accounts[account].name

    def beyond_limit(self, account: int, count: int) -> int:
        """How many of `account`'s own blocks must go before it may take `count` more; 0 or less: none."""
        return self._charged(account) + count - self._accounts[account].limit if self.enabled else 0

    def refuse(self, account: int, count: int, why: str) -> TenantQuota:
        """The error for a tenant that wants `count` more blocks than it can have now."""
        asking = self._accounts[account]
        asking.rejections += 1
        return TenantQuota(
            f"tenant {asking.name!r} wants {count} more KV blocks and has {self._charged(account)}, {why}; "
            f"try again, or raise kv.tenants.{asking.name}",
            metadata={"tenant": asking.name},
            retry_after_s=RETRY_AFTER_S,
        )

    def check_borrowing(self, account: int, count: int) -> None:
        """Raises TenantQuota when this would borrow what its owner is waiting for."""
        if self.enabled and self.borrowed(account, count) > 0:
            now = self._clock.now()
            waiting = [a.name for n, a in enumerate(self._accounts) if n != account and a.claim_ends_s > now]
            if waiting:
                owners = ", ".join(repr(name) for name in waiting)
                raise self.refuse(account, count, f"beyond its guarantee while {owners} waits for its own")

    def reclaim_from(self, account: int, count: int) -> list[tuple[int, int]]:
        """Whose cached blocks make room for `count` more of `account`, and how many of each at most, in order: those
        who have borrowed most, then its own, and others' within their guarantees only for want of any other."""
        everybody = range(len(self._accounts))
        taken = [(self.borrowed(n, count if n == account else 0), n) for n in everybody]
        borrowers = [(n, most) for most, n in sorted(taken, reverse=True) if most > 0]
        return [*borrowers, *((n, self._charged(n)) for n in (account, *everybody))]

    def refusal(self, account: int, count: int) -> TenantQuota | None:
        """What to tell a tenant for which there is no room; None: it is not its own doing. Then, if it is within its
        guarantee, nobody borrows any more until it has got its blocks."""
        if not self.enabled:
            return None
        if self.beyond_limit(account, count) > 0:
            return self.refuse(account, count, "which is more than its limit allows")
        if self.borrowed(account, count) > 0:
            return self.refuse(account, count, "and no block is idle that it could borrow")
        self._accounts[account].claim_ends_s = self._clock.now() + CLAIM_TTL_S
        return None

    def served(self, account: int) -> None:
        """The tenant has got what it asked for."""
        self._accounts[account].claim_ends_s = 0.0

    def borrowed(self, account: int, more: int = 0) -> int:
        """Blocks beyond its guarantee if it had `more`; negative: so many could still be claimed."""
        return self._charged(account) + more - self._accounts[account].guaranteed

    def usage(self) -> list[TenantUsage]:
        """Empty without tenants."""
        return [
            TenantUsage(
                tenant=account.name,
                charged_blocks=self._charged(number),
                borrowed_blocks=max(0, self.borrowed(number)),
                guaranteed_blocks=account.guaranteed,
                limit_blocks=account.limit,
                rejections=account.rejections,
            )
            for number, account in enumerate(self._accounts)
            if self.enabled
        ]


def _blocks(share: float, num_blocks: int) -> int:
    """Rounded down, but for what floats lose of a whole number."""
    return int(share * num_blocks + 1e-6)
