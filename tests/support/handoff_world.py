"""A router, prefill and decode workers and a network that loses, repeats and delays, around the real lease tables.

One request id, whose attempts go to any worker, and which comes again with another prompt (`life` of the request).
What the services' loops do between two waits is one event here. What is checked: who owns each block, that whatever is
read is what the reader came for, that whatever is written is the writer's, and that all of it ends.

Leaving a message undelivered is losing it, for every state is also left to itself (`quiesce`).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np

from sagellm_common.comm_backend.handoff import HandoffSource, HandoffTarget, last_epoch
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.errors import LeaseExpired
from sagellm_common.core.kv import Allocation
from sagellm_common.core.kv_progress import KvProgress
from tests.support.state_search import Event, Violation

ID = "r"
TTL = 2.0
BLOCKS = 2
"""Of the prompt: the watermark stops once in between."""
FAULTS = frozenset(
    {"repeat", "router crashes", "prefill crashes", "decode crashes", "prefill fails", "compute elsewhere"}
)
HEEDED = {"ticket": "reserving", "started": "prefilling", "prefilled": "prefilling", "done": "decoding"}
"""The router's phase in which it heeds a message."""
Content = tuple[int, int]
"""(life of the request, number of the block in token order)"""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far is explored: `faults` of these `kinds`, and time that passes `ticks` times, half a lease each.

    When a router begins anew, at most `late` messages (0 or 1) of before are still to come; the others are lost.
    Without `ahead` nothing is pulled while it is computed. Decode has the first `cached` blocks of each prompt. With
    `at_once` prefill is asked before decode has answered that it has reserved.
    """

    prefills: int = 1
    decodes: int = 1
    attempts: int = 2
    lives: int = 2
    ticks: int = 1
    faults: int = 0
    kinds: Set[str] = FAULTS
    late: int = 1
    ahead: bool = True
    cached: int = 0
    at_once: bool = False

    def but(self, **changes: Any) -> Self:
        return replace(self, **changes)


class Source(NamedTuple):
    """KvSource: what prefill tells of its blocks. `life` is for the checks only."""

    prefill: int
    epoch: int
    table: tuple[int, ...]
    life: int
    along: bool


class Pool:
    """Blocks with references, and what is in them. The lowest free ones go first, so they are reused soon."""

    def __init__(self, num_blocks: int) -> None:
        self.refs = [0] * num_blocks
        self.content: list[Content | None] = [None] * num_blocks

    def allocate(self) -> Allocation | None:
        found = [block for block, refs in enumerate(self.refs) if not refs][:BLOCKS]
        if len(found) < BLOCKS:
            return None
        for block in found:
            self.refs[block], self.content[block] = 1, None
        return Allocation(np.array(found, dtype=np.int32))

    def share(self, allocation: Allocation) -> Allocation:
        for block in allocation.block_ids.tolist():
            self.refs[block] += 1
        return Allocation(allocation.block_ids)

    def free(self, allocation: Allocation) -> None:
        for block in allocation.block_ids.tolist():
            if not self.refs[block]:
                raise Violation(f"block {block} is freed twice")
            self.refs[block] -= 1


@dataclass(slots=True, eq=False)
class Computation:
    life: int
    attempt: int
    epoch: int
    own: Allocation
    progress: KvProgress
    computing: AbstractContextManager[Allocation]
    chunks: int = 0


class PrefillWorker:
    """`services/prefill/{attempts,loop}.py`: one computation at most; its blocks are the engine's until it lets go."""

    def __init__(self, clock: ManualClock, incarnation: int) -> None:
        self.incarnation = incarnation
        self.pool = Pool(2 * BLOCKS)
        self.leases = HandoffSource(TTL, clock, self.pool.free, first_nonce=100 * incarnation)
        self.now: Computation | None = None
        self.abandoned: list[Allocation] = []

    def end(self, failed: bool = True) -> None:
        now, self.now = self.now, None
        assert now is not None
        now.computing.__exit__(None, None, None)
        if failed:
            self.abandoned.append(now.own)


