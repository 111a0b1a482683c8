"""Errors as OpenAI's clients know them: an HTTP status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from sagellm_common.core.errors import ContextTooLong, SageError, UnknownModel

CLIENT_GONE = 499
"""Nobody reads this status: the client disconnected. It is for the metrics."""

_STATUS = {
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": CLIENT_GONE,
    "UNAVAILABLE": 503,
    "ABORTED": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""gRPC code → HTTP status; anything else is 500."""

_DEFAULT_RETRY_AFTER_S = 1.0
_MAX_SHOWN_CHARS = 100


@dataclass
class HttpError(Exception):
    """What a failed request is answered with."""

    status: int
    message: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def from_sage_error(err: SageError) -> HttpError:
    """A server-side failure keeps its reason, but not its text, which may speak of the cluster's inside."""
    status = _STATUS.get(err.code, 500)
    headers = {}
    if status in (429, 503):
        headers["retry-after"] = str(math.ceil(err.retry_after_s or _DEFAULT_RETRY_AFTER_S))
    if status == 500:
        return HttpError(500, "internal error; the service's log has the details", err.reason.lower())
    code, param = err.reason.lower(), None
    if isinstance(err, ContextTooLong):
        code = "context_length_exceeded"
    if isinstance(err, UnknownModel):
        code, param = "model_not_found", "model"
    if status == 400:
        # Messages of ours begin with the field they are about.
        name, colon, _ = err.message.partition(":")
        param = err.metadata.get("field") or (name if colon and name.isidentifier() else None)
    return HttpError(status, err.message, code, param, headers)


def from_validation_error(err: ValidationError, field_names: frozenset[str]) -> HttpError:
    """Names the first field at fault and what it should be.

    Of a union pydantic tells what is wrong with each member. The error that lies deepest belongs to the member the
    client meant; several as deep are joined by "or".
    """
    errors = err.errors(include_url=False, include_context=False)
    first = errors[0]
    if first["type"] == "json_invalid":
        return HttpError(400, f"the body is not valid JSON: {first['msg']}", "invalid_json")
    paths = [
        _path(e["loc"], field_names | ({str(e["loc"][-1])} if e["type"] == "extra_forbidden" else set()))
        for e in errors
    ]
    same_field = [(p, e) for p, e in zip(paths, errors, strict=True) if e["loc"][:1] == first["loc"][:1]]
    depth = max(_depth(p) for p, _ in same_field)
    param, chosen = next((p, e) for p, e in same_field if _depth(p) == depth)
    if chosen["type"] == "extra_forbidden":
        return HttpError(400, f"{param}: unknown field; remove it", "unknown_parameter", param)
    if not param:
        # A rule about several fields: its text begins with the one to change.
        param = chosen["msg"].partition(":")[0]
        message = chosen["msg"]
    else:
        reasons = dict.fromkeys(f"{p}: {e['msg']}" for p, e in same_field if _depth(p) == depth)
        message = " or ".join(reasons)
    if chosen["type"] == "unsupported_parameter":
        return HttpError(400, message, "unsupported_parameter", param)
    got = f" (got {_shown(chosen['input'])})" if chosen["loc"] and chosen["type"] != "missing" else ""
    return HttpError(400, message + got, "invalid_value", param)


def _depth(path: str) -> int:
    return path.count("[") + path.count(".")


def _path(loc: tuple[int | str, ...], field_names: frozenset[str]) -> str:
    """`messages[0].role`. pydantic also names the union member it tried: those are no fields and left out."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in field_names:
            path += f".{part}" if path else part
    return path


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…"
