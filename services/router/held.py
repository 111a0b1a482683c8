"""A generation that its client has done by the workers themselves: what it counts for here, until it is over."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Protocol

from sagellm_common.core.types import GenerationRequest
from services.router.admission import Slot
from services.router.generation import Generation
from services.router.load import Sent
from services.router.moves import Moves
from services.router.placing import sent_of
from services.router.retry import Retry
from services.router.stages import Admitted, Deadline, Routed


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
        self.place = ExitStack()
        """Among the requests in flight."""
        self._prefilling = ExitStack()
        self._decoding = ExitStack()

    def begin(self, admitted: Admitted, routed: Routed, moves: Moves) -> Sent:
        """An attempt is on its way to the workers."""
        attempt = self.generation.attempts
        self.admitted, self.routed, self.planned_s = admitted, routed, self.generation.age_s
        if routed.prefill is not None:
            self.slot.calls.prefilling(routed.prefill, attempt)
        self.slot.calls.decoding(routed.decode, attempt)
        self._decoding.enter_context(routed.decode.engaged())
        if routed.prefill is not None:
            self._prefilling.enter_context(routed.prefill.engaged())
        self._decoding.enter_context(moves.routed(routed.decode, admitted.model, self.request.request_id, attempt))
        self.sent = self._decoding.enter_context(sent_of(admitted, routed, len(self.generation.emitted)))
        if routed.prefill is None:
            self.sent.prefilled()  # the client does not tell when the decode worker has computed it
        return self.sent

    def prefilled(self) -> None:
        """The prompt is computed. Idempotent."""
        self._prefilling.close()
        if self.sent is not None:
            self.sent.prefilled()

    def end_attempt(self) -> None:
        """Idempotent."""
        self._prefilling.close()
        self._decoding.close()
        self.routed = self.sent = None

    def release(self, *, well: bool = False, by_client: bool = False) -> None:
        """It is over. Idempotent. What workers may still hold is given back; nothing, where it has ended `well`."""
        if well:
            self.slot.calls.finished()
        self.slot.calls.settle(by_client=by_client)
        self.end_attempt()
        self.place.close()
