"""Moves running generations off decode workers that leave: those that drain, and those that get another role.

    a worker leaves ──► reserve on another ──► hand over ──► it ends the generation after a step, its KV pinned
                           └ nobody has room: it stays,             └ Moved ──► the next attempt pulls it
                             and others are asked again

The worker that leaves does nothing by itself: what nobody takes it finishes, as far as its grace goes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import Counter

from sagellm_common.core.errors import SageError
from sagellm_common.core.types import ModelInfo
from sagellm_common.rpc.sessions import HandedOver
from services.router.calls import OpenCalls
from services.router.generation import Generation
from services.router.stages import Admitted
from services.router.workers import WorkerLink, Workers

log = logging.getLogger(__name__)

LOOK_S = 0.1
"""How often it is looked who has left."""
RETRY_S = 0.5
"""After which others are asked again to take a generation for which nobody had room."""
AT_A_TIME = 4
"""The fewer share the links, the shorter each stream pauses."""
RESERVE_TIMEOUT_S = 2.0
HAND_OVER_TIMEOUT_S = 10.0
"""For the step under way, which may compute a long prompt, and for a worker that knows nothing of handing over."""

MOVES = Counter("sagellm_router_moves", "Generations to be moved off a decode worker that leaves.", ["outcome"])


@dataclass(frozen=True, slots=True)
class Move:
    """Blocks that `target` has reserved for the attempt after this one."""

    target: WorkerLink
    request_id: str
    attempt: int

    def undo(self) -> None:
        """Gives the blocks back. Idempotent, and a no-op once they are claimed."""
        self.target.decode.release(self.request_id, self.attempt)


class Moved(Exception):
    """The decode worker has handed the generation over: the next attempt goes on with it, as `move` has prepared.

    None: by itself, so nothing is prepared.
    """

    def __init__(self, move: Move | None) -> None:
        super().__init__()
        self.move = move


@dataclass(slots=True, eq=False)
class Decoding:
    """One attempt that gets its tokens from `link`."""

    link: WorkerLink
    admitted: Admitted
    generation: Generation
    calls: OpenCalls
    move: Move | None = None
    asking: asyncio.Task[None] | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def handed_over(self, said: HandedOver) -> Moved:
        """To be raised."""
        move, self.move = self.move, None
        self.generation.move(self.link, said, move.target if move else None)
        MOVES.labels("moved" if said.source else "without_kv").inc()
        return Moved(move)


@dataclass(frozen=True, slots=True, eq=False)
class Movable:
    """One attempt whose client gets its tokens from `link` itself."""

    link: WorkerLink
    model: ModelInfo
    request_id: str
    attempt: int


class Moves:
    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._decoding: set[Decoding] = set()
        self._movable: set[Movable] = set()
        self._turn = asyncio.Semaphore(AT_A_TIME)

    @contextmanager
    def decoding(
        self, link: WorkerLink, admitted: Admitted, generation: Generation, calls: OpenCalls
    ) -> Iterator[Decoding]:
        """For the time of the block the generation may be asked for."""
        one = Decoding(link, admitted, generation, calls)
        self._decoding.add(one)
        try:
            yield one
        finally:
            self._decoding.discard(one)
            one.over.set()
            if one.move is not None:
                one.move.undo()

    def began(self, link: WorkerLink, model: ModelInfo, request_id: str, attempt: int) -> Movable:
        """As `decoding`, until `ended`, of one whose client gets the tokens itself: it will ask where to go on."""
        one = Movable(link, model, request_id, attempt)
        self._movable.add(one)
        return one

    def ended(self, one: Movable) -> None:
        self._movable.discard(one)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as asking:
            while True:
                for one in self._decoding:
                    if one.link.leaving and one.asking is None:
                        one.asking = asking.create_task(self._ask(one), name="move")
                for other in self._movable:
                    if other.link.leaving and self._others(other.link, other.model):
                        other.link.decode.hand_over(other.request_id, other.attempt)
                await asyncio.sleep(LOOK_S)

    async def _ask(self, one: Decoding) -> None:
        try:
            async with self._turn:
                if not one.over.is_set() and one.link.leaving and await self._move(one):
                    return
            MOVES.labels("no_room").inc()
            await asyncio.sleep(RETRY_S)
        except Exception:
            log.exception("moving request %s failed", one.admitted.request.request_id)
        finally:
            one.asking = None

    async def _move(self, one: Decoding) -> bool:
        """False when nobody takes it. Returns when it has ended on the worker that leaves."""
        request, attempt = one.admitted.request, one.generation.attempts + 1
        for target in self._targets(one):
            if one.over.is_set():
                return True
            try:
                one.calls.reserving(target, attempt)
                await target.decode.reserve(request, attempt, one.generation.emitted, timeout_s=RESERVE_TIMEOUT_S)
            except SageError as err:
                log.info("request %s is not moved to %s: %s", request.request_id, target.worker_id, err.message)
                continue
            move = Move(target, request.request_id, attempt)
            if one.over.is_set():
                move.undo()
                return True
            one.move = move
            one.link.decode.hand_over(request.request_id, one.generation.attempts)
            try:
                async with asyncio.timeout(HAND_OVER_TIMEOUT_S):
                    await one.over.wait()
            except TimeoutError:
                log.warning("worker %s does not hand request %s over", one.link.worker_id, request.request_id)
                one.move = None
                move.undo()
            return True
        return False

    def _targets(self, one: Decoding) -> list[WorkerLink]:
        """The least busy first."""
        others = self._others(one.link, one.admitted.model)
        return sorted(others, key=lambda link: (link.load, link.assigned, link.worker_id))

    def _others(self, leaving: WorkerLink, model: ModelInfo) -> list[WorkerLink]:
        return [link for link in self._workers.usable(model) if link.decodes and link is not leaving]
