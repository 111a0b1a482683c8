"""Wire messages ↔ the values of `core.types`. Every decode checks what it reads and names the field it refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import TypeVar

from sagellm_common.core.errors import InvalidRequest
from sagellm_common.core.kv import Tier
from sagellm_common.core.step_costs import StepCost
from sagellm_common.core.topology import LinkCost
from sagellm_common.core.types import (
    BLOCK_HASH_BYTES,
    BlockHash,
    BlockIds,
    DataPath,
    FinishReason,
    GenerationOutput,
    GenerationRequest,
    GenerationSummary,
    HandoffTicket,
    KvConversion,
    KvHealth,
    KvLayout,
    KvOrigins,
    KvPeer,
    KvSource,
    KvStats,
    KvTierStats,
    ModelInfo,
    SamplingParams,
    TenantUsage,
    TokenIds,
    TokenLogprob,
    WorkerRecord,
    WorkerRole,
    WorkerState,
    pack_int32,
    unpack_int32,
)
from sagellm_common.kv_policy.cost_benefit import RecomputeCost
from sagellm_common.prefix_reuse.matcher import CONTEXT_BYTES
from sagellm_common.prefix_reuse.sharding import EXTENT_BLOCKS, Extent
from sagellm_common.rpc.gen.sagellm.v1 import common_pb2, inference_pb2, kv_pb2, plan_pb2, worker_pb2

E = TypeVar("E")

_ROLES: dict[WorkerRole, common_pb2.WorkerRole] = {
    WorkerRole.PREFILL: common_pb2.WORKER_ROLE_PREFILL,
    WorkerRole.DECODE: common_pb2.WORKER_ROLE_DECODE,
    WorkerRole.BOTH: common_pb2.WORKER_ROLE_BOTH,
    WorkerRole.KV_STORE: common_pb2.WORKER_ROLE_KV_STORE,
}
_STATES: dict[WorkerState, common_pb2.WorkerState] = {
    WorkerState.SERVING: common_pb2.WORKER_STATE_SERVING,
    WorkerState.DRAINING: common_pb2.WORKER_STATE_DRAINING,
}
_FINISH_REASONS: dict[FinishReason | None, common_pb2.FinishReason] = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: common_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
}
_TIERS: dict[Tier, common_pb2.KvTier] = {
    Tier.DEVICE: common_pb2.KV_TIER_DEVICE,
    Tier.HOST: common_pb2.KV_TIER_HOST,
    Tier.DISK: common_pb2.KV_TIER_DISK,
    Tier.STORE: common_pb2.KV_TIER_STORE,
}
_ROLES_BACK: dict[int, WorkerRole] = {number: role for role, number in _ROLES.items()}
_STATES_BACK: dict[int, WorkerState] = {number: state for state, number in _STATES.items()}
_FINISH_REASONS_BACK: dict[int, FinishReason | None] = {number: reason for reason, number in _FINISH_REASONS.items()}
_TIERS_BACK: dict[int, Tier] = {number: tier for tier, number in _TIERS.items()} | {0: Tier.DEVICE}


# ---- scalars and arrays ----


def _known(table: Mapping[int, E], number: int, field: str) -> E:
    try:
        return table[number]
    except KeyError:
        known = ", ".join(str(n) for n in sorted(table))
        raise InvalidRequest(f"{field} is {number}, which is none of the known values {known}") from None


def _at_least(minimum: int, value: int, field: str) -> int:
    if value < minimum:
        raise InvalidRequest(f"{field} is {value}, but must be at least {minimum}")
    return value


def _not_empty(value: str, field: str) -> str:
    if not value:
        raise InvalidRequest(f"{field} is empty, but must be set")
    return value


def decode_token_ids(packed: bytes, field: str = "token_ids") -> TokenIds:
    """A read-only view of packed little-endian int32 values; the view keeps `packed` alive."""
    if len(packed) % 4:
        raise InvalidRequest(f"{field} has {len(packed)} bytes, which is no whole number of int32 values")
    return unpack_int32(packed)


def decode_block_ids(packed: bytes, field: str = "block_table") -> BlockIds:
    """As `decode_token_ids`, and none may be negative."""
    block_ids = decode_token_ids(packed, field)
    if block_ids.size and int(block_ids.min()) < 0:
        raise InvalidRequest(f"{field} holds the negative block id {int(block_ids.min())}")
    return block_ids


def encode_hashes(hashes: Iterable[BlockHash]) -> bytes:
    return b"".join(hashes)


def decode_hashes(packed: bytes, field: str = "block_hashes") -> list[BlockHash]:
    check_hashes(packed, field)
    return [packed[i : i + BLOCK_HASH_BYTES] for i in range(0, len(packed), BLOCK_HASH_BYTES)]


def check_hashes(packed: bytes, field: str = "block_hashes") -> bytes:
    """The hashes as they came."""
    if len(packed) % BLOCK_HASH_BYTES:
        raise InvalidRequest(f"{field} has {len(packed)} bytes, which is no whole number of 16-byte hashes")
    return packed


def encode_contexts(contexts: Sequence[bytes]) -> bytes:
    """Those of all blocks, or none: there is no way to say that one of them is not known."""
    return b"".join(contexts) if all(contexts) else b""


def decode_contexts(packed: bytes, num_blocks: int, field: str = "contexts") -> list[bytes]:
    if packed and len(packed) != num_blocks * CONTEXT_BYTES:
        raise InvalidRequest(
            f"{field} has {len(packed)} bytes, but must have {CONTEXT_BYTES} for each of {num_blocks} blocks, or none"
        )
    return [packed[i : i + CONTEXT_BYTES] for i in range(0, len(packed), CONTEXT_BYTES)]


def encode_tier(tier: Tier) -> common_pb2.KvTier:
    return _TIERS[tier]


def decode_tier(number: int, field: str = "tier") -> Tier:
    """Unspecified is the device's."""
    return _known(_TIERS_BACK, number, field)


