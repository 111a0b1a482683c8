"""What the decode service is asked for and what it answers, free of the wire."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol, Self

from sagellm_common.comm_backend.handoff import Party
from sagellm_common.comm_backend.protocol import TransferResult
from sagellm_common.core.types import (
    AT_HAND,
    FinishReason,
    GenerationRequest,
    HandoffTicket,
    KvConversion,
    KvOrigins,
    KvPeer,
    KvSource,
    SamplingParams,
    TokenIds,
    TokenLogprob,
    WorkerAddress,
    as_token_ids,
)
from sagellm_common.rpc.sessions import RemotePrefill


@dataclass(frozen=True, slots=True, eq=False)
class ReserveJob:
    """Memory for one prompt's KV, wanted before anybody computes it; and for that of what was `emitted` elsewhere."""

    request_id: str
    attempt: int
    prompt: TokenIds
    emitted: TokenIds = field(default_factory=lambda: as_token_ids(()))
    cache_salt: str = ""
    tenant: str = ""
    trace_context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class DecodeJob:
    """One generation to go on with after `emitted`. `source` None: the prompt is computed here, as far as neither this
    worker nor a kv_store has its KV.

    `sampling.max_new_tokens` counts the emitted tokens too. KV crosses in the plan's `wire_dtype`; "": as configured.
    What is computed here is by `chunk_tokens`, 0: as the engine is configured, and those who decode go in between.
    """

    request_id: str
    attempt: int
    prompt: TokenIds
    emitted: TokenIds
    sampling: SamplingParams
    timeout_s: float
    source: KvSource | None = None
    cache_salt: str = ""
    tenant: str = ""
    priority: int = 0
    wire_dtype: str = ""
    chunk_tokens: int = 0
    trace_context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class PullAheadJob:
    """Reserved blocks to fill from `source` while it computes them."""

    request_id: str
    attempt: int
    source: KvSource
    timeout_s: float
    priority: int = 0
    wire_dtype: str = ""
    trace_context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class RoutedJob:
    """A whole generation, brought by its client with a router's route. `prefill` None: it is computed here, too, as far
    as `source`, a decode worker that has left it, does not have its KV.

    What the prefill worker is asked for is the plan's: `overlap`, `segment_bytes` and `wire_dtype` of the transfer,
    `chunk_tokens` and `prefill_priority` of the prefill, `peer` of a fetch before it. `first_token_within_s` and
    `needed_s` are EngineRequest's.
    """

    request: GenerationRequest
    attempt: int
    emitted: TokenIds
    timeout_s: float
    prefill: WorkerAddress | None = None
    source: KvSource | None = None
    priority: int = 0
    prefill_priority: int = 0
    chunk_tokens: int = 0
    overlap: bool | None = None
    segment_bytes: int = 0
    wire_dtype: str = ""
    first_token_within_s: float = math.inf
    needed_s: float = 0.0
    peer: KvPeer | None = None


@dataclass(frozen=True, slots=True)
class Transfer:
    """What was moved for one Decode call. `blocks_reused` were here already.

    `transfer_ms` is the time in which bytes moved, `exposed_ms` that from the call until all of them were here. The
    pull began `began_ahead_ms` before the call and had brought `bytes_ahead` by then. `conversion` None:
    dtypes were kept. `why` is why over this `backend`.
    """

    bytes: int
    transfer_ms: float
    blocks: int
    blocks_reused: int
    backend: str
    bytes_ahead: int = 0
    exposed_ms: float = 0.0
    began_ahead_ms: float = 0.0
    conversion: KvConversion | None = None
    why: str = ""

    @classmethod
    def of(cls, result: TransferResult, blocks_reused: int, backend: str) -> Self:
        return cls(
            bytes=result.bytes,
            transfer_ms=result.seconds * 1e3,
            blocks=result.blocks,
            blocks_reused=blocks_reused,
            backend=result.backend or backend,
            conversion=result.conversion,
            why=result.why,
        )

    def attributes(self) -> dict[str, int | float | str]:
        """For a span."""
        found = asdict(self)
        conversion = found.pop("conversion") or {}
        return {**found, **conversion}


@dataclass(frozen=True, slots=True)
class PromptKv:
    """What was there of the KV of a prompt that no other worker has computed; `store_tokens` are among the cached."""

    cached_tokens: int
    store_tokens: int = 0
    store_fetch_ms: float = 0.0
    store_conversion: KvConversion | None = None
    origins: KvOrigins = AT_HAND


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The generation goes on elsewhere: where its KV waits to be pulled; None: it must be computed anew."""

    source: KvSource | None


@dataclass(slots=True, eq=False)
class DecodeChunk:
    """Tokens `index, index + 1, …` of one generation, as one engine step gave them.

    `engine_ms`, of the last one: what the engine took for all of them. `handed_over`: it is the last one here.
    `prefilled`: another worker's, that was asked from here.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    transfer: Transfer | None = None
    prompt_kv: PromptKv | None = None
    engine_ms: float = 0.0
    handed_over: HandedOver | None = None
    prefilled: RemotePrefill | None = None


Emit = Callable[[DecodeChunk], None]
"""Takes a chunk on the event loop, within the engine's step: it must not wait."""


class Decode(Protocol):
    """`loop.DecodeLoop` and what is wrapped around it."""

    def reserve(self, job: ReserveJob) -> HandoffTicket:
        """Takes blocks under a lease. Raises SageError."""

    def release(self, request_id: str, attempt: int, by: Party = "router") -> None:
        """Gives reserved blocks back and ends a pull into them; running requests are left alone. A no-op for unknown
        ones."""

    def pull_ahead(self, job: PullAheadJob) -> None:
        """Begins to fill the reserved blocks. Raises nothing: the Decode call that follows tells how it went."""

    def renew(self, request_id: str, attempt: int) -> float:
        """Starts a reservation's time anew; returns the seconds it now has. Raises LeaseExpired."""

    async def decode(self, job: DecodeJob, emit: Emit) -> None:
        """Emits every chunk up to the one with finish_reason STOP or LENGTH, or `handed_over`, then returns.

        Raises SageError; then nothing is emitted any more. Cancelling the call gives everything back.
        """

    def hand_over(self, request_id: str, attempt: int) -> None:
        """Ends this attempt after the engine's step, with its KV pinned. A no-op for unknown ones."""

    def cancel(self, request_id: str, attempt: int, by: Party = "router") -> None:
        """Ends this attempt and older ones with Cancelled, reservations included. A no-op for unknown ones."""