@dataclass(slots=True, eq=False)
class Pull:
    """One connection: the receiver may be gone while the source still reads, which then notices."""

    source: Source
    attempt: int
    life: int
    target: Allocation | None
    """Where the receiver writes; None: it is gone."""
    writing: AbstractContextManager[Allocation] | None
    """Ahead of the Decode call."""
    done_blocks: int = 0
    reading: AbstractContextManager[None] | None = None
    block_ids: tuple[int, ...] = ()
    failed: bool = False

    @property
    def over(self) -> bool:
        return self.target is None or self.failed or self.done_blocks == BLOCKS


@dataclass(slots=True, eq=False)
class Decoding:
    """A Decode call. Without `own` it waits for the pull ahead."""

    life: int
    attempt: int
    source: Source
    own: Allocation | None = None


class DecodeWorker:
    """`services/decode/{loop,ahead}.py`."""

    def __init__(self, clock: ManualClock) -> None:
        self.pool = Pool(2 * BLOCKS)
        self.reservations = HandoffTarget(TTL, clock, self.pool.free)
        self.ahead: Pull | None = None
        self.pull: Pull | None = None
        self.decoding: Decoding | None = None


@dataclass(slots=True, eq=False)
class Router:
    life: int = 0
    attempt: int = 0
    phase: str = "idle"
    prefill: int = 0
    decode: int = 0


