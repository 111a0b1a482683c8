from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_PREFILL: _ClassVar[WorkerRole]
    WORKER_ROLE_DECODE: _ClassVar[WorkerRole]
    WORKER_ROLE_BOTH: _ClassVar[WorkerRole]
    WORKER_ROLE_KV_STORE: _ClassVar[WorkerRole]

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_SERVING: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]

class KvTier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_TIER_UNSPECIFIED: _ClassVar[KvTier]
    KV_TIER_DEVICE: _ClassVar[KvTier]
    KV_TIER_HOST: _ClassVar[KvTier]
    KV_TIER_DISK: _ClassVar[KvTier]
    KV_TIER_STORE: _ClassVar[KvTier]
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_PREFILL: WorkerRole
WORKER_ROLE_DECODE: WorkerRole
WORKER_ROLE_BOTH: WorkerRole
WORKER_ROLE_KV_STORE: WorkerRole
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_SERVING: WorkerState
WORKER_STATE_DRAINING: WorkerState
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_ERROR: FinishReason
KV_TIER_UNSPECIFIED: KvTier
KV_TIER_DEVICE: KvTier
KV_TIER_HOST: KvTier
KV_TIER_DISK: KvTier
KV_TIER_STORE: KvTier

class KvLayout(_message.Message):
    __slots__ = ("model_fingerprint", "dtype", "block_size_tokens", "num_layers", "num_kv_heads", "head_dim", "tp", "pp", "block_bytes")
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    PP_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    model_fingerprint: str
    dtype: str
    block_size_tokens: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    tp: int
    pp: int
    block_bytes: int
    def __init__(self, model_fingerprint: _Optional[str] = ..., dtype: _Optional[str] = ..., block_size_tokens: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., tp: _Optional[int] = ..., pp: _Optional[int] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_new_tokens", "min_new_tokens", "ignore_eos", "stop_token_ids", "num_logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    max_new_tokens: int
    min_new_tokens: int
    ignore_eos: bool
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., min_new_tokens: _Optional[int] = ..., ignore_eos: _Optional[bool] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., num_logprobs: _Optional[int] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("logprob", "top_token_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class KvWatermark(_message.Message):
    __slots__ = ("layers_ready", "tokens_ready")
    LAYERS_READY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_READY_FIELD_NUMBER: _ClassVar[int]
    layers_ready: int
    tokens_ready: int
    def __init__(self, layers_ready: _Optional[int] = ..., tokens_ready: _Optional[int] = ...) -> None: ...

class HandoffTicket(_message.Message):
    __slots__ = ("transfer_id", "epoch", "worker_id", "incarnation", "block_table", "num_cached_tokens", "expires_in_ms")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TABLE_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    worker_id: str
    incarnation: str
    block_table: bytes
    num_cached_tokens: int
    expires_in_ms: int
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., block_table: _Optional[bytes] = ..., num_cached_tokens: _Optional[int] = ..., expires_in_ms: _Optional[int] = ...) -> None: ...

class KvSource(_message.Message):
    __slots__ = ("transfer_id", "epoch", "worker_id", "incarnation", "control_address", "data_address", "backend", "block_table", "num_tokens", "watermark", "lease_expires_in_ms", "paths", "conversion", "disk_blocks")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CONTROL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DATA_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TABLE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    LEASE_EXPIRES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    CONVERSION_FIELD_NUMBER: _ClassVar[int]
    DISK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    worker_id: str
    incarnation: str
    control_address: str
    data_address: str
    backend: str
    block_table: bytes
    num_tokens: int
    watermark: KvWatermark
    lease_expires_in_ms: int
    paths: _containers.RepeatedCompositeFieldContainer[DataPath]
    conversion: KvConversion
    disk_blocks: int
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., control_address: _Optional[str] = ..., data_address: _Optional[str] = ..., backend: _Optional[str] = ..., block_table: _Optional[bytes] = ..., num_tokens: _Optional[int] = ..., watermark: _Optional[_Union[KvWatermark, _Mapping]] = ..., lease_expires_in_ms: _Optional[int] = ..., paths: _Optional[_Iterable[_Union[DataPath, _Mapping]]] = ..., conversion: _Optional[_Union[KvConversion, _Mapping]] = ..., disk_blocks: _Optional[int] = ...) -> None: ...