def encode_extent(extent: Extent) -> kv_pb2.KvExtent:
    return kv_pb2.KvExtent(
        key=extent.key,
        first_block=extent.offset,
        num_blocks=extent.num_blocks,
        sequence_block=extent.first - extent.offset,
    )


def decode_extents(messages: Iterable[kv_pb2.KvExtent], num_hashes: int) -> list[Extent]:
    """Counted from the beginning of their sequence, of each by itself where that is not told. Raises InvalidRequest
    when they are not what num_hashes hashes stand for."""
    found = []
    for message in messages:
        stop = message.first_block + message.num_blocks
        if len(message.key) != BLOCK_HASH_BYTES or not 0 <= message.first_block < stop <= EXTENT_BLOCKS:
            raise InvalidRequest(
                f"extents has blocks {message.first_block} to {stop} of a key of {len(message.key)} bytes, but an "
                f"extent has {EXTENT_BLOCKS} blocks and a key of {BLOCK_HASH_BYTES} bytes"
            )
        begin = message.sequence_block
        if begin < 0 or begin % EXTENT_BLOCKS:
            raise InvalidRequest(f"extents has sequence_block {begin}, but extents begin every {EXTENT_BLOCKS} blocks")
        found.append(Extent(message.key, begin + message.first_block, begin + stop))
    total = sum(extent.num_blocks for extent in found)
    if found and total != num_hashes:
        raise InvalidRequest(f"extents has {total} blocks, but block_hashes has {num_hashes}")
    return found


def encode_worker_role(role: WorkerRole) -> common_pb2.WorkerRole:
    return _ROLES[role]


def decode_worker_role(number: int, field: str = "role") -> WorkerRole:
    return _known(_ROLES_BACK, number, field)


def encode_finish_reason(reason: FinishReason | None) -> common_pb2.FinishReason:
    """None (still generating) is UNSPECIFIED."""
    return _FINISH_REASONS[reason]


def decode_finish_reason(number: int, field: str = "finish_reason") -> FinishReason | None:
    return _known(_FINISH_REASONS_BACK, number, field)


# ---- model and worker ----


def encode_layout(layout: KvLayout) -> common_pb2.KvLayout:
    return common_pb2.KvLayout(
        model_fingerprint=layout.model_fingerprint,
        dtype=layout.dtype,
        block_size_tokens=layout.block_size_tokens,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        tp=layout.tp,
        pp=layout.pp,
        block_bytes=layout.block_bytes,
    )


