"""A generation that its client has done by the workers themselves: what it counts for here, until it is over."""

from __future__ import annotations

from typing import Protocol

from sagellm_common.core.types import GenerationRequest
from services.router.admission import Slot
from services.router.generation import Generation
from services.router.load import Sent
from services.router.moves import Movable, Moves
from services.router.placing import sent_of
from services.router.retry import Retry
from services.router.stages import Admitted, Deadline, Routed
from services.router.workers import WorkerLink


class PromptComputed(Protocol):
    """As its client tells it."""

    @property
    def cached_tokens(self) -> int: ...
    @property
    def compute_ms(self) -> float: ...
    @property
    def engine_ms(self) -> float: ...


class Ended(Protocol):
    """What its client tells of a finished generation."""

    @property
    def completion_tokens(self) -> int: ...
    @property
    def kv_bytes_transferred(self) -> int: ...
    @property
    def transfer_ms(self) -> float: ...
    @property
    def tpot_ms(self) -> float: ...


class Held:
    """Its place among the requests in flight, and its share of the load of the workers it was sent to.

    Workers give back by themselves what they hold for a client that is gone, and for a request that fails; only what
    one of them still holds when the other dies has to be taken from it by who knows both: this router.
    `admitted` once it is known to be valid, `routed` while an attempt is under way, `planned_s` of its age since then.
    """

    def __init__(
        self, request: GenerationRequest, deadline: Deadline, slot: Slot, generation: Generation, retry: Retry
    ) -> None:
        self.request = request
        self.deadline = deadline
        self.slot = slot
        self.generation = generation
        self.retry = retry
        self.admitted: Admitted | None = None
        self.routed: Routed | None = None
        self.sent: Sent | None = None
        self.planned_s = 0.0
        self._prefilling: WorkerLink | None = None
        self._moves: Moves | None = None
        self._movable: Movable | None = None

    def begin(self, admitted: Admitted, routed: Routed, moves: Moves) -> None:
        """An attempt is on its way to the workers."""
        self.admitted, self.routed, self.planned_s = admitted, routed, self.generation.age_s
        attempt, calls = self.generation.attempts, self.slot.calls
        if routed.prefill is not None:
            calls.prefilling(routed.prefill, attempt)
            routed.prefill.engage()
            self._prefilling = routed.prefill
        calls.decoding(routed.decode, attempt)
        routed.decode.engage()
        self._moves, self._movable = moves, moves.began(routed.decode, admitted.model, self.request.request_id, attempt)
        self.sent = sent_of(admitted, routed, len(self.generation.emitted))
        self.sent.__enter__()
        if routed.prefill is None:
            self.sent.prefilled()  # the client does not tell when the decode worker has computed it

    def prefilled(self) -> None:
        """The prompt is computed. Idempotent."""
        if self._prefilling is not None:
            self._prefilling.ease()
            self._prefilling = None
        if self.sent is not None:
            self.sent.prefilled()
            self.sent.step(0)

    def end_attempt(self) -> None:
        """Idempotent."""
        if self.routed is not None and self.sent is not None:
            self.prefilled()
            self.sent.__exit__(None, None, None)
            if self._moves is not None and self._movable is not None:
                self._moves.ended(self._movable)
            self.routed.decode.ease()
        self.routed = self.sent = None

    def release(self, *, well: bool = False, by_client: bool = False) -> None:
        """It is over: its place is the caller's to give back. What workers may still hold is taken from them; nothing,
        where it has ended `well`. Idempotent."""
        if well:
            self.slot.calls.finished()
        self.slot.calls.settle(by_client=by_client)
        self.end_attempt()
