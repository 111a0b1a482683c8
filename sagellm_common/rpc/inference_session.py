"""A client's end of the router's session stream: all its generations on one stream, told apart by a number of ours."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import grpc

from sagellm_common.core.errors import SageError
from sagellm_common.core.telemetry import current_carrier
from sagellm_common.core.types import GenerationOutput, GenerationRequest
from sagellm_common.rpc import codec
from sagellm_common.rpc.carriers import Choice
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2
from sagellm_common.rpc.session_client import Mailbox, SessionClient, to_ms
from sagellm_common.rpc.status import from_status

_LEAVE = inference_pb2.LeaveRequest()


class RouterLost(Exception):
    """The session broke, or could not be opened: not a word of the router's. `error` says why."""

    def __init__(self, error: SageError) -> None:
        super().__init__(error.message)
        self.error = error


class InferenceSession(SessionClient[int, inference_pb2.InferenceSessionRequest, inference_pb2.GenerateResult]):
    def __init__(self, channel: grpc.aio.Channel, address: str, choice: Choice = "auto") -> None:
        peer, metadata = f"the router at {address}", {"address": address}
        super().__init__(channel, address, "sagellm.v1.InferenceService", choice, peer, metadata)
        self._call_ids = itertools.count(1)

    async def generate(self, request: GenerationRequest, *, timeout_s: float) -> AsyncGenerator[GenerationOutput, None]:
        """Outputs as the router relays them; the last has finish_reason. Iterate under `aclosing`: leaving early
        cancels the generation everywhere.

        Raises what the router answers, PeerLost, DeadlineExceeded.
        """
        call_id = next(self._call_ids)
        message = inference_pb2.InferenceSessionRequest(
            call_id=call_id,
            generate=codec.encode_generation_request(request, to_ms(timeout_s), current_carrier()),
        )
        ended = False
        try:
            async with self._call(call_id, message, timeout_s, f"generation {request.request_id}") as replies:
                while not ended:
                    result = await replies.get()
                    if result.HasField("error"):
                        ended = True
                        raise from_status(result.error)
                    output = codec.decode_output(result.output)
                    ended = output.finish_reason is not None
                    yield output
        finally:
            if not ended:
                self._send_if_open(inference_pb2.InferenceSessionRequest(call_id=call_id, leave=_LEAVE))

    @asynccontextmanager
    async def planning(self, message: inference_pb2.PlanRequest, timeout_s: float) -> AsyncIterator[PlannedCall]:
        """A call for routes, for the time of one generation. Leaving it before its end is told gives the router's
        place back. Raises RouterLost, DeadlineExceeded."""
        call_id = next(self._call_ids)
        asked = inference_pb2.InferenceSessionRequest(call_id=call_id, plan=message)
        what = f"generation {message.request.request_id}"
        entered = self._call(call_id, asked, timeout_s, what)
        try:
            replies = await entered.__aenter__()
        except SageError as err:
            raise RouterLost(err) from err
        call = PlannedCall(call_id, replies, self._send_if_open, self._send_later_if_open)
        try:
            yield call
        finally:
            if not call.ended:
                call.send(leave=_LEAVE)
            await entered.__aexit__()

    def _split(
        self, message: inference_pb2.InferenceSessionResponse
    ) -> Iterable[tuple[int, inference_pb2.GenerateResult]]:
        return ((result.call_id, result) for result in message.results)


class PlannedCall:
    """Asks for routes, and tells how it goes. `ended`: the router counts it no more."""

    def __init__(
        self,
        call_id: int,
        replies: Mailbox[inference_pb2.GenerateResult],
        send: Callable[[inference_pb2.InferenceSessionRequest], None],
        send_later: Callable[[inference_pb2.InferenceSessionRequest], None],
    ) -> None:
        self._call_id = call_id
        self._replies = replies
        self._send = send
        self._send_later = send_later
        self.ended = False

    async def answer(self) -> inference_pb2.GenerateResult:
        """A route; or an output, where the router relays. Raises the router's error, RouterLost."""
        try:
            result = await self._replies.get()
        except SageError as err:
            raise RouterLost(err) from err
        if result.HasField("error"):
            self.ended = True
            raise from_status(result.error)
        return result

    def again(self, message: inference_pb2.PlanRequest) -> None:
        """Asks for another route. Raises RouterLost."""
        try:
            self._replies.check()
        except SageError as err:
            raise RouterLost(err) from err
        self.send(plan=message)

    def listen(self, on_error: Callable[[SageError], None] | None) -> None:
        """What the router says of a generation whose route it has given: that it is cancelled."""

        def hear(result: inference_pb2.GenerateResult) -> None:
            if result.HasField("error") and on_error is not None:
                on_error(from_status(result.error))

        self._replies.listen(hear if on_error is not None else None)

    def report(self, message: inference_pb2.ProgressReport) -> None:
        """Not urgent. A router that is lost meanwhile misses nothing that it still needs."""
        self._send_later(inference_pb2.InferenceSessionRequest(call_id=self._call_id, progress=message))

    def end(self, message: inference_pb2.ProgressReport) -> None:
        """At once: who has an answer may ask for its explanation."""
        self.ended = True
        self.send(progress=message)

    def send(self, **op: object) -> None:
        self._send(inference_pb2.InferenceSessionRequest(call_id=self._call_id, **op))  # type: ignore[arg-type]