def decode_layout(message: common_pb2.KvLayout, field: str = "layout") -> KvLayout:
    return KvLayout(
        model_fingerprint=_not_empty(message.model_fingerprint, f"{field}.model_fingerprint"),
        dtype=_not_empty(message.dtype, f"{field}.dtype"),
        block_size_tokens=_at_least(1, message.block_size_tokens, f"{field}.block_size_tokens"),
        num_layers=_at_least(1, message.num_layers, f"{field}.num_layers"),
        num_kv_heads=_at_least(1, message.num_kv_heads, f"{field}.num_kv_heads"),
        head_dim=_at_least(1, message.head_dim, f"{field}.head_dim"),
        tp=_at_least(1, message.tp, f"{field}.tp"),
        pp=_at_least(1, message.pp, f"{field}.pp"),
        block_bytes=_at_least(1, message.block_bytes, f"{field}.block_bytes"),
    )


def encode_model_info(model: ModelInfo) -> inference_pb2.ModelInfo:
    return inference_pb2.ModelInfo(
        name=model.name,
        path=model.path,
        context_length_tokens=model.context_length_tokens,
        kv_layout=encode_layout(model.kv_layout),
        vocab_size=model.vocab_size,
    )


def decode_model_info(message: inference_pb2.ModelInfo, field: str = "model") -> ModelInfo:
    return ModelInfo(
        name=_not_empty(message.name, f"{field}.name"),
        path=message.path,
        context_length_tokens=_at_least(1, message.context_length_tokens, f"{field}.context_length_tokens"),
        vocab_size=_at_least(1, message.vocab_size, f"{field}.vocab_size"),
        kv_layout=decode_layout(message.kv_layout, f"{field}.kv_layout"),
    )


def encode_worker_record(record: WorkerRecord) -> worker_pb2.WorkerRecord:
    return worker_pb2.WorkerRecord(
        worker_id=record.worker_id,
        role=_ROLES[record.role],
        state=_STATES[record.state],
        address=record.address,
        data_address=record.data_address,
        incarnation=record.incarnation,
        pid=record.pid,
        model=encode_model_info(record.model) if record.model else None,
        transport=record.transport,
        host_id=record.host_id,
        engine=record.engine,
        paths=encode_paths(record.paths),
    )


def decode_worker_record(message: worker_pb2.WorkerRecord, field: str = "record") -> WorkerRecord:
    return WorkerRecord(
        worker_id=_not_empty(message.worker_id, f"{field}.worker_id"),
        role=_known(_ROLES_BACK, message.role, f"{field}.role"),
        state=_known(_STATES_BACK, message.state, f"{field}.state"),
        address=_not_empty(message.address, f"{field}.address"),
        data_address=message.data_address,
        incarnation=_not_empty(message.incarnation, f"{field}.incarnation"),
        pid=_at_least(0, message.pid, f"{field}.pid"),
        model=decode_model_info(message.model, f"{field}.model") if message.HasField("model") else None,
        transport=message.transport,
        host_id=message.host_id,
        engine=message.engine,
        paths=decode_paths(message.paths, f"{field}.paths"),
    )


def encode_paths(paths: Iterable[DataPath]) -> list[common_pb2.DataPath]:
    return [common_pb2.DataPath(backend=p.backend, address=p.address, reach=p.reach) for p in paths]


def decode_paths(messages: Iterable[common_pb2.DataPath], field: str = "paths") -> tuple[DataPath, ...]:
    return tuple(
        DataPath(_not_empty(m.backend, f"{field}.backend"), _not_empty(m.address, f"{field}.address"), m.reach)
        for m in messages
    )


def encode_link(link: LinkCost) -> common_pb2.LinkCost:
    return common_pb2.LinkCost(
        source_id=link.source_id,
        target_id=link.target_id,
        backend=link.backend,
        latency_us=link.latency_s * 1e6,
        bytes_per_s=link.bytes_per_s,
        per_message_us=link.per_message_s * 1e6,
        measured_at_s=link.measured_at_s,
        samples=link.samples,
    )


