"""Who may read or write KV blocks during a handoff, and until when.

Both sides of a handoff hold blocks for a party that may die: the source pins what the receiver will pull, the receiver
reserves what it will write. Both are leases: keyed by transfer, fenced by epoch, freed at the latest when their time
is up.

    source:  [computing ──►] pin ──► reading (any number) ──► release | expire | replaced by a higher epoch | close
                                                          ──► free, once
    target:  reserve ──► claim (the caller owns the blocks again) | release | expire | replaced | close ──► free, once

Pure state behind a lock; time is injected. `free` is called outside the lock, so it may take locks of its own.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from sagellm_common.core.clock import Clock
from sagellm_common.core.errors import Draining, LeaseExpired
from sagellm_common.core.kv import Allocation
from sagellm_common.core.kv_progress import KvProgress
from sagellm_common.core.types import BlockIds

Free = Callable[[Allocation], None]


@dataclass(slots=True, eq=False)
class _Lease:
    epoch: int
    allocation: Allocation
    num_tokens: int
    expires_at_s: float
    readers: int = 0
    ended: bool = False
    progress: KvProgress | None = None
    """Of a source that is, or was, pulled while it was computed."""


class _LeaseTable:
    """The newest lease per key. Whatever enters leaves exactly once: to `free`, or to whoever claims it."""

    def __init__(self, ttl_s: float, clock: Clock, free: Free) -> None:
        self.ttl_s = ttl_s
        self.outcomes: Counter[str] = Counter()
        """How many leases ended how; for telemetry."""
        self._clock = clock
        self._free = free
        self._lock = threading.Lock()
        self._leases: dict[str, _Lease] = {}
        self._still_read = 0
        """Leases that ended while they were read: their blocks are held until the readers are done."""
        self._closed = False

    def __len__(self) -> int:
        """Leases whose blocks are held."""
        with self._lock:
            return len(self._leases) + self._still_read

    def expire(self) -> int:
        """Ends the leases whose time is up; returns how many."""
        with self._lock:
            now = self._clock.now()
            late = [key for key, lease in self._leases.items() if lease.expires_at_s <= now]
            freed = [self._end(key, "expired") for key in late]
        self._free_all(freed)
        return len(late)

    def close(self) -> None:
        """Ends all leases; later ones are refused with Draining. Idempotent."""
        with self._lock:
            self._closed = True
            freed = [self._end(key, "closed") for key in list(self._leases)]
        self._free_all(freed)

    def _enter(self, key: str, epoch: int, allocation: Allocation, num_tokens: int) -> Allocation:
        """Takes the allocation over; returns the one that is now held. After an error the caller still owns it."""
        with self._lock:
            if self._closed:
                raise Draining(f"transfer {key!r} is refused: this worker is shutting down")
            held = self._leases.get(key)
            if held is not None and held.epoch > epoch:
                raise LeaseExpired(f"transfer {key!r} epoch {epoch} is fenced off by epoch {held.epoch}")
            if held is not None and held.epoch == epoch and held.expires_at_s > self._clock.now():
                # A repeated call: the first one's blocks stay, this one's go back.
                freed = None if held.allocation is allocation else allocation
                kept = held.allocation
            else:
                freed = None if held is None else self._end(key, "replaced")
                self._leases[key] = _Lease(epoch, allocation, num_tokens, self._clock.now() + self.ttl_s)
                kept = allocation
        self._free_all([freed])
        return kept

    def renew(self, key: str, epoch: int) -> float:
        """Starts the lease's time anew; returns the seconds it now has. Raises LeaseExpired."""
        with self._lock:
            lease = self._live(key, epoch)
            # What is being computed has no time that could be shortened.
            lease.expires_at_s = max(lease.expires_at_s, self._clock.now() + self.ttl_s)
        return self.ttl_s

    def _live(self, key: str, epoch: int) -> _Lease:
        """The lease of exactly this epoch, with time left. The lock is held."""
        lease = self._leases.get(key)
        if lease is None:
            raise LeaseExpired(f"transfer {key!r} is not leased here: released, expired or never made")
        if lease.epoch != epoch:
            raise LeaseExpired(f"transfer {key!r} is leased for epoch {lease.epoch}, not {epoch}")
        if lease.expires_at_s <= self._clock.now():
            raise LeaseExpired(f"the lease of transfer {key!r} ran out after {self.ttl_s:g} s")
        return lease

    def _release(self, key: str, epoch: int, outcome: str) -> None:
        with self._lock:
            lease = self._leases.get(key)
            # A release of an older epoch comes from a party that was fenced off: it is too late to matter.
            freed = self._end(key, outcome) if lease is not None and lease.epoch <= epoch else None
        self._free_all([freed])

    def _end(self, key: str, outcome: str) -> Allocation | None:
        """Ends a lease; returns what can be freed at once, None while it is being read. The lock is held."""
        lease = self._leases.pop(key)
        lease.ended = True
        self.outcomes[outcome] += 1
        self._still_read += bool(lease.readers)
        return None if lease.readers else lease.allocation

    def _free_all(self, allocations: Iterable[Allocation | None]) -> None:
        for allocation in allocations:
            if allocation is not None:
                self._free(allocation)


