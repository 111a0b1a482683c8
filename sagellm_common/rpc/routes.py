"""Routes: what a router plans for one attempt, as its client carries it to the decode worker.

    router ──route──► client ──request, route──► decode worker ──► prefill worker
                        ◄────────── tokens ──────────┘

Where routers and workers share a key, a route is signed together with its prompt and tenant: nobody gets work done that
no router has admitted.
"""

from __future__ import annotations

import hashlib
import hmac

from google.protobuf.message import DecodeError

from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.types import WorkerAddress
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2

_SIGNATURE_BYTES = 16


class RouteSigner:
    """With an empty key nothing is signed, and everything is taken."""

    def __init__(self, key: str) -> None:
        digest = hashlib.blake2b(key.encode(), person=b"sagellm route").digest()
        self._keyed = hashlib.blake2b(key=digest, digest_size=_SIGNATURE_BYTES) if key else None

    def sign(self, route: inference_pb2.Route, prompt_token_ids: bytes) -> inference_pb2.SignedRoute:
        packed = route.SerializeToString()
        return inference_pb2.SignedRoute(route=packed, signature=self._signature(packed, prompt_token_ids))

    def check(
        self,
        signed: inference_pb2.SignedRoute,
        route: inference_pb2.Route,
        request: inference_pb2.GenerateRequest,
    ) -> None:
        """Raises InvalidRequest for a route that is not for this request, or not signed."""
        expected = self._signature(signed.route, request.prompt_token_ids)
        if expected and not hmac.compare_digest(expected, signed.signature):
            raise InvalidRequest(
                "the route is not signed with this cluster's key, or not for this prompt; ask a router for one, and "
                "give routers and workers the same rpc.route_key",
                metadata={"field": "route.signature"},
            )
        for name in ("request_id", "tenant"):
            theirs, ours = getattr(request, name), getattr(route, name)
            if theirs != ours:
                raise InvalidRequest(
                    f"request.{name} is {theirs!r}, but the route is for {ours!r}",
                    metadata={"field": f"request.{name}"},
                )

    def _signature(self, route: bytes, prompt_token_ids: bytes) -> bytes:
        if self._keyed is None:
            return b""
        keyed = self._keyed.copy()
        keyed.update(len(route).to_bytes(8, "little") + route)
        keyed.update(prompt_token_ids)
        return keyed.digest()


def parse_route(signed: inference_pb2.SignedRoute) -> inference_pb2.Route:
    """Raises InvalidRequest."""
    try:
        return inference_pb2.Route.FromString(signed.route)
    except DecodeError as err:
        raise InvalidRequest(f"route is malformed: {err}", metadata={"field": "route"}) from None


def encode_address(worker: WorkerAddress) -> inference_pb2.WorkerAddress:
    return inference_pb2.WorkerAddress(
        worker_id=worker.worker_id, incarnation=worker.incarnation, address=worker.address
    )


def decode_address(message: inference_pb2.WorkerAddress, field: str) -> WorkerAddress:
    """Raises InvalidRequest for one that leads nowhere."""
    for name in ("worker_id", "address"):
        if not getattr(message, name):
            raise InvalidRequest(f"{field}.{name} is empty, but must be set")
    return WorkerAddress(message.worker_id, message.incarnation, message.address)
