"""The HTTP side: routes, API keys, errors, metrics, the root span. Text and tokens are `generation`'s."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from http import HTTPStatus
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from sagellm_common.client.models import ModelDirectory
from sagellm_common.client.router import RouterClient
from sagellm_common.core.clock import Clock, SystemClock
from sagellm_common.core.config import GatewayConfig
from sagellm_common.core.errors import NoWorker, SageError
from sagellm_common.core.telemetry import span
from sagellm_common.core.types import ModelInfo
from services.gateway import api
from services.gateway.errors import CLIENT_GONE, HttpError, from_sage_error, from_validation_error
from services.gateway.exchange import Disconnected, Exchange, first_leaf
from services.gateway.generation import Generator
from services.gateway.metrics import DURATION, REQUESTS

log = logging.getLogger(__name__)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
_ID_PREFIXES = {CHAT: "chatcmpl", COMPLETIONS: "cmpl"}
_ROUTES = {CHAT, COMPLETIONS, "/v1/models", "/health", "/ready", "/metrics"}

TENANT_HEADER = "x-sagellm-tenant"
CLASS_HEADER = "x-sagellm-class"
_OFF_LOOP_BYTES = 64 << 10
"""Larger bodies are parsed on a thread, so that other requests go on."""


class Gateway:
    """The ASGI application. The caller owns `router` and closes it."""

    def __init__(
        self,
        config: GatewayConfig,
        router: RouterClient,
        models: ModelDirectory,
        *,
        timeout_s: float,
        clock: Clock | None = None,
    ) -> None:
        self._config = config
        self._router = router
        self._models = models
        self._clock = clock or SystemClock()
        self._generator = Generator(router, models, timeout_s, self._clock)
        self._started_unix_s = int(time.time())
        self._keys = [(key.encode(), "") for key in config.api_keys]
        self._keys += [(key.encode(), tenant) for tenant, keys in config.tenant_keys.items() for key in keys]
        self._routes = Router(
            [
                Route(CHAT, GenerationEndpoint(self, api.ChatBody), methods=["POST"]),
                Route(COMPLETIONS, GenerationEndpoint(self, api.CompletionBody), methods=["POST"]),
                Route("/v1/models", self._list_models),
                Route("/v1/models/{name:path}", self._get_model),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics),
            ],
            redirect_slashes=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every answer goes through here: authorized, measured, and with its errors told as OpenAI does."""
        assert scope["type"] == "http"
        path: str = scope["path"]
        request_id = f"{_ID_PREFIXES.get(path, 'req')}-{uuid.uuid4().hex}"
        exchange = Exchange(receive, send, request_id)
        scope["app"], scope["exchange"] = self, exchange
        start_s = self._clock.now()
        status = CLIENT_GONE
        try:
            try:
                if path.startswith("/v1/"):
                    exchange.tenant = self._authorize(Request(scope))
                    exchange.service_class = Request(scope).headers.get(CLASS_HEADER, "")
                await self._routes(scope, receive, exchange.send)
                status = exchange.status
            except Disconnected:
                pass  # nobody is there to answer
            except asyncio.CancelledError:
                # Only a shutdown whose grace is over cancels a request, and this is the outermost frame of its task:
                # telling the client is all that is left to do.
                failure = HttpError(503, "the gateway is shutting down", "draining", headers={"retry-after": "1"})
                status = failure.status
                await exchange.send_error(failure)
            except Exception as err:  # noqa: BLE001 - the boundary: whatever happened becomes an answer
                failure = _as_http_error(first_leaf(err), request_id)
                status = failure.status
                await exchange.send_error(failure)
        finally:
            route = path if path in _ROUTES else "other"
            REQUESTS.labels(route, str(status)).inc()
            DURATION.labels(route).observe(self._clock.now() - start_s)

    async def generate(self, scope: Scope, body_type: type[api.GenerationBody]) -> None:
        exchange: Exchange = scope["exchange"]
        headers = Request(scope).headers
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        with span(f"gateway {scope['path']}", carrier, request_id=exchange.request_id):
            content = await exchange.read_body(self._config.max_body_bytes)
            if len(content) > _OFF_LOOP_BYTES:
                body = await asyncio.to_thread(_parse, body_type, content)
            else:
                body = _parse(body_type, content)
            await exchange.while_connected(self._generator.answer(body, exchange))

    def _authorize(self, request: Request) -> str:
        """The request's tenant: that of its API key, else the one it names."""
        named = request.headers.get(TENANT_HEADER, "")
        if not self._keys:
            return named
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if scheme.lower() == "bearer" else b""
        found = [tenant for known, tenant in self._keys if hmac.compare_digest(given, known)]
        if not found:
            message = "missing or unknown API key; send it as `Authorization: Bearer KEY`"
            raise HttpError(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})
        owner = found[0]
        if named and named != owner and (owner or named in self._config.tenant_keys):
            raise HttpError(403, f"this API key is not for tenant {named!r}; leave {TENANT_HEADER} out", "forbidden")
        return owner or named

    async def _list_models(self, request: Request) -> Response:
        models = await self._models.list()
        if not models:
            raise NoWorker("no model is served yet: no worker has joined the cluster", retry_after_s=1.0)
        return JSONResponse({"object": "list", "data": [self._model_card(info) for info in models]})

    async def _get_model(self, request: Request) -> Response:
        return JSONResponse(self._model_card(await self._models.info(request.path_params["name"])))

    def _model_card(self, info: ModelInfo) -> dict[str, Any]:
        return {
            "id": info.name,
            "object": "model",
            "created": self._started_unix_s,
            "owned_by": "sagellm",
            "max_model_len": info.context_length_tokens,
        }

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        """200 when the router answers and a model is served."""
        try:
            models = await self._router.models()
        except SageError as err:
            return JSONResponse({"status": "not ready", "reason": err.reason}, HTTPStatus.SERVICE_UNAVAILABLE)
        if not models:
            return JSONResponse({"status": "not ready", "reason": NoWorker.reason}, HTTPStatus.SERVICE_UNAVAILABLE)
        return JSONResponse({"status": "ready", "models": [info.name for info in models]})

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


class GenerationEndpoint:
    """The ASGI application of one generating route."""

    def __init__(self, gateway: Gateway, body_type: type[api.GenerationBody]) -> None:
        self._gateway = gateway
        self._body_type = body_type

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._gateway.generate(scope, self._body_type)


def _parse(body_type: type[api.GenerationBody], content: bytes) -> api.GenerationBody:
    try:
        return body_type.model_validate_json(content)
    except ValidationError as err:
        raise from_validation_error(err, _field_names(body_type)) from None


def _field_names(body_type: type[BaseModel]) -> frozenset[str]:
    nested = (api.ChatMessage, api.TextPart, api.StreamOptions)
    return frozenset().union(*(model.model_fields for model in (body_type, *nested)))


def _as_http_error(err: BaseException, request_id: str) -> HttpError:
    """What an exception is answered with. Of those that are not for the client only the log says more."""
    if isinstance(err, HttpError):
        return err
    if isinstance(err, HTTPException):
        hint = "see GET /v1/models and POST /v1/chat/completions" if err.status_code == 404 else "wrong method"
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(err.status_code, "error")
        return HttpError(err.status_code, f"{err.detail}; {hint}", code, headers=dict(err.headers or {}))
    if isinstance(err, SageError):
        failure = from_sage_error(err)
        if failure.status == 500:
            log.error("%s failed: %s: %s", request_id, err.reason, err.message)
        return failure
    log.error("%s failed", request_id, exc_info=err)
    return HttpError(500, f"internal error; the gateway's log has the details of {request_id}", "internal")