class KvOrigins(_message.Message):
    __slots__ = ("host_tokens", "peer_tokens", "store_disk_tokens")
    HOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PEER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORE_DISK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    host_tokens: int
    peer_tokens: int
    store_disk_tokens: int
    def __init__(self, host_tokens: _Optional[int] = ..., peer_tokens: _Optional[int] = ..., store_disk_tokens: _Optional[int] = ...) -> None: ...

class DataPath(_message.Message):
    __slots__ = ("backend", "address", "reach")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REACH_FIELD_NUMBER: _ClassVar[int]
    backend: str
    address: str
    reach: str
    def __init__(self, backend: _Optional[str] = ..., address: _Optional[str] = ..., reach: _Optional[str] = ...) -> None: ...

class LinkCost(_message.Message):
    __slots__ = ("source_id", "target_id", "backend", "latency_us", "bytes_per_s", "per_message_us", "measured_at_s", "samples")
    SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_ID_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    PER_MESSAGE_US_FIELD_NUMBER: _ClassVar[int]
    MEASURED_AT_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    source_id: str
    target_id: str
    backend: str
    latency_us: float
    bytes_per_s: float
    per_message_us: float
    measured_at_s: float
    samples: int
    def __init__(self, source_id: _Optional[str] = ..., target_id: _Optional[str] = ..., backend: _Optional[str] = ..., latency_us: _Optional[float] = ..., bytes_per_s: _Optional[float] = ..., per_message_us: _Optional[float] = ..., measured_at_s: _Optional[float] = ..., samples: _Optional[int] = ...) -> None: ...

class KvStats(_message.Message):
    __slots__ = ("total_blocks", "free_blocks", "used_blocks", "cached_blocks", "tiers")
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    total_blocks: int
    free_blocks: int
    used_blocks: int
    cached_blocks: int
    tiers: _containers.RepeatedCompositeFieldContainer[KvTierStats]
    def __init__(self, total_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., used_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[KvTierStats, _Mapping]]] = ...) -> None: ...

class KvTierStats(_message.Message):
    __slots__ = ("name", "dtype", "total_blocks", "used_blocks", "used_bytes", "hit_blocks", "stored_blocks", "evicted_blocks", "torn_blocks", "failed_blocks", "dropped_blocks", "recovered_blocks", "bytes_read", "bytes_written", "read_s", "write_s", "inexact_hit_blocks")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TORN_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FAILED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RECOVERED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    BYTES_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    READ_S_FIELD_NUMBER: _ClassVar[int]
    WRITE_S_FIELD_NUMBER: _ClassVar[int]
    INEXACT_HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    total_blocks: int
    used_blocks: int
    used_bytes: int
    hit_blocks: int
    stored_blocks: int
    evicted_blocks: int
    torn_blocks: int
    failed_blocks: int
    dropped_blocks: int
    recovered_blocks: int
    bytes_read: int
    bytes_written: int
    read_s: float
    write_s: float
    inexact_hit_blocks: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., total_blocks: _Optional[int] = ..., used_blocks: _Optional[int] = ..., used_bytes: _Optional[int] = ..., hit_blocks: _Optional[int] = ..., stored_blocks: _Optional[int] = ..., evicted_blocks: _Optional[int] = ..., torn_blocks: _Optional[int] = ..., failed_blocks: _Optional[int] = ..., dropped_blocks: _Optional[int] = ..., recovered_blocks: _Optional[int] = ..., bytes_read: _Optional[int] = ..., bytes_written: _Optional[int] = ..., read_s: _Optional[float] = ..., write_s: _Optional[float] = ..., inexact_hit_blocks: _Optional[int] = ...) -> None: ...

class KvConversion(_message.Message):
    __slots__ = ("wire_dtype", "max_abs_error", "relative_rms_error", "non_finite")
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_ABS_ERROR_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_RMS_ERROR_FIELD_NUMBER: _ClassVar[int]
    NON_FINITE_FIELD_NUMBER: _ClassVar[int]
    wire_dtype: str
    max_abs_error: float
    relative_rms_error: float
    non_finite: int
    def __init__(self, wire_dtype: _Optional[str] = ..., max_abs_error: _Optional[float] = ..., relative_rms_error: _Optional[float] = ..., non_finite: _Optional[int] = ...) -> None: ...
