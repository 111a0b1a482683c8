"""The values every part speaks in. Frozen; token ids are little-endian int32 arrays."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]
BlockIds = NDArray[np.int32]
BlockHash = bytes
"""16 bytes, chained over a block's parent; see `prefix_reuse.hashing`."""

BLOCK_HASH_BYTES = 16


def as_token_ids(tokens: Sequence[int] | TokenIds) -> TokenIds:
    """An int32 array of `tokens`, copied only when needed."""
    return np.ascontiguousarray(tokens, dtype="<i4")


def pack_int32(values: Sequence[int] | NDArray[np.int32]) -> bytes:
    """Values as they travel on the wire."""
    return np.ascontiguousarray(values, dtype="<i4").tobytes()


def unpack_int32(packed: bytes) -> NDArray[np.int32]:
    """A read-only view of packed int32 values. Raises ValueError when the length is not a multiple of 4."""
    return np.frombuffer(packed, dtype="<i4")


class WorkerRole(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"
    KV_STORE = "kv_store"

    def covers(self, work: WorkerRole) -> bool:
        """Whether a worker of this role does that kind of work."""
        return work is self or (self is WorkerRole.BOTH and work in (WorkerRole.PREFILL, WorkerRole.DECODE))


class WorkerState(enum.StrEnum):
    SERVING = "serving"
    DRAINING = "draining"


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class KvLayout:
    """What two sides must agree on before a KV block may move between them."""

    model_fingerprint: str
    dtype: str
    block_size_tokens: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_bytes: int
    tp: int = 1
    pp: int = 1

    def differences(self, other: KvLayout) -> dict[str, tuple[object, object]]:
        """Fields on which the two differ, as {name: (mine, theirs)}."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: (mine, theirs) for name, (mine, theirs) in pairs.items() if mine != theirs}


LOWEST_TEMPERATURE = 1e-5
"""Logits divided by less are beyond float32. Below it is greedy, which is where it tends to."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. temperature 0 (or next to it) is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_new_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature < LOWEST_TEMPERATURE


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one emitted token and of the best alternatives, best first."""

    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    name: str
    path: str
    context_length_tokens: int
    vocab_size: int
    kv_layout: KvLayout


@dataclass(frozen=True, slots=True)
class DataPath:
    """One of the byte paths that lead to a worker's KV.

    Where `reach` is set, only peers that say the same of their own path get there: one host, one fabric.
    """

    backend: str
    address: str
    reach: str = ""


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """What a worker says of itself in the topology. `incarnation` is new at each start, `engine` for people.

    `paths` are all of its byte paths, `transport` and `data_address` the one for peers that know of no others.
    """

    worker_id: str
    role: WorkerRole
    address: str
    data_address: str
    incarnation: str
    pid: int
    model: ModelInfo | None = None
    transport: str = "tcp"
    host_id: str = ""
    engine: str = ""
    state: WorkerState = WorkerState.SERVING
    paths: tuple[DataPath, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """One incarnation of a worker and where its gRPC server is (host:port)."""

    worker_id: str
    incarnation: str
    address: str


@dataclass(frozen=True, slots=True)
class KvTierStats:
    """Blocks and bytes of a tier, and what became of them since the process began.

    `torn` were dropped because their bytes are not those that were written, `failed` could not be read or written,
    `dropped` left the tier above before they were written here.
    """

    name: str
    dtype: str = ""
    total_blocks: int = 0
    used_blocks: int = 0
    used_bytes: int = 0
    hit_blocks: int = 0
    inexact_hit_blocks: int = 0
    """Of these, the ones that had been kept in another dtype."""
    stored_blocks: int = 0
    evicted_blocks: int = 0
    torn_blocks: int = 0
    failed_blocks: int = 0
    dropped_blocks: int = 0
    recovered_blocks: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    read_s: float = 0.0
    write_s: float = 0.0


@dataclass(frozen=True, slots=True)
class KvStats:
    """Counted independently of each other: `total == free + used + cached` is the idle self-check.

    `tiers` are those that a pool has beside or below it, the fastest first.
    """

    total_blocks: int
    free_blocks: int
    used_blocks: int
    cached_blocks: int
    tiers: tuple[KvTierStats, ...] = ()

    @property
    def balanced(self) -> bool:
        return self.total_blocks == self.free_blocks + self.used_blocks + self.cached_blocks


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """One tenant's blocks in one pool; `borrowed_blocks` of the charged ones are beyond its guarantee."""

    tenant: str
    charged_blocks: int
    borrowed_blocks: int
    guaranteed_blocks: int
    limit_blocks: int
    rejections: int


@dataclass(frozen=True, slots=True)
class KvHealth:
    """What a worker's checks of its pool have found since it started; `problems` and fragmentation are of the last one.

    See `kv_runtime.integrity` and `KvFragmentation`.
    """

    checks: int = 0
    failed_checks: int = 0
    problems: tuple[str, ...] = ()
    sampled_blocks: int = 0
    corrupt_blocks: int = 0
    internal_fragmentation: float = 0.0
    external_fragmentation: float = 0.0
    moved_blocks: int = 0
    tenants: tuple[TenantUsage, ...] = ()
    rejected_hits: int = 0
    """Blocks that were found by name and were not those asked for (`prefix_reuse.matcher`)."""
    lifetime_skill: float = 0.0
    """1: eviction knows whether a block is used again, 0: it knows the average, or does not foretell it."""


@dataclass(frozen=True, slots=True)
class KvSource:
    """Where pinned KV blocks can be pulled from, under a lease of the source. `paths` as in `WorkerRecord`.

    `conversion` is what the blocks have lost where they were kept, None for nothing.
    """

    transfer_id: str
    epoch: int
    worker_id: str
    incarnation: str
    control_address: str
    data_address: str
    backend: str
    block_table: BlockIds
    num_tokens: int
    lease_expires_in_ms: int
    layers_ready: int = 0
    tokens_ready: int = 0
    paths: tuple[DataPath, ...] = ()
    conversion: KvConversion | None = None
    disk_blocks: int = 0
    """Of the blocks, those that were read from a disk to be pinned."""


@dataclass(frozen=True, slots=True)
class KvPeer:
    """A worker that is said to hold KV of a prompt's first `cached_tokens` in its cache."""

    worker_id: str
    incarnation: str
    control_address: str
    cached_tokens: int

    @property
    def address(self) -> WorkerAddress:
        return WorkerAddress(self.worker_id, self.incarnation, self.control_address)


@dataclass(frozen=True, slots=True)
class KvOrigins:
    """Of a prompt's cached tokens, those that did not lie in the KV memory of the worker that completed it.

    `host_tokens` came back from host memory below it, `peer_tokens` from another worker's cache. `store_disk_tokens`
    are those of the kv_stores' that had to be read from a disk.
    """

    host_tokens: int = 0
    peer_tokens: int = 0
    store_disk_tokens: int = 0

    def of(self, prompt_tokens: int, cached_tokens: int, store_tokens: int) -> tuple[int, int, int, int, int, int]:
        """(computed, in its own cache, from host memory, from another worker, from the stores' memory, from their
        disks): each token of the prompt once."""
        host, peer, disk = self.host_tokens, self.peer_tokens, self.store_disk_tokens
        own = cached_tokens - store_tokens - host - peer
        return prompt_tokens - cached_tokens, own, host, peer, store_tokens - disk, disk


AT_HAND = KvOrigins()


@dataclass(frozen=True, slots=True)
class KvConversion:
    """What KV lost when its dtype was changed on its way from one pool to another.

    The errors are by how much what arrived differs from what was there: at most anywhere, and √(Σ error² / Σ value²).
    Where both sides converted they are bounds. `non_finite` values were inf or NaN before or after; in no error.
    """

    wire_dtype: str
    max_abs_error: float = 0.0
    relative_rms_error: float = 0.0
    non_finite: int = 0

    def beside(self, other: KvConversion | None) -> KvConversion:
        """Of other values, too: a bound for all of them."""
        if other is None or other == self:
            return self
        dtypes = {*self.wire_dtype.split(", "), *other.wire_dtype.split(", ")}
        return KvConversion(
            ", ".join(sorted(dtypes)),
            max(self.max_abs_error, other.max_abs_error),
            max(self.relative_rms_error, other.relative_rms_error),
            self.non_finite + other.non_finite,
        )

    def said(self, how: str) -> str:
        """For people; `how` KV was in `wire_dtype`."""
        error = f"off by {self.relative_rms_error:.2g} of its RMS and {self.max_abs_error:.2g} at most"
        said = f"{how} as {self.wire_dtype}, {error if self.max_abs_error else 'nothing lost'}"
        return said + (f"; {self.non_finite} values are inf or NaN" if self.non_finite else "")

    def __str__(self) -> str:
        return self.said("crossed")


@dataclass(frozen=True, slots=True)
class HandoffTicket:
    """Given by the receiver once it has reserved the memory it will write."""

    transfer_id: str
    epoch: int
    worker_id: str
    incarnation: str
    block_table: BlockIds
    num_cached_tokens: int
    expires_in_ms: int


@dataclass(frozen=True, slots=True)
class GenerationSummary:
    """What happened to one request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    store_tokens: int = 0
    prefill_worker_id: str = ""
    decode_worker_id: str = ""
    kv_bytes_transferred: int = 0
    transport: str = ""
    queue_ms: float = 0.0
    reserve_ms: float = 0.0
    prefill_ms: float = 0.0
    prefill_compute_ms: float = 0.0
    store_fetch_ms: float = 0.0
    transfer_ms: float = 0.0
    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    attempts: int = 1
    kv_bytes_ahead: int = 0
    transfer_exposed_ms: float = 0.0
    kv_conversion: KvConversion | None = None
    prefill_engine_ms: float = 0.0
    decode_engine_ms: float = 0.0
    decode_cached_tokens: int = 0
    store_conversion: KvConversion | None = None
    """What the prompt's blocks had lost in the kv_store."""
    origins: KvOrigins = AT_HAND

    @property
    def kv_origins(self) -> dict[str, int]:
        """Where the worker that completed the prompt had the KV of its tokens from; each token once.

        That worker is prefill, or decode where no prefill worker took part. What decode held before is
        `decode_cached_tokens`, and did not have to be moved to it.
        """
        own = "prefill_cache" if self.prefill_worker_id else "decode_cache"
        names = "computed", own, "host", "peer", "store", "store_disk"
        counts = self.origins.of(self.prompt_tokens, self.cached_tokens, self.store_tokens)
        return dict(zip(names, counts, strict=True))


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """Tokens `index, index + 1, …` of one generation; the last output carries finish_reason and summary."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    summary: GenerationSummary | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation, as the router sees it."""

    request_id: str
    model: str
    prompt_token_ids: TokenIds
    sampling: SamplingParams
    tenant: str = "default"
    priority: int = 0
    cache_salt: str = ""
    trace_context: dict[str, str] = field(default_factory=dict)
    service_class: str = ""