def decode_link(message: common_pb2.LinkCost, field: str = "link") -> LinkCost:
    if not message.bytes_per_s > 0 or message.latency_us < 0 or message.per_message_us < 0:
        raise InvalidRequest(
            f"{field} has bytes_per_s {message.bytes_per_s}, latency_us {message.latency_us} and per_message_us "
            f"{message.per_message_us}; the first must be above 0, the others at least 0"
        )
    return LinkCost(
        source_id=_not_empty(message.source_id, f"{field}.source_id"),
        target_id=message.target_id,
        backend=message.backend,
        latency_s=message.latency_us / 1e6,
        bytes_per_s=message.bytes_per_s,
        per_message_s=message.per_message_us / 1e6,
        measured_at_s=message.measured_at_s,
        samples=message.samples,
    )


_TIER_FIELDS = [field.name for field in fields(KvTierStats)]


def encode_kv_stats(stats: KvStats) -> common_pb2.KvStats:
    return common_pb2.KvStats(
        total_blocks=stats.total_blocks,
        free_blocks=stats.free_blocks,
        used_blocks=stats.used_blocks,
        cached_blocks=stats.cached_blocks,
        tiers=[common_pb2.KvTierStats(**asdict(tier)) for tier in stats.tiers],
    )


def decode_kv_stats(message: common_pb2.KvStats, field: str = "kv") -> KvStats:
    return KvStats(
        total_blocks=_at_least(0, message.total_blocks, f"{field}.total_blocks"),
        free_blocks=_at_least(0, message.free_blocks, f"{field}.free_blocks"),
        used_blocks=_at_least(0, message.used_blocks, f"{field}.used_blocks"),
        cached_blocks=_at_least(0, message.cached_blocks, f"{field}.cached_blocks"),
        tiers=tuple(KvTierStats(**{name: getattr(tier, name) for name in _TIER_FIELDS}) for tier in message.tiers),
    )


def encode_kv_health(health: KvHealth) -> worker_pb2.KvHealth:
    fields = {f.name: getattr(health, f.name) for f in dataclasses.fields(health)}
    tenants = [worker_pb2.TenantUsage(**dataclasses.asdict(usage)) for usage in fields.pop("tenants")]
    return worker_pb2.KvHealth(tenants=tenants, **fields)


def decode_kv_health(message: worker_pb2.KvHealth) -> KvHealth:
    """For people: nothing is decided by it."""
    names = [f.name for f in dataclasses.fields(KvHealth) if f.name not in ("tenants", "problems")]
    usage = [f.name for f in dataclasses.fields(TenantUsage)]
    return KvHealth(
        problems=tuple(message.problems),
        tenants=tuple(TenantUsage(**{name: getattr(t, name) for name in usage}) for t in message.tenants),
        **{name: getattr(message, name) for name in names},
    )


def encode_step_cost(step: StepCost) -> worker_pb2.StepCost:
    return worker_pb2.StepCost(
        prompts=step.prompts,
        prompt_tokens=step.prompt_tokens,
        prompt_squares=step.prompt_squares,
        sequences=step.sequences,
        context_tokens=step.context_tokens,
        ms=step.seconds * 1e3,
        cpu_ms=step.cpu_seconds * 1e3,
    )


def decode_step_cost(message: worker_pb2.StepCost) -> StepCost:
    """Raises InvalidRequest for what no step can have been."""
    step = StepCost(
        message.ms / 1e3,
        message.prompts,
        message.prompt_tokens,
        message.prompt_squares,
        message.sequences,
        message.context_tokens,
        message.cpu_ms / 1e3,
    )
    counts = step.prompts, step.prompt_tokens, step.prompt_squares, step.sequences, step.context_tokens
    times_ok = 0 <= message.ms < math.inf and 0 <= message.cpu_ms < math.inf
    if not times_ok or min(counts) < 0 or bool(step.prompts) == bool(step.sequences):
        raise InvalidRequest(
            f"steps has {step}, but a step is of prompts or of sequences, and nothing in it is negative"
        )
    return step


# ---- handoff ----