class HandoffSource(_LeaseTable):
    """Blocks pinned for receivers to pull. Thread-safe; a `comm_backend.protocol.LeasedBlocks`."""

    @contextmanager
    def computing(
        self, transfer_id: str, epoch: int, allocation: Allocation, progress: KvProgress
    ) -> Iterator[Allocation]:
        """Pins blocks while their KV is computed: they may be read up to the watermark of `progress`.

        Owns the allocation, references of its own on the blocks. `pin` within the `with` turns it into a lease like
        any other, with a time; left without, it ends, and `progress` fails: whoever pulls is told. Raises as `pin`.
        """
        self.release(transfer_id, epoch, committed=False)
        held = self._enter(transfer_id, epoch, allocation, 0)
        with self._lock:
            lease = self._leases.get(transfer_id)
            if lease is not None and lease.allocation is held:
                lease.progress, lease.expires_at_s = progress, math.inf
        try:
            yield held
        finally:
            with self._lock:
                unfinished = lease is not None and self._leases.get(transfer_id) is lease and _is_computing(lease)
                freed = self._end(transfer_id, "cancelled") if unfinished else None
            self._free_all([freed])
            progress.fail(LeaseExpired(f"transfer {transfer_id!r} epoch {epoch}: its prefill ended without KV to pull"))

    def progress(self, transfer_id: str, epoch: int) -> tuple[Allocation, KvProgress]:
        """See `LeasedBlocks.progress`."""
        with self._lock:
            lease = self._live(transfer_id, epoch)
            if lease.progress is None:
                raise LeaseExpired(f"transfer {transfer_id!r} epoch {epoch} was not announced before it was computed")
            return lease.allocation, lease.progress

    def pin(self, transfer_id: str, epoch: int, allocation: Allocation, num_tokens: int) -> Allocation:
        """Owns the allocation for ttl_s from now on; returns the pinned one.

        A higher epoch replaces. The same epoch again keeps the first allocation while its lease lives and frees the
        new one. Raises LeaseExpired for a lower epoch and Draining after `close`; the caller then still owns the
        allocation.
        """
        with self._lock:
            lease = self._leases.get(transfer_id)
            if lease is not None and lease.epoch == epoch and _is_computing(lease):
                # Where the engine has used other blocks after all, this lease is over and a new one takes its place.
                same = np.array_equal(lease.allocation.block_ids[: len(allocation.block_ids)], allocation.block_ids)
                lease.num_tokens, lease.expires_at_s = num_tokens, self._clock.now() + (self.ttl_s if same else 0.0)
        return self._enter(transfer_id, epoch, allocation, num_tokens)

    def get(self, transfer_id: str, epoch: int) -> tuple[Allocation, int]:
        """What is pinned: the allocation and its number of tokens. Raises LeaseExpired."""
        with self._lock:
            lease = self._live(transfer_id, epoch)
            return lease.allocation, lease.num_tokens

    @contextmanager
    def reading(
        self, transfer_id: str, epoch: int, block_ids: BlockIds, num_bytes: int | None = None
    ) -> Iterator[None]:
        """See `LeasedBlocks.reading`."""
        with self._lock:
            lease = self._live(transfer_id, epoch)
            if not np.isin(block_ids, lease.allocation.block_ids).all():
                raise LeaseExpired(f"transfer {transfer_id!r} epoch {epoch} does not hold all of the blocks asked for")
            lease.readers += 1
        try:
            yield
        finally:
            with self._lock:
                lease.readers -= 1
                freed = lease.allocation if lease.ended and not lease.readers else None
                self._still_read -= freed is not None
            self._free_all([freed])

    def release(self, transfer_id: str, epoch: int, committed: bool) -> None:
        """Unpins. A no-op for an unknown transfer and for an older epoch than the pinned one."""
        self._release(transfer_id, epoch, "committed" if committed else "cancelled")


def _is_computing(lease: _Lease) -> bool:
    """It has no time yet: whoever computes lives in this process, and ends it."""
    return lease.expires_at_s == math.inf


class HandoffTarget(_LeaseTable):
    """Blocks reserved to be written, until the request that will use them arrives. Thread-safe."""

    def reserve(self, request_id: str, attempt: int, allocation: Allocation) -> Allocation:
        """Owns the allocation for ttl_s from now on; returns the reserved one.

        A higher attempt replaces. The same attempt again keeps the first allocation while its lease lives and frees
        the new one. Raises LeaseExpired for a lower attempt and Draining after `close`; the caller then still owns
        the allocation.
        """
        return self._enter(request_id, attempt, allocation, 0)

    def claim(self, request_id: str, attempt: int) -> Allocation:
        """Hands the reservation over: the caller owns the blocks. Raises LeaseExpired."""
        with self._lock:
            lease = self._live(request_id, attempt)
            del self._leases[request_id]
            self.outcomes["claimed"] += 1
            return lease.allocation

    def release(self, request_id: str, attempt: int) -> None:
        """Frees. A no-op for an unknown request and for an older attempt than the reserved one."""
        self._release(request_id, attempt, "cancelled")
