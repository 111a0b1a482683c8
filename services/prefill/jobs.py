"""What the prefill service is asked for and what it answers, free of the wire."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from sagellm_common.comm_backend.handoff import Party
from sagellm_common.core.types import (
    AT_HAND,
    FinishReason,
    KvConversion,
    KvOrigins,
    KvPeer,
    KvSource,
    SamplingParams,
    TokenIds,
    TokenLogprob,
)

Announce = Callable[[KvSource], None]
"""Takes where a prompt's KV can be pulled while it is computed; on the event loop, it must not wait."""
TellToken = Callable[[tuple[int, ...], tuple[TokenLogprob, ...]], None]
"""Takes a prompt's first token and its logprobs, before its KV is pinned; as Announce."""


@dataclass(frozen=True, slots=True, eq=False)
class PrefillJob:
    """One prompt to compute. `sampling.max_new_tokens` is the request's; prefill makes the first of them.

    The receiver holds KV of the first `receiver_cached_tokens`. `announce` None: it does not pull before the answer.
    `tell_token` None: the first token is wanted with the answer only.
    `overlap` is whether the plan has it pull before, None: no plan says so; then in pieces of `segment_bytes`.
    `chunk_tokens` are computed at a time, 0: as the engine is configured. `first_token_within_s` and `needed_s` are
    EngineRequest's. `peer` is the worker in whose cache the plan says that more of the prompt is.
    """

    request_id: str
    attempt: int
    prompt: TokenIds
    sampling: SamplingParams
    timeout_s: float
    cache_salt: str = ""
    tenant: str = ""
    priority: int = 0
    trace_context: Mapping[str, str] = field(default_factory=dict)
    receiver_cached_tokens: int = 0
    announce: Announce | None = None
    tell_token: TellToken | None = None
    overlap: bool | None = None
    segment_bytes: int = 0
    chunk_tokens: int = 0
    first_token_within_s: float = math.inf
    needed_s: float = 0.0
    peer: KvPeer | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PrefillDone:
    """The first token and where the prompt's KV waits; or the finish reason, when nothing is left to decode.

    Of `compute_ms`, from submit until the token was here, `engine_ms` were the engine's own.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    source: KvSource | None = None
    cached_tokens: int = 0
    store_tokens: int = 0
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    engine_ms: float = 0.0
    store_fetch_ms: float = 0.0
    store_conversion: KvConversion | None = None
    origins: KvOrigins = AT_HAND


class Prefill(Protocol):
    """`loop.PrefillLoop` and what is wrapped around it."""

    async def prefill(self, job: PrefillJob) -> PrefillDone:
        """Raises SageError. Cancelling the call gives everything back."""

    def cancel(self, request_id: str, attempt: int, by: Party = "router") -> None:
        """Ends this attempt and older ones and unpins their blocks. A no-op for unknown ones."""