def encode_kv_source(source: KvSource) -> common_pb2.KvSource:
    return common_pb2.KvSource(
        transfer_id=source.transfer_id,
        epoch=source.epoch,
        worker_id=source.worker_id,
        incarnation=source.incarnation,
        control_address=source.control_address,
        data_address=source.data_address,
        backend=source.backend,
        block_table=pack_int32(source.block_table),
        num_tokens=source.num_tokens,
        watermark=common_pb2.KvWatermark(layers_ready=source.layers_ready, tokens_ready=source.tokens_ready),
        lease_expires_in_ms=source.lease_expires_in_ms,
        paths=encode_paths(source.paths),
        conversion=encode_conversion(source.conversion) if source.conversion else None,
        disk_blocks=source.disk_blocks,
    )


def decode_kv_source(message: common_pb2.KvSource, field: str = "source") -> KvSource:
    return KvSource(
        transfer_id=_not_empty(message.transfer_id, f"{field}.transfer_id"),
        epoch=_at_least(0, message.epoch, f"{field}.epoch"),
        worker_id=_not_empty(message.worker_id, f"{field}.worker_id"),
        incarnation=_not_empty(message.incarnation, f"{field}.incarnation"),
        control_address=_not_empty(message.control_address, f"{field}.control_address"),
        data_address=_not_empty(message.data_address, f"{field}.data_address"),
        backend=_not_empty(message.backend, f"{field}.backend"),
        block_table=decode_block_ids(message.block_table, f"{field}.block_table"),
        num_tokens=_at_least(0, message.num_tokens, f"{field}.num_tokens"),
        layers_ready=_at_least(0, message.watermark.layers_ready, f"{field}.watermark.layers_ready"),
        tokens_ready=_at_least(0, message.watermark.tokens_ready, f"{field}.watermark.tokens_ready"),
        lease_expires_in_ms=message.lease_expires_in_ms,
        paths=decode_paths(message.paths, f"{field}.paths"),
        conversion=decode_conversion(message.conversion) if message.HasField("conversion") else None,
        disk_blocks=_at_least(0, message.disk_blocks, f"{field}.disk_blocks"),
    )


def encode_peer(peer: KvPeer) -> worker_pb2.KvPeer:
    return worker_pb2.KvPeer(
        worker_id=peer.worker_id,
        incarnation=peer.incarnation,
        control_address=peer.control_address,
        cached_tokens=peer.cached_tokens,
    )


def decode_peer(message: worker_pb2.KvPeer, field: str = "peer") -> KvPeer:
    return KvPeer(
        worker_id=_not_empty(message.worker_id, f"{field}.worker_id"),
        incarnation=_not_empty(message.incarnation, f"{field}.incarnation"),
        control_address=_not_empty(message.control_address, f"{field}.control_address"),
        cached_tokens=_at_least(0, message.cached_tokens, f"{field}.cached_tokens"),
    )


def encode_recompute_cost(cost: RecomputeCost) -> kv_pb2.KvRecomputeCost:
    return kv_pb2.KvRecomputeCost(token_s=cost.token_s, attention_s=cost.attention_s)


def decode_recompute_cost(message: kv_pb2.KvRecomputeCost, field: str = "recompute_cost") -> RecomputeCost:
    for name, value in (("token_s", message.token_s), ("attention_s", message.attention_s)):
        if not 0 <= value < math.inf:
            raise InvalidRequest(f"{field}.{name} is {value}, but must be finite and at least 0")
    return RecomputeCost(message.token_s, message.attention_s)


def encode_ticket(ticket: HandoffTicket) -> common_pb2.HandoffTicket:
    return common_pb2.HandoffTicket(
        transfer_id=ticket.transfer_id,
        epoch=ticket.epoch,
        worker_id=ticket.worker_id,
        incarnation=ticket.incarnation,
        block_table=pack_int32(ticket.block_table),
        num_cached_tokens=ticket.num_cached_tokens,
        expires_in_ms=ticket.expires_in_ms,
    )


