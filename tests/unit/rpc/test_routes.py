from __future__ import annotations

import pytest

from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.types import pack_int32
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2
from sagellm_common.rpc.routes import RouteSigner, decode_address, parse_route

PROMPT = pack_int32([1, 2, 3])
ROUTE = inference_pb2.Route(request_id="r", attempt=2, tenant="acme")


def request(**changes: object) -> inference_pb2.GenerateRequest:
    fields = {"request_id": "r", "tenant": "acme", "prompt_token_ids": PROMPT} | changes
    return inference_pb2.GenerateRequest(**fields)


@pytest.mark.parametrize("key", ["", "secret", "k" * 1000])
def test_what_one_signs_the_other_takes(key: str) -> None:
    signed = RouteSigner(key).sign(ROUTE, PROMPT)
    assert bool(signed.signature) == bool(key)
    route = parse_route(signed)
    assert route == ROUTE
    RouteSigner(key).check(signed, route, request())


@pytest.mark.parametrize("theirs", ["", "other"])
def test_another_key(theirs: str) -> None:
    signed = RouteSigner(theirs).sign(ROUTE, PROMPT)
    with pytest.raises(InvalidRequest, match=r"rpc\.route_key"):
        RouteSigner("secret").check(signed, ROUTE, request())


def test_another_prompt() -> None:
    signed = RouteSigner("secret").sign(ROUTE, PROMPT)
    with pytest.raises(InvalidRequest, match="not for this prompt"):
        RouteSigner("secret").check(signed, ROUTE, request(prompt_token_ids=pack_int32([1, 2])))


def test_a_changed_route() -> None:
    signed = RouteSigner("secret").sign(ROUTE, PROMPT)
    signed.route = inference_pb2.Route(request_id="r", attempt=2, tenant="others").SerializeToString()
    with pytest.raises(InvalidRequest, match=r"rpc\.route_key"):
        RouteSigner("secret").check(signed, parse_route(signed), request(tenant="others"))


@pytest.mark.parametrize("field", ["request_id", "tenant"])
def test_of_another_request(field: str) -> None:
    signed = RouteSigner("secret").sign(ROUTE, PROMPT)
    with pytest.raises(InvalidRequest, match=f"request.{field} is 'x'"):
        RouteSigner("secret").check(signed, ROUTE, request(**{field: "x"}))


def test_malformed() -> None:
    with pytest.raises(InvalidRequest, match="malformed"):
        parse_route(inference_pb2.SignedRoute(route=b"\xff\xff"))


def test_an_address_that_leads_nowhere() -> None:
    with pytest.raises(InvalidRequest, match=r"route\.decode\.address is empty"):
        decode_address(inference_pb2.WorkerAddress(worker_id="d"), "route.decode")
