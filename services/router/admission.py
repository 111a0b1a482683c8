"""Who may come in, and who of them goes to the workers: the bound on requests in flight, and the queue before it.

admit ──► (room in the queue?) ──► enter ──► (a place at the workers?) ──► … ──► leave
            no: QueueFull, or who                 no: waits for its turn, in the
            counts for less leaves                order of `scheduler_ir.waiting`
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sagellm_common.core.clock import Clock
from sagellm_common.core.errors import DeadlineExceeded, Draining, InvalidRequest, QueueFull
from sagellm_common.core.types import GenerationRequest
from sagellm_common.scheduler_ir.engine_policy import Order, SequenceView
from sagellm_common.scheduler_ir.fairness import OUTPUT_WEIGHT, service_tokens
from sagellm_common.scheduler_ir.waiting import Waiting, WaitingRoom
from services.router.calls import OpenCalls

RETRY_AFTER_S = 1.0
"""While it is not known how long requests take."""
MIN_RETRY_S, MAX_RETRY_S = 0.05, 60.0
SMOOTHING = 0.1
"""Weight of the latest request in how many tokens one gets."""
MAX_REQUEST_ID_CHARS = 256
"""Ids outlive their requests in logs and explanations."""

Lifetime = Callable[[float], float | None]
"""Tokens of an answer → seconds from its place at the workers to its end, as the cost model has it; None: not known."""


@dataclass(slots=True, eq=False)
class Slot:
    """One request's place. `cancelled` is set by CancelGeneration, after its calls were cancelled; then `on_cancel` is
    called, unless it waits for its turn: then whoever waits is told.

    `turn` is done when it may go to the workers, has an exception where it will not, and is cancelled with its task.
    `emitted_tokens` are what it got.
    """

    calls: OpenCalls
    waiting: Waiting
    max_new_tokens: int
    turn: asyncio.Future[None]
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    on_cancel: Callable[[], None] = lambda: None
    emitted_tokens: int = 0

    @property
    def running(self) -> bool:
        return self.turn.done() and not self.turn.cancelled() and self.turn.exception() is None


class Admission:
    """`max_in_flight` requests at most, of which `max_running` at the workers (0: all); the others wait.

    `order` and `fair` are the strategy's, `ttft_target_s` what deadlines are derived from that they go by.
    """

    def __init__(
        self,
        max_in_flight: int,
        clock: Clock,
        *,
        max_running: int = 0,
        order: Order = "fifo",
        fair: bool = False,
        lifetime: Lifetime = lambda tokens: None,
    ) -> None:
        self._max_in_flight = max_in_flight
        self._max_running = max_running or max_in_flight
        self._clock = clock
        self._lifetime = lifetime
        self._room = WaitingRoom(order, fair=fair)
        self._slots: dict[str, Slot] = {}
        self._running = 0
        self._arrivals = itertools.count()
        self._answer_tokens = 0.0
        self._rejected = 0
        """Since somebody left last: each of them is told to come when a place of its own is free."""
        self._draining = False
        self._left = asyncio.Event()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def waiting(self) -> int:
        return len(self._room)

    def go_by(self, order: Order, *, fair: bool) -> None:
        """From now on those who wait go in this order."""
        if (order, fair) == (self._room.order, self._room.fair):
            return
        room = WaitingRoom(order, fair=fair)
        for one in self._room:
            room.push(one)
        self._room = room

    @contextmanager
    def admit(self, request: GenerationRequest, first_token_within_s: float) -> Iterator[Slot]:
        """A place for the time of the block. Raises as `take`."""
        slot = self.take(request, first_token_within_s)
        try:
            yield slot
        finally:
            self.leave(slot)

    def take(self, request: GenerationRequest, first_token_within_s: float) -> Slot:
        """A place until `leave`. Raises QueueFull, Draining, and InvalidRequest for an id in flight or one
        that is too long."""
        request_id = request.request_id
        if self._draining:
            raise Draining("this router is stopping; try again at another", retry_after_s=RETRY_AFTER_S)
        if len(request_id) > MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(
                f"request_id has {len(request_id)} characters, but may have at most {MAX_REQUEST_ID_CHARS}",
                metadata={"field": "request_id"},
            )
        if request_id in self._slots:
            raise InvalidRequest(
                f"request_id {request_id!r} is in flight already; use a new one per request, or none",
                metadata={"field": "request_id"},
            )
        slot = self._slot(request, first_token_within_s)
        self._make_room(slot.waiting)
        self._slots[request_id] = slot
        return slot

    def enter(self, slot: Slot) -> bool:
        """Whether the request may go to the workers at once; else it has to wait for its `turn`."""
        if self._running >= self._max_running or self._room:
            self._room.push(slot.waiting)
            return False
        self._room.charge(slot.waiting.tenant, slot.waiting.tokens)
        self._let(slot)
        return True

    async def turn(self, slot: Slot, within_s: float) -> None:
        """Returns when the request may go to the workers; at once where it already may.

        Raises DeadlineExceeded, QueueFull when it had to give way to another, Cancelled.
        """
        if slot.running or (slot.waiting.view.request_id not in self._room and self.enter(slot)):
            return
        try:
            async with asyncio.timeout(within_s):
                await slot.turn
        except TimeoutError:
            raise DeadlineExceeded(
                f"request {slot.waiting.view.request_id} has waited for its turn until its deadline; allow more time, "
                "or try again when less is going on"
            ) from None
        except asyncio.CancelledError:
            slot.calls.check()
            raise
        finally:
            self._room.remove(slot.waiting.view.request_id)

    def cancel(self, request_id: str) -> bool:
        """Ends a request wherever it is; False when it is not in flight."""
        slot = self._slots.get(request_id)
        if slot is None:
            return False
        slot.calls.cancel()
        slot.cancelled.set()
        if request_id in self._room:
            slot.turn.cancel()
        else:
            slot.on_cancel()
        return True

    async def drain(self) -> None:
        """Admits nobody any more; returns when nobody is left. The caller bounds the wait."""
        self._draining = True
        while self._slots:
            self._left.clear()
            await self._left.wait()

    def retry_after_s(self) -> float:
        """When another try makes sense: by Little's law, as many places become free per lifetime as there are."""
        seconds = self._lifetime(self._answer_tokens) if self._answer_tokens else None
        if seconds is None:
            return RETRY_AFTER_S
        return min(MAX_RETRY_S, max(MIN_RETRY_S, seconds * (self._rejected + 1) / max(1, self._running)))

    # ---- inside ----

    def _slot(self, request: GenerationRequest, first_token_within_s: float) -> Slot:
        now_s, most = self._clock.now(), max(0, request.sampling.max_new_tokens)
        deadline_s = now_s + first_token_within_s
        view = SequenceView(request.request_id, next(self._arrivals), request.priority, deadline_s, arrived_s=now_s)
        waiting = Waiting(view, request.tenant, service_tokens(len(request.prompt_token_ids), most))
        return Slot(OpenCalls(request.request_id), waiting, most, asyncio.get_running_loop().create_future())

    def _make_room(self, newcomer: Waiting) -> None:
        """Raises QueueFull where nobody gives way to it."""
        gone = sum(slot.turn.done() and not slot.running for slot in self._slots.values())
        if len(self._slots) - gone < self._max_in_flight:
            return
        for slot in self._slots.values():
            if slot.turn.done():  # its task has yet to hear of it
                self._room.remove(slot.waiting.view.request_id)
        victim, retry_s = self._room.gives_way_to(newcomer), self.retry_after_s()
        self._rejected += 1
        full = f"{self._max_in_flight} requests are in flight, the most this router takes (router.max_queue)"
        if victim is None:
            raise QueueFull(f"{full}; try again later", retry_after_s=retry_s)
        slot = self._slots[victim.view.request_id]
        self._room.remove(victim.view.request_id)
        slot.turn.set_exception(QueueFull(f"{full}, and another came before; try again later", retry_after_s=retry_s))

    def _let(self, slot: Slot) -> None:
        self._running += 1
        slot.turn.set_result(None)

    def leave(self, slot: Slot) -> None:
        del self._slots[slot.waiting.view.request_id]
        if slot.running:
            self._running -= 1
            self._rejected = 0
            self._room.charge(slot.waiting.tenant, -OUTPUT_WEIGHT * (slot.max_new_tokens - slot.emitted_tokens))
            known = self._answer_tokens or slot.emitted_tokens
            self._answer_tokens = known + SMOOTHING * (slot.emitted_tokens - known)
        elif not slot.turn.done():
            slot.turn.cancel()  # wakes who still waits for it
        elif not slot.turn.cancelled():
            slot.turn.exception()  # it was told, or is gone
        while self._running < self._max_running and (one := self._room.pop(self._clock.now())) is not None:
            if not (following := self._slots[one.view.request_id]).turn.done():
                self._let(following)
        self._left.set()