def decode_ticket(message: common_pb2.HandoffTicket, field: str = "ticket") -> HandoffTicket:
    return HandoffTicket(
        transfer_id=_not_empty(message.transfer_id, f"{field}.transfer_id"),
        epoch=_at_least(0, message.epoch, f"{field}.epoch"),
        worker_id=_not_empty(message.worker_id, f"{field}.worker_id"),
        incarnation=_not_empty(message.incarnation, f"{field}.incarnation"),
        block_table=decode_block_ids(message.block_table, f"{field}.block_table"),
        num_cached_tokens=_at_least(0, message.num_cached_tokens, f"{field}.num_cached_tokens"),
        expires_in_ms=message.expires_in_ms,
    )


# ---- generation ----


def encode_sampling(sampling: SamplingParams) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=sampling.stop_token_ids,
        num_logprobs=sampling.num_logprobs,
    )


def decode_sampling(message: common_pb2.SamplingParams) -> SamplingParams:
    """As sent, values unchecked (`core.validation` checks them once, at admission).

    proto3 cannot tell 0 from unset: for top_p and repetition_penalty, where 0 means nothing, it is the default.
    """
    return SamplingParams(
        max_new_tokens=message.max_new_tokens,
        temperature=message.temperature,
        top_p=message.top_p or 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty or 1.0,
        seed=message.seed if message.HasField("seed") else None,
        min_new_tokens=message.min_new_tokens,
        ignore_eos=message.ignore_eos,
        stop_token_ids=tuple(message.stop_token_ids),
        num_logprobs=message.num_logprobs,
    )


def encode_logprobs(logprobs: Sequence[TokenLogprob]) -> list[common_pb2.TokenLogprobs]:
    return [
        common_pb2.TokenLogprobs(logprob=lp.logprob, top_token_ids=lp.top_token_ids, top_logprobs=lp.top_logprobs)
        for lp in logprobs
    ]


def decode_logprobs(messages: Iterable[common_pb2.TokenLogprobs], field: str = "logprobs") -> tuple[TokenLogprob, ...]:
    decoded = []
    for lp in messages:
        if len(lp.top_token_ids) != len(lp.top_logprobs):
            raise InvalidRequest(
                f"{field} has {len(lp.top_token_ids)} top_token_ids, but {len(lp.top_logprobs)} top_logprobs"
            )
        decoded.append(TokenLogprob(lp.logprob, tuple(lp.top_token_ids), tuple(lp.top_logprobs)))
    return tuple(decoded)


def encode_conversion(conversion: KvConversion) -> common_pb2.KvConversion:
    return common_pb2.KvConversion(
        wire_dtype=conversion.wire_dtype,
        max_abs_error=conversion.max_abs_error,
        relative_rms_error=conversion.relative_rms_error,
        non_finite=conversion.non_finite,
    )


def decode_conversion(message: common_pb2.KvConversion) -> KvConversion:
    return KvConversion(message.wire_dtype, message.max_abs_error, message.relative_rms_error, message.non_finite)


def encode_origins(origins: KvOrigins) -> common_pb2.KvOrigins:
    return common_pb2.KvOrigins(
        host_tokens=origins.host_tokens,
        peer_tokens=origins.peer_tokens,
        store_disk_tokens=origins.store_disk_tokens,
    )


def decode_origins(message: common_pb2.KvOrigins) -> KvOrigins:
    return KvOrigins(message.host_tokens, message.peer_tokens, message.store_disk_tokens)


def encode_summary(
    summary: GenerationSummary, plan: plan_pb2.ExecutionPlan | None = None
) -> inference_pb2.GenerationSummary:
    return inference_pb2.GenerationSummary(
        prompt_tokens=summary.prompt_tokens,
        completion_tokens=summary.completion_tokens,
        cached_tokens=summary.cached_tokens,
        store_tokens=summary.store_tokens,
        prefill_worker_id=summary.prefill_worker_id,
        decode_worker_id=summary.decode_worker_id,
        kv_bytes_transferred=summary.kv_bytes_transferred,
        transport=summary.transport,
        queue_ms=summary.queue_ms,
        reserve_ms=summary.reserve_ms,
        prefill_ms=summary.prefill_ms,
        transfer_ms=summary.transfer_ms,
        ttft_ms=summary.ttft_ms,
        tpot_ms=summary.tpot_ms,
        attempts=summary.attempts,
        prefill_compute_ms=summary.prefill_compute_ms,
        store_fetch_ms=summary.store_fetch_ms,
        kv_bytes_ahead=summary.kv_bytes_ahead,
        transfer_exposed_ms=summary.transfer_exposed_ms,
        kv_conversion=encode_conversion(summary.kv_conversion) if summary.kv_conversion else None,
        store_conversion=encode_conversion(summary.store_conversion) if summary.store_conversion else None,
        prefill_engine_ms=summary.prefill_engine_ms,
        decode_engine_ms=summary.decode_engine_ms,
        decode_cached_tokens=summary.decode_cached_tokens,
        origins=encode_origins(summary.origins),
        plan=plan,
    )