class World:
    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.clock = ManualClock()
        self.router = Router()
        self.prefills = [PrefillWorker(self.clock, 0) for _ in range(bounds.prefills)]
        self.decodes = [DecodeWorker(self.clock) for _ in range(bounds.decodes)]
        self.messages: dict[Event, None] = {}
        self.pulls: list[Pull] = []
        self.faults = self.ticks = self.completed = 0

    # ---- what may happen next ----

    def events(self) -> Iterator[Event]:
        router, bounds = self.router, self.bounds
        may = bounds.kinds if self.faults < bounds.faults else frozenset()
        for message in self.messages:
            if self._waits(message):
                continue
            yield ("deliver", message)
            if "repeat" in may:
                yield ("repeat", message)
        if router.phase == "idle" and router.life < bounds.lives:
            yield from self._anew("begin")
        if router.phase == "failed" and router.attempt < bounds.attempts:
            yield from self._anew("retry")
        if router.phase not in ("idle", "failed"):
            yield ("give up",)
            if router.phase == "prefilling":
                yield ("renew reservation",)
            if "router crashes" in may:
                yield ("router crashes",)
        for p, prefill in enumerate(self.prefills):
            if prefill.now is not None:
                yield ("compute", p)
                if "prefill fails" in may:
                    yield ("prefill fails", p)
                if "compute elsewhere" in may and prefill.now.chunks == BLOCKS - 1:
                    yield ("compute elsewhere", p)
            if prefill.abandoned:
                yield ("let go", p)
            if "prefill crashes" in may and (len(prefill.leases) or prefill.now):
                yield ("prefill crashes", p)
            if _due(prefill.leases, self.clock):
                yield ("expire", "prefill", p)
        for d, decode in enumerate(self.decodes):
            if decode.decoding is not None and decode.pull is None and decode.decoding.own is not None:
                yield ("decode", d)
            if "decode crashes" in may and (len(decode.reservations) or decode.decoding):
                yield ("decode crashes", d)
            if _due(decode.reservations, self.clock):
                yield ("expire", "decode", d)
        for n, pull in enumerate(self.pulls):
            if pull.reading is not None:
                yield ("end read", n)
            elif not pull.over:
                yield ("begin read", n)
        if self.ticks < bounds.ticks:
            yield ("tick",)

    def _anew(self, name: str) -> Iterator[Event]:
        late = [None, *(self.messages if self.bounds.late else ())]
        workers = itertools.product(range(self.bounds.prefills), range(self.bounds.decodes))
        return ((name, p, d, message) for (p, d), message in itertools.product(workers, late))

    def apply(self, event: Event) -> None:
        name, *args = event
        getattr(self, f"_{str(name).replace(' ', '_')}")(*args)
        self.pulls = [pull for pull in self.pulls if pull.reading is not None or not pull.over]
        for message in [message for message in self.messages if self._too_late(message)]:
            del self.messages[message]

    # ---- the network and the clock ----

    def _send(self, to: str, n: int, kind: str, *args: object) -> None:
        self.messages[to, n, kind, *args] = None  # an equal one under way: one of them is enough

    def _deliver(self, message: Event) -> None:
        del self.messages[message]
        to, n, kind, *args = message
        getattr(self, f"_{to}_{kind}")(n, *args)

    def _repeat(self, message: Event) -> None:
        self.faults += 1
        to, n, kind, *args = message
        getattr(self, f"_{to}_{kind}")(n, *args)

    def _tick(self) -> None:
        self.ticks += 1
        self.clock.advance(1.0)

    def _expire(self, role: str, n: int) -> None:
        (self.prefills[n].leases if role == "prefill" else self.decodes[n].reservations).expire()

    def _too_late(self, message: Event) -> bool:
        """The router will never heed it: it has gone on, and does not go back."""
        to, _, kind, life, attempt, *_ = (*message, 0)
        return to == "router" and not self._heeds(str(kind), life, attempt) and not self._waits(message)

    def _waits(self, message: Event) -> bool:
        """The router will read what prefill says once it knows that there is a reservation."""
        to, _, kind, life, attempt, *_ = (*message, 0)
        router = self.router
        reserving = self.bounds.at_once and (router.life, router.attempt, router.phase) == (life, attempt, "reserving")
        return to == "router" and reserving and kind in ("started", "prefilled")

    def _heeds(self, kind: str, life: object, attempt: object) -> bool:
        router = self.router
        return (router.life, router.attempt, router.phase) == (life, attempt, HEEDED[kind])

    # ---- the router ----

    def _begin(self, p: int, d: int, late: Event | None) -> None:
        self.messages = {} if late is None else {late: None}
        self._ask(Router(self.router.life + 1, 1, "reserving", p, d))

    def _retry(self, p: int, d: int, late: Event | None) -> None:
        self.messages = {} if late is None else {late: None}
        self._ask(Router(self.router.life, self.router.attempt + 1, "reserving", p, d))

    def _ask(self, router: Router) -> None:
        self.router = router
        self._send("decode", router.decode, "reserve", router.life, router.attempt)
        if self.bounds.at_once:
            self._send("prefill", router.prefill, "prefill", router.life, router.attempt)

    def _give_up(self) -> None:
        """Its deadline, its client, or a worker that it lost: `OpenCalls.settle`."""
        router = self.router
        self._send("decode", router.decode, "cancel", router.attempt)
        if router.phase != "reserving" or self.bounds.at_once:
            self._send("prefill", router.prefill, "cancel", router.attempt)
        last = router.attempt == self.bounds.attempts
        self.router.phase = "idle" if last else "failed"

    def _router_crashes(self) -> None:
        self.faults += 1
        self.router = Router(self.router.life)

    def _renew_reservation(self) -> None:
        self._send("decode", self.router.decode, "renew", self.router.attempt)

    def _router_ticket(self, _: int, life: int, attempt: int) -> None:
        router = self.router
        if self._heeds("ticket", life, attempt):
            router.phase = "prefilling"
            if not self.bounds.at_once:
                self._send("prefill", router.prefill, "prefill", life, attempt)

    def _router_started(self, _: int, life: int, attempt: int, source: Source) -> None:
        router = self.router
        if self._heeds("started", life, attempt):
            self._send("decode", router.decode, "pull_ahead", attempt, source)

    def _router_prefilled(self, _: int, life: int, attempt: int, source: Source) -> None:
        router = self.router
        if self._heeds("prefilled", life, attempt):
            router.phase = "decoding"
            self._send("decode", router.decode, "decode", life, attempt, source)

    def _router_done(self, _: int, life: int, attempt: int) -> None:
        router = self.router
        if self._heeds("done", life, attempt):
            self.completed += 1
            router.phase = "idle"

    # ---- prefill ----

    def _prefill_prefill(self, p: int, life: int, attempt: int) -> None:
        worker, now = self.prefills[p], self.prefills[p].now
        if now is not None:
            if now.attempt > attempt or (now.attempt, now.life) == (attempt, life):
                return
            worker.end()
            worker.leases.release(ID, last_epoch(now.attempt), committed=False)
        own = worker.pool.allocate()
        if own is None:
            return
        epoch, progress = worker.leases.new_epoch(attempt), KvProgress(BLOCKS, 0, 1)
        shared = worker.pool.share(own)
        computing = worker.leases.computing(ID, epoch, shared, progress)
        try:
            computing.__enter__()
        except LeaseExpired:
            worker.pool.free(shared)
            worker.pool.free(own)
            return
        worker.now = Computation(life, attempt, epoch, own, progress, computing)
        if self.bounds.ahead:
            source = Source(p, epoch, tuple(own.block_ids.tolist()), life, along=True)
            self._send("router", 0, "started", life, attempt, source)

    def _compute(self, p: int) -> None:
        worker, now = self.prefills[p], self.prefills[p].now
        assert now is not None
        block = int(now.own.block_ids[now.chunks])
        if worker.pool.content[block] is not None:
            raise Violation(f"prefill writes to block {block}, which holds {worker.pool.content[block]}")
        worker.pool.content[block] = (now.life, now.chunks)
        now.chunks += 1
        now.progress.chunk_begins(now.chunks)
        if now.chunks == BLOCKS:
            self._pin(p, now.own)
        else:
            now.progress.chunk_done()

    def _compute_elsewhere(self, p: int) -> None:
        """The engine had to start again, in other blocks."""
        self.faults += 1
        worker, now = self.prefills[p], self.prefills[p].now
        assert now is not None
        other = worker.pool.allocate()
        if other is None:
            return
        for n, block in enumerate(other.block_ids.tolist()):
            worker.pool.content[block] = (now.life, n)
        worker.pool.free(now.own)
        now.own = other
        self._pin(p, other)

    def _pin(self, p: int, own: Allocation) -> None:
        worker, now = self.prefills[p], self.prefills[p].now
        assert now is not None
        try:
            pinned = worker.leases.pin(ID, now.epoch, own, BLOCKS)
        except LeaseExpired:
            worker.end()
            return
        now.progress.complete()
        worker.end(failed=False)
        source = Source(p, now.epoch, tuple(pinned.block_ids.tolist()), now.life, along=False)
        self._send("router", 0, "prefilled", now.life, now.attempt, source)

    def _prefill_fails(self, p: int) -> None:
        self.faults += 1
        self.prefills[p].end()

    def _let_go(self, p: int) -> None:
        worker = self.prefills[p]
        worker.pool.free(worker.abandoned.pop())

    def _prefill_cancel(self, p: int, attempt: int) -> None:
        worker = self.prefills[p]
        if worker.now is not None and worker.now.attempt <= attempt:
            worker.end()
        worker.leases.release(ID, last_epoch(attempt), committed=False)

    def _prefill_release(self, p: int, epoch: int, committed: bool) -> None:
        self.prefills[p].leases.release(ID, epoch, committed)

    def _prefill_renew(self, p: int, epoch: int) -> None:
        _quietly(self.prefills[p].leases.renew, epoch)

    def _prefill_crashes(self, p: int) -> None:
        """Connections to it break; who comes later finds the next incarnation at the same address."""
        self.faults += 1
        self.prefills[p] = PrefillWorker(self.clock, self.prefills[p].incarnation + 1)
        for pull in self.pulls:
            if pull.source.prefill == p and (pull.reading is not None or pull.done_blocks):
                pull.reading = None
                self._fail(pull)

    # ---- decode ----

    def _decode_reserve(self, d: int, life: int, attempt: int) -> None:
        worker = self.decodes[d]
        self._release(worker, attempt)
        allocation = worker.pool.allocate()
        if allocation is None:
            return
        allocation.num_cached_tokens = self.bounds.cached
        for n in range(self.bounds.cached):
            worker.pool.content[allocation.block_ids[n]] = (life, n)
        try:
            worker.reservations.reserve(ID, attempt, allocation, b"%d" % life)
        except LeaseExpired:
            worker.pool.free(allocation)
            return
        self._send("router", 0, "ticket", life, attempt)

    def _decode_renew(self, d: int, attempt: int) -> None:
        _quietly(self.decodes[d].reservations.renew, attempt)

    def _decode_pull_ahead(self, d: int, attempt: int, source: Source) -> None:
        worker = self.decodes[d]
        if not worker.reservations.holds(ID, attempt):
            return
        if worker.ahead is not None:
            self._stop(worker.ahead)
            worker.ahead = None
        writing = worker.reservations.writing(ID, attempt)
        try:
            allocation = writing.__enter__()
        except LeaseExpired:
            return
        worker.ahead = Pull(source, attempt, source.life, allocation, writing, allocation.num_cached_tokens)
        self.pulls.append(worker.ahead)

    def _decode_decode(self, d: int, life: int, attempt: int, source: Source) -> None:
        worker, known = self.decodes[d], self.decodes[d].decoding
        if known is not None:
            if known.attempt >= attempt:
                return
            self._end_decoding(worker)
        worker.decoding = Decoding(life, attempt, source)
        if worker.ahead is None or worker.ahead.attempt != attempt:
            self._claim(worker)
        else:
            self._send("prefill", source.prefill, "renew", source.epoch)
            if worker.ahead.over:
                self._take(worker)

    def _take(self, worker: DecodeWorker) -> None:
        """The pull ahead is over: it counts if it was from this very source, else all of it is pulled again."""
        ahead, now = worker.ahead, worker.decoding
        assert ahead is not None and now is not None
        worker.ahead = None
        same = (ahead.source.prefill, ahead.source.epoch, ahead.source.table)
        useful = not ahead.failed and same == (now.source.prefill, now.source.epoch, now.source.table)
        self._claim(worker, pull=not useful)

    def _claim(self, worker: DecodeWorker, pull: bool = True) -> None:
        now = worker.decoding
        assert now is not None
        try:
            now.own = worker.reservations.claim(ID, now.attempt, b"%d" % now.life)
        except LeaseExpired:
            self._end_decoding(worker)
            return
        if pull:
            worker.pull = Pull(now.source, now.attempt, now.life, now.own, None, now.own.num_cached_tokens)
            self.pulls.append(worker.pull)

    def _decode(self, d: int) -> None:
        """All of it is here: commit, and what the engine computes with must be the KV of this prompt."""
        worker, now = self.decodes[d], self.decodes[d].decoding
        assert now is not None and now.own is not None
        found = [worker.pool.content[block] for block in now.own.block_ids.tolist()]
        if found != [(now.life, n) for n in range(BLOCKS)]:
            raise Violation(f"request life {now.life} is decoded with the KV {found}")
        self._end_decoding(worker, committed=True)
        self._send("router", 0, "done", now.life, now.attempt)

    def _end_decoding(self, worker: DecodeWorker, committed: bool = False) -> None:
        """`with`s left: the source is told, a pull ended, the blocks freed."""
        now, worker.decoding = worker.decoding, None
        assert now is not None
        if worker.pull is not None:
            self._stop(worker.pull)
            worker.pull = None
        if now.own is None and worker.ahead is not None and worker.ahead.attempt == now.attempt:
            self._drop(worker)
        if now.own is not None:
            worker.pool.free(now.own)
        self._send("prefill", now.source.prefill, "release", now.source.epoch, committed)

    def _decode_cancel(self, d: int, attempt: int) -> None:
        worker = self.decodes[d]
        self._release(worker, attempt)
        if worker.decoding is not None and worker.decoding.attempt <= attempt:
            self._end_decoding(worker)

    def _release(self, worker: DecodeWorker, attempt: int) -> None:
        worker.reservations.release(ID, attempt)
        if worker.ahead is not None and worker.ahead.attempt <= attempt:
            self._drop(worker)
            if worker.decoding is not None and worker.decoding.own is None:
                self._end_decoding(worker)

    def _drop(self, worker: DecodeWorker) -> None:
        ahead, worker.ahead = worker.ahead, None
        assert ahead is not None
        self._stop(ahead)
        worker.reservations.release(ID, ahead.attempt)

    def _decode_crashes(self, d: int) -> None:
        self.faults += 1
        worker, self.decodes[d] = self.decodes[d], DecodeWorker(self.clock)
        for pull in (worker.ahead, worker.pull):
            if pull is not None:
                pull.target = pull.writing = None

    # ---- the byte path ----

    def _stop(self, pull: Pull) -> None:
        """The receiver writes no more, and says so; the source may be within a read."""
        pull.target = None
        if pull.writing is not None:
            writing, pull.writing = pull.writing, None
            writing.__exit__(None, None, None)

    def _fail(self, pull: Pull) -> None:
        if pull.target is not None:
            pull.failed = True
            self._ended(pull)

    def _ended(self, pull: Pull) -> None:
        """At the receiver, well or not."""
        if pull.writing is not None:
            writing, pull.writing = pull.writing, None
            writing.__exit__(None, None, None)
        for worker in self.decodes:
            now = worker.decoding
            if worker.ahead is pull and now is not None and now.own is None and now.attempt == pull.attempt:
                self._take(worker)
            elif worker.pull is pull:
                worker.pull = None
                if pull.failed:
                    self._end_decoding(worker)

    def _begin_read(self, n: int) -> None:
        """Along the computation block by block up to the watermark, else all at once."""
        pull = self.pulls[n]
        leases, end = self.prefills[pull.source.prefill].leases, BLOCKS
        table: tuple[int, ...] = pull.source.table
        try:
            if pull.source.along:
                allocation, progress = leases.progress(ID, pull.source.epoch)
                if progress.failed:
                    raise LeaseExpired("its prefill ended without KV to pull")
                table, end = tuple(allocation.block_ids.tolist()), progress.watermark.tokens
                if pull.done_blocks >= end:
                    return
                end = pull.done_blocks + 1
            block_ids = table[pull.done_blocks : end]
            reading = leases.reading(ID, pull.source.epoch, np.array(block_ids, dtype=np.int32))
            reading.__enter__()
        except LeaseExpired:
            self._fail(pull)
            return
        pull.reading, pull.block_ids = reading, block_ids
        self._check_read(pull)

    def _end_read(self, n: int) -> None:
        pull = self.pulls[n]
        self._check_read(pull)
        if pull.target is not None:
            pool = next(w.pool for w in self.decodes if pull in (w.ahead, w.pull))
            source = self.prefills[pull.source.prefill].pool
            for block in pull.block_ids:
                mine = int(pull.target.block_ids[pull.done_blocks])
                if pool.refs[mine] != 1:
                    raise Violation(f"block {mine}, which belongs to {pool.refs[mine]} owners, is written late")
                pool.content[mine] = source.content[block]
                pull.done_blocks += 1
        reading, pull.reading = pull.reading, None
        assert reading is not None
        reading.__exit__(None, None, None)
        if pull.target is not None and pull.over:
            self._ended(pull)

    def _check_read(self, pull: Pull) -> None:
        pool = self.prefills[pull.source.prefill].pool
        for n, block in enumerate(pull.block_ids, pull.done_blocks):
            if not pool.refs[block]:
                raise Violation(f"block {block} is read, but free")
            if pool.content[block] != (pull.source.life, n):
                raise Violation(f"block {block} is read for {(pull.source.life, n)}, but has {pool.content[block]}")

    # ---- what must hold ----

    def check(self) -> None:
        for p, prefill in enumerate(self.prefills):
            own = [*prefill.abandoned, *([prefill.now.own] if prefill.now else [])]
            readings = [pull.reading for pull in self.pulls if pull.source.prefill == p]
            _check_owners(f"prefill {p}", prefill.pool, prefill.leases, readings, own)
        for d, decode in enumerate(self.decodes):
            own = [decode.decoding.own] if decode.decoding and decode.decoding.own is not None else []
            writings = [pull.writing for pull in (decode.ahead,) if pull is not None]
            _check_owners(f"decode {d}", decode.pool, decode.reservations, writings, own)
            if max(decode.pool.refs) > 1:
                raise Violation(f"a block of decode {d} has two owners: {decode.pool.refs}")

    def quiesce(self) -> None:
        """Nothing is heard of anybody any more: every wait ends at its deadline, every lease when its time is up."""
        for pull in list(self.pulls):
            if pull.reading is not None:
                self._check_read(pull)
                pull.reading.__exit__(None, None, None)
                pull.reading = None
        for decode in self.decodes:
            if decode.decoding is not None:
                self._end_decoding(decode)
            if decode.ahead is not None and not decode.ahead.over:
                self._fail(decode.ahead)
        for prefill in self.prefills:
            if prefill.now is not None:
                prefill.end()
            while prefill.abandoned:
                prefill.pool.free(prefill.abandoned.pop())
        self.clock.advance(TTL)
        for table, pool in self._tables():
            table.expire()
            if len(table) or any(pool.refs):
                raise Violation(f"{type(table).__name__} never ends: {len(table)} leases, references {pool.refs}")

    def _tables(self) -> Iterator[tuple[HandoffSource | HandoffTarget, Pool]]:
        yield from ((worker.leases, worker.pool) for worker in self.prefills)
        yield from ((worker.reservations, worker.pool) for worker in self.decodes)

    def key(self) -> Hashable:
        """All that decides what can come. Times count from now."""
        router = self.router
        prefills = tuple(
            (
                w.incarnation,
                tuple(w.pool.refs),
                tuple(w.pool.content),
                _leases(w.leases, self.clock),
                (w.now.life, w.now.attempt, w.now.epoch, w.now.chunks, w.now.progress.failed) if w.now else None,
                len(w.abandoned),
            )
            for w in self.prefills
        )
        decodes = tuple(
            (
                tuple(w.pool.refs),
                tuple(w.pool.content),
                _leases(w.reservations, self.clock),
                self._pull_key(w.ahead),
                self._pull_key(w.pull),
                (w.decoding.life, w.decoding.attempt, w.decoding.source, w.decoding.own is None)
                if w.decoding
                else None,
            )
            for w in self.decodes
        )
        pulls = tuple(sorted(map(repr, map(self._pull_key, self.pulls))))
        where = (router.life, router.attempt, router.phase, router.prefill, router.decode)
        return where, prefills, decodes, frozenset(self.messages), pulls, self.faults, self.ticks

    def _pull_key(self, pull: Pull | None) -> Hashable:
        if pull is None:
            return None
        target = None if pull.target is None else tuple(pull.target.block_ids.tolist())
        state = (pull.done_blocks, pull.reading is not None, pull.block_ids, pull.failed)
        return pull.source, pull.attempt, pull.life, target, pull.writing is not None, *state


