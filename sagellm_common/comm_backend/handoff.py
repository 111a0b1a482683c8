"""Who may read or write KV blocks during a handoff, and until when.

Both sides of a handoff hold blocks for a party that may die: the source pins what the receiver will pull, the receiver
reserves what it will write. Both are leases: keyed by transfer, fenced by epoch, freed at the latest when their time
is up, and never while somebody reads or writes under them.

    source:  [computing ──►] pin ──► reading (any number) ──► release | expire | replaced by a higher epoch | close
                                                          ──► free, once, after the last reader
    target:  reserve ──► [writing ──►] claim (the caller owns the blocks again) | release | expire | replaced | close
                                                          ──► free, once, after the writer

Pure state behind a lock; time is injected. `free` is called outside the lock, so it may take locks of its own.
`tests/property/test_handoff_states.py` walks through all interleavings of what three parties can do with it.
"""

from __future__ import annotations

import enum
import itertools
import math
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sagellm_common.comm_backend import meter
from sagellm_common.core.clock import Clock
from sagellm_common.core.errors import Draining, EpochFenced, LeaseExpired
from sagellm_common.core.kv import Allocation
from sagellm_common.core.kv_progress import KvProgress
from sagellm_common.core.types import BlockIds

Free = Callable[[Allocation], None]

Party = Literal["", "client", "router", "prefill", "decode"]


class Side(enum.StrEnum):
    SOURCE = "source"
    TARGET = "target"


class LeaseObserver(Protocol):
    """Hears of leases, with their table's lock held: it must not call back, nor wait. `handoff_record.HandoffLog`."""

    def entered(self, side: Side, key: str, epoch: int, allocation: Allocation, what: str) -> None: ...

    def read(self, key: str, epoch: int, num_blocks: int, num_bytes: int, seconds: float, digest_s: float) -> None:
        """A source has sent without an error; digests took digest_s of the seconds."""

    def ended(self, side: Side, key: str, epoch: int, outcome: str, by: Party) -> None: ...


_NONCE_BITS = 40


def attempt_of(epoch: int) -> int:
    """The attempt an epoch of `HandoffSource.new_epoch` was made for."""
    return epoch >> _NONCE_BITS


def last_epoch(attempt: int) -> int:
    """The highest epoch of this attempt: a release of it ends whatever the attempt has pinned."""
    return (attempt << _NONCE_BITS) | ((1 << _NONCE_BITS) - 1)


@dataclass(slots=True, eq=False)
class _Lease:
    epoch: int
    allocation: Allocation
    num_tokens: int
    expires_at_s: float
    subject: bytes = b""
    users: int = 0
    """Readers of a source, the writer of a target."""
    ended: bool = False
    progress: KvProgress | None = None
    """Of a source that is, or was, pulled while it was computed."""
    _members: NDArray[np.bool_] | None = None

    def holds(self, block_ids: BlockIds) -> bool:
        """Whether all these blocks are the allocation's."""
        if self._members is None:
            members = np.zeros(int(self.allocation.block_ids.max(initial=-1)) + 1, dtype=np.bool_)
            members[self.allocation.block_ids] = True
            self._members = members
        if len(block_ids) == 1:
            block_id = int(block_ids[0])
            return 0 <= block_id < len(self._members) and bool(self._members[block_id])
        try:
            # A negative number is a very large one then.
            return bool(self._members[block_ids.astype(np.uint32)].all())
        except IndexError:
            return False