def decode_summary(message: inference_pb2.GenerationSummary) -> GenerationSummary:
    """Without the plan, which is a value of its own."""
    return GenerationSummary(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
        store_tokens=message.store_tokens,
        prefill_worker_id=message.prefill_worker_id,
        decode_worker_id=message.decode_worker_id,
        kv_bytes_transferred=message.kv_bytes_transferred,
        transport=message.transport,
        queue_ms=message.queue_ms,
        reserve_ms=message.reserve_ms,
        prefill_ms=message.prefill_ms,
        transfer_ms=message.transfer_ms,
        ttft_ms=message.ttft_ms,
        tpot_ms=message.tpot_ms,
        attempts=message.attempts,
        prefill_compute_ms=message.prefill_compute_ms,
        store_fetch_ms=message.store_fetch_ms,
        kv_bytes_ahead=message.kv_bytes_ahead,
        transfer_exposed_ms=message.transfer_exposed_ms,
        kv_conversion=decode_conversion(message.kv_conversion) if message.HasField("kv_conversion") else None,
        store_conversion=decode_conversion(message.store_conversion) if message.HasField("store_conversion") else None,
        prefill_engine_ms=message.prefill_engine_ms,
        decode_engine_ms=message.decode_engine_ms,
        decode_cached_tokens=message.decode_cached_tokens,
        origins=decode_origins(message.origins),
    )


def encode_generation_request(
    request: GenerationRequest, timeout_ms: int = 0, trace_context: Mapping[str, str] | None = None
) -> inference_pb2.GenerateRequest:
    """For a plain call, whose deadline and metadata say how long it may take and whose trace it is part of, without
    `timeout_ms` and `trace_context`."""
    return inference_pb2.GenerateRequest(
        request_id=request.request_id,
        model=request.model,
        prompt_token_ids=pack_int32(request.prompt_token_ids),
        sampling=encode_sampling(request.sampling),
        tenant=request.tenant,
        priority=request.priority,
        cache_salt=request.cache_salt,
        service_class=request.service_class,
        timeout_ms=timeout_ms,
        trace_context=trace_context,
    )


def decode_generation_request(
    message: inference_pb2.GenerateRequest, trace_context: Mapping[str, str] | None = None
) -> GenerationRequest:
    return GenerationRequest(
        request_id=message.request_id,
        model=message.model,
        prompt_token_ids=decode_token_ids(message.prompt_token_ids, "prompt_token_ids"),
        sampling=decode_sampling(message.sampling),
        tenant=message.tenant or "default",
        priority=message.priority,
        cache_salt=message.cache_salt,
        service_class=message.service_class,
        trace_context=dict(trace_context or {}),
    )


def encode_output(
    output: GenerationOutput, plan: plan_pb2.ExecutionPlan | None = None
) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        request_id=output.request_id,
        index=output.index,
        token_ids=pack_int32(output.token_ids),
        logprobs=encode_logprobs(output.logprobs),
        finish_reason=_FINISH_REASONS[output.finish_reason],
        summary=encode_summary(output.summary, plan) if output.summary else None,
    )


def decode_output(message: inference_pb2.GenerateResponse) -> GenerationOutput:
    return GenerationOutput(
        request_id=message.request_id,
        index=_at_least(0, message.index, "index"),
        token_ids=tuple(decode_token_ids(message.token_ids).tolist()),
        logprobs=decode_logprobs(message.logprobs),
        finish_reason=decode_finish_reason(message.finish_reason),
        summary=decode_summary(message.summary) if message.HasField("summary") else None,
    )