def _quietly(renew: object, epoch: int) -> None:
    try:
        renew(ID, epoch)  # type: ignore[operator]
    except LeaseExpired:
        return


def _due(table: HandoffSource | HandoffTarget, clock: ManualClock) -> bool:
    return any(lease.expires_at_s <= clock.now() for lease in table._leases.values())


def _leases(table: HandoffSource | HandoffTarget, clock: ManualClock) -> Hashable:
    return tuple(
        (
            lease.epoch,
            tuple(lease.allocation.block_ids.tolist()),
            lease.expires_at_s if lease.expires_at_s == math.inf else max(0.0, lease.expires_at_s - clock.now()),
            lease.users,
            lease.subject,
            lease.progress is not None and (lease.progress.failed, lease.progress.watermark.tokens),
        )
        for lease in table._leases.values()
    )


def _check_owners(
    who: str,
    pool: Pool,
    table: HandoffSource | HandoffTarget,
    used: list[AbstractContextManager[object] | None],
    own: list[Allocation],
) -> None:
    """Every reference on a block is somebody's, and everybody's is there."""
    leases = {id(lease): lease for lease in table._leases.values()}
    leases |= {id(use._lease): use._lease for use in used if use is not None}  # type: ignore[attr-defined]
    expected = Counter(
        block
        for allocation in [*(lease.allocation for lease in leases.values()), *own]
        for block in allocation.block_ids.tolist()
    )
    if [expected[block] for block in range(len(pool.refs))] != pool.refs:
        raise Violation(f"{who}: blocks have the references {pool.refs}, and the owners {dict(expected)}")
    if len(table) != len(leases):
        raise Violation(f"{who}: {len(table)} leases are said to hold blocks, but {len(leases)} do")


def quiesced(world: World) -> None:
    """`World.check`, and that it ends from here. Uses the world up."""
    world.check()
    world.quiesce()