class _LeaseTable:
    """The newest lease per key. Whatever enters leaves exactly once: to `free`, or to whoever claims it."""

    side: ClassVar[Side]

    def __init__(self, ttl_s: float, clock: Clock, free: Free, *, observer: LeaseObserver | None = None) -> None:
        self.ttl_s = ttl_s
        self.outcomes: Counter[str] = Counter()
        """How many leases ended how; for telemetry."""
        self._clock = clock
        self._free = free
        self._observer = observer
        self._lock = threading.Lock()
        self._leases: dict[str, _Lease] = {}
        self._still_used = 0
        """Leases that ended while they were used: their blocks are held until the users are done."""
        self._closed = False

    def __len__(self) -> int:
        """Leases whose blocks are held."""
        with self._lock:
            return len(self._leases) + self._still_used

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

    def _enter(
        self, key: str, epoch: int, allocation: Allocation, num_tokens: int, what: str, subject: bytes = b""
    ) -> Allocation:
        """Takes the allocation over; returns the one that is now held. After an error the caller still owns it."""
        with self._lock:
            if self._closed:
                raise Draining(f"transfer {key!r} is refused: this worker is shutting down")
            held = self._leases.get(key)
            if held is not None and held.epoch > epoch:
                raise EpochFenced(f"transfer {key!r} epoch {epoch} is fenced off by epoch {held.epoch}")
            alive = held is not None and held.expires_at_s > self._clock.now()
            if held is not None and alive and (held.epoch, held.subject) == (epoch, subject):
                # A repeated call: the first one's blocks stay, this one's go back.
                freed = None if held.allocation is allocation else allocation
                kept = held.allocation
            else:
                freed = None if held is None else self._end(key, "replaced")
                self._leases[key] = _Lease(epoch, allocation, num_tokens, self._clock.now() + self.ttl_s, subject)
                kept = allocation
            if self._observer is not None:
                self._observer.entered(self.side, key, epoch, kept, what)
        self._free_all([freed])
        return kept

    def renew(self, key: str, epoch: int) -> float:
        """Starts the lease's time anew; returns the seconds it now has. Raises LeaseExpired."""
        with self._lock:
            lease = self._live(key, epoch)
            # What is being computed or written has no time that could be shortened.
            lease.expires_at_s = max(lease.expires_at_s, self._clock.now() + self.ttl_s)
        return self.ttl_s

    def _live(self, key: str, epoch: int) -> _Lease:
        """The lease of exactly this epoch, with time left. The lock is held."""
        lease = self._leases.get(key)
        if lease is None:
            raise LeaseExpired(f"transfer {key!r} is not leased here: released, expired or never made")
        if lease.epoch != epoch:
            raise EpochFenced(f"transfer {key!r} is leased for epoch {lease.epoch}, not {epoch}")
        if lease.expires_at_s <= self._clock.now():
            raise LeaseExpired(f"the lease of transfer {key!r} ran out after {self.ttl_s:g} s")
        return lease

    def _release(self, key: str, epoch: int, outcome: str, by: Party) -> None:
        with self._lock:
            lease = self._leases.get(key)
            # A release of an older epoch comes from a party that was fenced off: it is too late to matter.
            freed = self._end(key, outcome, by) if lease is not None and lease.epoch <= epoch else None
        self._free_all([freed])

    def _end(self, key: str, outcome: str, by: Party = "") -> Allocation | None:
        """Ends a lease; returns what can be freed at once, None while it is being used. The lock is held."""
        lease = self._leases.pop(key)
        lease.ended = True
        self.outcomes[outcome] += 1
        self._still_used += bool(lease.users)
        if self._observer is not None:
            self._observer.ended(self.side, key, lease.epoch, outcome, by)
        if lease.progress is not None:  # whoever waits for more of it need not wait any longer
            lease.progress.fail(
                LeaseExpired(f"transfer {key!r} epoch {lease.epoch} was {outcome} before it was computed")
            )
        return None if lease.users else lease.allocation

    def _done_with(self, lease: _Lease) -> None:
        """One user less; the last one frees what has ended meanwhile."""
        with self._lock:
            lease.users -= 1
            freed = lease.allocation if lease.ended and not lease.users else None
            self._still_used -= freed is not None
        self._free_all([freed])

    def _free_all(self, allocations: Iterable[Allocation | None]) -> None:
        for allocation in allocations:
            if allocation is not None:
                self._free(allocation)


