"""A client's end of the router's session stream: all its generations on one stream, told apart by a number of ours."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Iterable

import grpc

from sagellm_common.core.telemetry import current_carrier
from sagellm_common.core.types import GenerationOutput, GenerationRequest
from sagellm_common.rpc import codec
from sagellm_common.rpc.carriers import Choice
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2
from sagellm_common.rpc.session_client import SessionClient, to_ms
from sagellm_common.rpc.status import from_status

_LEAVE = inference_pb2.LeaveRequest()


class InferenceSession(SessionClient[int, inference_pb2.InferenceSessionRequest, inference_pb2.GenerateResult]):
    def __init__(self, channel: grpc.aio.Channel, address: str, choice: Choice = "auto") -> None:
        peer, metadata = f"the router at {address}", {"address": address}
        super().__init__(channel, address, "sagellm.v1.InferenceService", choice, peer, metadata)
        self._call_ids = itertools.count(1)

    async def generate(self, request: GenerationRequest, *, timeout_s: float) -> AsyncGenerator[GenerationOutput, None]:
        """Outputs as the router sends them; the last has finish_reason. Iterate under `aclosing`: leaving early
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

    def _split(
        self, message: inference_pb2.InferenceSessionResponse
    ) -> Iterable[tuple[int, inference_pb2.GenerateResult]]:
        return ((result.call_id, result) for result in message.results)