class HandoffSource(_LeaseTable):
    """Blocks pinned for receivers to pull. Thread-safe; a `comm_backend.protocol.LeasedBlocks`.

    `first_nonce` is for tests: see `new_epoch`.
    """

    side = Side.SOURCE

    def __init__(
        self,
        ttl_s: float,
        clock: Clock,
        free: Free,
        *,
        observer: LeaseObserver | None = None,
        first_nonce: int | None = None,
    ) -> None:
        super().__init__(ttl_s, clock, free, observer=observer)
        self._nonces = itertools.count(secrets.randbits(_NONCE_BITS - 1) if first_nonce is None else first_nonce)

    def new_epoch(self, attempt: int) -> int:
        """An epoch that no pin has had before: above all of earlier attempts, and of this one.

        Request ids are the clients' and may come back, attempts start from 1 again and a restarted worker knows
        nothing of either: what a late receiver holds in its hand must not fit a new pin of other KV.
        """
        return (attempt << _NONCE_BITS) | (next(self._nonces) & ((1 << _NONCE_BITS) - 1))

    def computing(
        self, transfer_id: str, epoch: int, allocation: Allocation, progress: KvProgress
    ) -> AbstractContextManager[Allocation]:
        """Pins blocks while their KV is computed: they may be read up to the watermark of `progress`.

        Owns the allocation, references of its own on the blocks. `pin` within the `with` turns it into a lease like
        any other, with a time; left without, it ends, and `progress` fails: whoever pulls is told. Raises as `pin`.
        """
        return _Computing(self, transfer_id, epoch, allocation, progress)

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
        new one. Raises EpochFenced for a lower epoch and Draining after `close`; the caller then still owns the
        allocation.
        """
        with self._lock:
            lease = self._leases.get(transfer_id)
            if lease is not None and lease.epoch == epoch and _is_timeless(lease):
                # Where the engine has used other blocks after all, this lease is over and a new one takes its place.
                same = np.array_equal(lease.allocation.block_ids[: len(allocation.block_ids)], allocation.block_ids)
                lease.num_tokens, lease.expires_at_s = num_tokens, self._clock.now() + (self.ttl_s if same else 0.0)
        return self._enter(transfer_id, epoch, allocation, num_tokens, "computed and pinned")

    def get(self, transfer_id: str, epoch: int) -> tuple[Allocation, int]:
        """What is pinned: the allocation and its number of tokens. Raises LeaseExpired."""
        with self._lock:
            lease = self._live(transfer_id, epoch)
            return lease.allocation, lease.num_tokens

    def reading(
        self, transfer_id: str, epoch: int, block_ids: BlockIds, num_bytes: int | None = None
    ) -> AbstractContextManager[None]:
        """See `LeasedBlocks.reading`."""
        return _Reading(self, transfer_id, epoch, block_ids, num_bytes or 0)

    def release(self, transfer_id: str, epoch: int, committed: bool, by: Party = "decode") -> None:
        """Unpins. A no-op for an unknown transfer and for an older epoch than the pinned one."""
        self._release(transfer_id, epoch, "committed" if committed else "cancelled", by)


def _is_timeless(lease: _Lease) -> bool:
    """It has no time yet: whoever computes or writes lives in this process, and ends it."""
    return lease.expires_at_s == math.inf


# Classes, not generators: the state of a handoff can be copied, readers and all.


class _Reading(AbstractContextManager[None]):
    """See `LeasedBlocks.reading`."""

    def __init__(self, table: HandoffSource, transfer_id: str, epoch: int, block_ids: BlockIds, num_bytes: int) -> None:
        self._table, self._of, self._block_ids, self._num_bytes = table, (transfer_id, epoch), block_ids, num_bytes

    def __enter__(self) -> None:
        with self._table._lock:
            lease = self._table._live(*self._of)
            if not lease.holds(self._block_ids):
                transfer_id, epoch = self._of
                raise LeaseExpired(f"transfer {transfer_id!r} epoch {epoch} does not hold all of the blocks asked for")
            lease.users += 1
            self._began_s = self._table._clock.now()
        meter.begin_sending()
        self._lease = lease

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        observer = self._table._observer
        if observer is not None and kind is None:
            seconds = self._table._clock.now() - self._began_s
            observer.read(*self._of, len(self._block_ids), self._num_bytes, seconds, meter.digested_s())
        self._table._done_with(self._lease)


class _Computing(AbstractContextManager[Allocation]):
    """See `HandoffSource.computing`."""

    def __init__(
        self, table: HandoffSource, transfer_id: str, epoch: int, allocation: Allocation, progress: KvProgress
    ) -> None:
        self._table, self._of, self._allocation, self._progress = table, (transfer_id, epoch), allocation, progress

    def __enter__(self) -> Allocation:
        table, (transfer_id, epoch) = self._table, self._of
        table.release(transfer_id, epoch, committed=False, by="prefill")
        held = table._enter(transfer_id, epoch, self._allocation, 0, "announced")
        with table._lock:
            lease = self._lease = table._leases.get(transfer_id)
            if lease is not None and lease.allocation is held:
                lease.progress, lease.expires_at_s = self._progress, math.inf
        return held

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        table, (transfer_id, epoch), lease = self._table, self._of, self._lease
        self._progress.fail(
            LeaseExpired(f"transfer {transfer_id!r} epoch {epoch}: its prefill ended without KV to pull")
        )
        with table._lock:
            unfinished = lease is not None and table._leases.get(transfer_id) is lease and _is_timeless(lease)
            freed = table._end(transfer_id, "cancelled", "prefill") if unfinished else None
        table._free_all([freed])


class HandoffTarget(_LeaseTable):
    """Blocks reserved to be written, until the request that will use them arrives. Thread-safe."""

    side = Side.TARGET

    def reserve(self, request_id: str, attempt: int, allocation: Allocation, subject: bytes = b"") -> Allocation:
        """Owns the allocation for ttl_s from now on; returns the reserved one.

        A higher attempt replaces, and so does another `subject`: what the blocks are for, for request ids may come
        again. The same again keeps the first allocation while its lease lives and frees the new one. Raises EpochFenced
        for a lower attempt and Draining after `close`; the caller then still owns the allocation.
        """
        return self._enter(request_id, attempt, allocation, 0, "reserved", subject)

    def writing(self, request_id: str, attempt: int) -> AbstractContextManager[Allocation]:
        """Reserved blocks to fill before they are claimed, by one writer. They do not expire meanwhile, and their time
        starts anew afterwards; a release frees them only when the writer is done. Raises LeaseExpired."""
        return _Writing(self, request_id, attempt)

    def holds(self, request_id: str, attempt: int) -> bool:
        """Whether `claim` could succeed, now or when the writer is done."""
        with self._lock:
            lease = self._leases.get(request_id)
            return lease is not None and lease.epoch == attempt and lease.expires_at_s > self._clock.now()

    def claim(self, request_id: str, attempt: int, subject: bytes = b"") -> Allocation:
        """Hands the reservation over: the caller owns the blocks.

        Raises LeaseExpired, also while they are written, and where they were reserved for another subject: its prefix
        may be in them.
        """
        with self._lock:
            lease = self._live(request_id, attempt)
            if lease.users:
                raise LeaseExpired(f"the blocks reserved for {request_id!r} attempt {attempt} are being written")
            if lease.subject != subject:
                raise LeaseExpired(f"request {request_id!r} attempt {attempt} came again with another prompt meanwhile")
            del self._leases[request_id]
            self.outcomes["claimed"] += 1
            if self._observer is not None:
                self._observer.ended(self.side, request_id, attempt, "claimed", "")
            return lease.allocation

    def release(self, request_id: str, attempt: int, by: Party = "router") -> None:
        """Frees. A no-op for an unknown request and for an older attempt than the reserved one."""
        self._release(request_id, attempt, "cancelled", by)


class _Writing(AbstractContextManager[Allocation]):
    """See `HandoffTarget.writing`."""

    def __init__(self, table: HandoffTarget, request_id: str, attempt: int) -> None:
        self._table, self._of = table, (request_id, attempt)

    def __enter__(self) -> Allocation:
        with self._table._lock:
            lease = self._table._live(*self._of)
            if lease.users:
                request_id, attempt = self._of
                raise LeaseExpired(
                    f"the blocks reserved for {request_id!r} attempt {attempt} are being written already"
                )
            lease.users, lease.expires_at_s = 1, math.inf
        self._lease = lease
        return lease.allocation

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._lease.expires_at_s = self._table._clock.now() + self._table.ttl_s
        self._table._done_with(self._lease)
