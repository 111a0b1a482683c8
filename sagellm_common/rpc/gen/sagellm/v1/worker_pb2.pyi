from google.rpc import status_pb2 as _status_pb2
from sagellm_common.rpc.gen.sagellm.v1 import common_pb2 as _common_pb2
from sagellm_common.rpc.gen.sagellm.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HandoffSide(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HANDOFF_SIDE_UNSPECIFIED: _ClassVar[HandoffSide]
    HANDOFF_SIDE_SOURCE: _ClassVar[HandoffSide]
    HANDOFF_SIDE_TARGET: _ClassVar[HandoffSide]

class HandoffState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HANDOFF_STATE_UNSPECIFIED: _ClassVar[HandoffState]
    HANDOFF_STATE_RUNNING: _ClassVar[HandoffState]
    HANDOFF_STATE_DONE: _ClassVar[HandoffState]
    HANDOFF_STATE_FAILED: _ClassVar[HandoffState]
    HANDOFF_STATE_CANCELLED: _ClassVar[HandoffState]

class HandoffReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HANDOFF_REASON_UNSPECIFIED: _ClassVar[HandoffReason]
    HANDOFF_REASON_CONNECT_REFUSED: _ClassVar[HandoffReason]
    HANDOFF_REASON_HANDSHAKE_REFUSED: _ClassVar[HandoffReason]
    HANDOFF_REASON_LAYOUT_MISMATCH: _ClassVar[HandoffReason]
    HANDOFF_REASON_LEASE_EXPIRED: _ClassVar[HandoffReason]
    HANDOFF_REASON_EPOCH_FENCED: _ClassVar[HandoffReason]
    HANDOFF_REASON_PEER_RESTARTED: _ClassVar[HandoffReason]
    HANDOFF_REASON_PEER_LOST_BEFORE_FIRST_BYTE: _ClassVar[HandoffReason]
    HANDOFF_REASON_PEER_LOST_AFTER_FIRST_BYTE: _ClassVar[HandoffReason]
    HANDOFF_REASON_STALLED: _ClassVar[HandoffReason]
    HANDOFF_REASON_DEADLINE: _ClassVar[HandoffReason]
    HANDOFF_REASON_DIGEST_MISMATCH: _ClassVar[HandoffReason]
    HANDOFF_REASON_CANCELLED_BY_ROUTER: _ClassVar[HandoffReason]
    HANDOFF_REASON_CANCELLED_BY_PREFILL: _ClassVar[HandoffReason]
    HANDOFF_REASON_CANCELLED_BY_DECODE: _ClassVar[HandoffReason]
    HANDOFF_REASON_KV_EXHAUSTED: _ClassVar[HandoffReason]
    HANDOFF_REASON_DRAINING: _ClassVar[HandoffReason]
    HANDOFF_REASON_ENGINE_FAILED: _ClassVar[HandoffReason]
    HANDOFF_REASON_INVALID_REQUEST: _ClassVar[HandoffReason]
    HANDOFF_REASON_INTERNAL: _ClassVar[HandoffReason]
    HANDOFF_REASON_QUEUE_FULL: _ClassVar[HandoffReason]
    HANDOFF_REASON_CANCELLED_BY_CLIENT: _ClassVar[HandoffReason]
HANDOFF_SIDE_UNSPECIFIED: HandoffSide
HANDOFF_SIDE_SOURCE: HandoffSide
HANDOFF_SIDE_TARGET: HandoffSide
HANDOFF_STATE_UNSPECIFIED: HandoffState
HANDOFF_STATE_RUNNING: HandoffState
HANDOFF_STATE_DONE: HandoffState
HANDOFF_STATE_FAILED: HandoffState
HANDOFF_STATE_CANCELLED: HandoffState
HANDOFF_REASON_UNSPECIFIED: HandoffReason
HANDOFF_REASON_CONNECT_REFUSED: HandoffReason
HANDOFF_REASON_HANDSHAKE_REFUSED: HandoffReason
HANDOFF_REASON_LAYOUT_MISMATCH: HandoffReason
HANDOFF_REASON_LEASE_EXPIRED: HandoffReason
HANDOFF_REASON_EPOCH_FENCED: HandoffReason
HANDOFF_REASON_PEER_RESTARTED: HandoffReason
HANDOFF_REASON_PEER_LOST_BEFORE_FIRST_BYTE: HandoffReason
HANDOFF_REASON_PEER_LOST_AFTER_FIRST_BYTE: HandoffReason
HANDOFF_REASON_STALLED: HandoffReason
HANDOFF_REASON_DEADLINE: HandoffReason
HANDOFF_REASON_DIGEST_MISMATCH: HandoffReason
HANDOFF_REASON_CANCELLED_BY_ROUTER: HandoffReason
HANDOFF_REASON_CANCELLED_BY_PREFILL: HandoffReason
HANDOFF_REASON_CANCELLED_BY_DECODE: HandoffReason
HANDOFF_REASON_KV_EXHAUSTED: HandoffReason
HANDOFF_REASON_DRAINING: HandoffReason
HANDOFF_REASON_ENGINE_FAILED: HandoffReason
HANDOFF_REASON_INVALID_REQUEST: HandoffReason
HANDOFF_REASON_INTERNAL: HandoffReason
HANDOFF_REASON_QUEUE_FULL: HandoffReason
HANDOFF_REASON_CANCELLED_BY_CLIENT: HandoffReason

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "prompt_token_ids", "sampling", "ticket", "cache_salt", "timeout_ms", "trace_context", "announce", "priority", "overlap", "segment_bytes", "chunk_tokens", "tenant", "first_token_within_ms", "needed_ms", "peer", "receiver_cached_tokens", "token_first")
    class TraceContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TRACE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_WITHIN_MS_FIELD_NUMBER: _ClassVar[int]
    NEEDED_MS_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIRST_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    prompt_token_ids: bytes
    sampling: _common_pb2.SamplingParams
    ticket: _common_pb2.HandoffTicket
    cache_salt: str
    timeout_ms: int
    trace_context: _containers.ScalarMap[str, str]
    announce: bool
    priority: int
    overlap: bool
    segment_bytes: int
    chunk_tokens: int
    tenant: str
    first_token_within_ms: float
    needed_ms: float
    peer: KvPeer
    receiver_cached_tokens: int
    token_first: bool
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prompt_token_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., ticket: _Optional[_Union[_common_pb2.HandoffTicket, _Mapping]] = ..., cache_salt: _Optional[str] = ..., timeout_ms: _Optional[int] = ..., trace_context: _Optional[_Mapping[str, str]] = ..., announce: _Optional[bool] = ..., priority: _Optional[int] = ..., overlap: _Optional[bool] = ..., segment_bytes: _Optional[int] = ..., chunk_tokens: _Optional[int] = ..., tenant: _Optional[str] = ..., first_token_within_ms: _Optional[float] = ..., needed_ms: _Optional[float] = ..., peer: _Optional[_Union[KvPeer, _Mapping]] = ..., receiver_cached_tokens: _Optional[int] = ..., token_first: _Optional[bool] = ...) -> None: ...

class KvPeer(_message.Message):
    __slots__ = ("worker_id", "incarnation", "control_address", "cached_tokens")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CONTROL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    control_address: str
    cached_tokens: int
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., control_address: _Optional[str] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("request_id", "attempt", "token_ids", "logprobs", "finish_reason", "source", "cached_tokens", "store_tokens", "queue_ms", "compute_ms", "store_fetch_ms", "engine_ms", "store_conversion", "origins")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    STORE_FETCH_MS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_MS_FIELD_NUMBER: _ClassVar[int]
    STORE_CONVERSION_FIELD_NUMBER: _ClassVar[int]
    ORIGINS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    token_ids: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    finish_reason: _common_pb2.FinishReason
    source: _common_pb2.KvSource
    cached_tokens: int
    store_tokens: int
    queue_ms: float
    compute_ms: float
    store_fetch_ms: float
    engine_ms: float
    store_conversion: _common_pb2.KvConversion
    origins: _common_pb2.KvOrigins
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., source: _Optional[_Union[_common_pb2.KvSource, _Mapping]] = ..., cached_tokens: _Optional[int] = ..., store_tokens: _Optional[int] = ..., queue_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ..., store_fetch_ms: _Optional[float] = ..., engine_ms: _Optional[float] = ..., store_conversion: _Optional[_Union[_common_pb2.KvConversion, _Mapping]] = ..., origins: _Optional[_Union[_common_pb2.KvOrigins, _Mapping]] = ...) -> None: ...

class PrefillSessionRequest(_message.Message):
    __slots__ = ("prefill", "cancel")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    prefill: PrefillRequest
    cancel: CancelRequest
    def __init__(self, prefill: _Optional[_Union[PrefillRequest, _Mapping]] = ..., cancel: _Optional[_Union[CancelRequest, _Mapping]] = ...) -> None: ...

class PrefillSessionResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[PrefillResult]
    def __init__(self, results: _Optional[_Iterable[_Union[PrefillResult, _Mapping]]] = ...) -> None: ...

class PrefillResult(_message.Message):
    __slots__ = ("request_id", "attempt", "response", "error", "started", "token")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    response: PrefillResponse
    error: _status_pb2.Status
    started: PrefillStarted
    token: PrefillToken
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., response: _Optional[_Union[PrefillResponse, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., started: _Optional[_Union[PrefillStarted, _Mapping]] = ..., token: _Optional[_Union[PrefillToken, _Mapping]] = ...) -> None: ...

class PrefillStarted(_message.Message):
    __slots__ = ("source",)
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    source: _common_pb2.KvSource
    def __init__(self, source: _Optional[_Union[_common_pb2.KvSource, _Mapping]] = ...) -> None: ...

class PrefillToken(_message.Message):
    __slots__ = ("token_ids", "logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    def __init__(self, token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "by_client")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    BY_CLIENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    by_client: bool
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., by_client: _Optional[bool] = ...) -> None: ...

class CancelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "prompt_token_ids", "max_new_tokens", "cache_salt", "timeout_ms", "trace_context", "tenant", "emitted_token_ids")
    class TraceContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TRACE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    EMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    prompt_token_ids: bytes
    max_new_tokens: int
    cache_salt: str
    timeout_ms: int
    trace_context: _containers.ScalarMap[str, str]
    tenant: str
    emitted_token_ids: bytes
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prompt_token_ids: _Optional[bytes] = ..., max_new_tokens: _Optional[int] = ..., cache_salt: _Optional[str] = ..., timeout_ms: _Optional[int] = ..., trace_context: _Optional[_Mapping[str, str]] = ..., tenant: _Optional[str] = ..., emitted_token_ids: _Optional[bytes] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("request_id", "attempt", "ticket")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    ticket: _common_pb2.HandoffTicket
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., ticket: _Optional[_Union[_common_pb2.HandoffTicket, _Mapping]] = ...) -> None: ...

class ReleaseReservationRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "by_client")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    BY_CLIENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    by_client: bool
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., by_client: _Optional[bool] = ...) -> None: ...

class ReleaseReservationResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenewReservationRequest(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class RenewReservationResponse(_message.Message):
    __slots__ = ("expires_in_ms",)
    EXPIRES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    expires_in_ms: int
    def __init__(self, expires_in_ms: _Optional[int] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "prompt_token_ids", "emitted_token_ids", "sampling", "source", "cache_salt", "timeout_ms", "trace_context", "priority", "wire_dtype", "tenant", "chunk_tokens")
    class TraceContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TRACE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    prompt_token_ids: bytes
    emitted_token_ids: bytes
    sampling: _common_pb2.SamplingParams
    source: _common_pb2.KvSource
    cache_salt: str
    timeout_ms: int
    trace_context: _containers.ScalarMap[str, str]
    priority: int
    wire_dtype: str
    tenant: str
    chunk_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prompt_token_ids: _Optional[bytes] = ..., emitted_token_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., source: _Optional[_Union[_common_pb2.KvSource, _Mapping]] = ..., cache_salt: _Optional[str] = ..., timeout_ms: _Optional[int] = ..., trace_context: _Optional[_Mapping[str, str]] = ..., priority: _Optional[int] = ..., wire_dtype: _Optional[str] = ..., tenant: _Optional[str] = ..., chunk_tokens: _Optional[int] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("request_id", "attempt", "index", "token_ids", "logprobs", "finish_reason", "error", "transfer", "engine_ms", "prompt_kv", "handed_over", "prefilled")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    ENGINE_MS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_KV_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    index: int
    token_ids: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    finish_reason: _common_pb2.FinishReason
    error: _status_pb2.Status
    transfer: TransferReport
    engine_ms: float
    prompt_kv: PromptKv
    handed_over: HandedOver
    prefilled: Prefilled
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., index: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., transfer: _Optional[_Union[TransferReport, _Mapping]] = ..., engine_ms: _Optional[float] = ..., prompt_kv: _Optional[_Union[PromptKv, _Mapping]] = ..., handed_over: _Optional[_Union[HandedOver, _Mapping]] = ..., prefilled: _Optional[_Union[Prefilled, _Mapping]] = ...) -> None: ...

class HandOverRequest(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class HandOverResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HandedOver(_message.Message):
    __slots__ = ("source",)
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    source: _common_pb2.KvSource
    def __init__(self, source: _Optional[_Union[_common_pb2.KvSource, _Mapping]] = ...) -> None: ...

class Prefilled(_message.Message):
    __slots__ = ("response", "reserve_ms", "prefill_ms", "pulling_ahead_blocks")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    RESERVE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    PULLING_AHEAD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    response: PrefillResponse
    reserve_ms: float
    prefill_ms: float
    pulling_ahead_blocks: int
    def __init__(self, response: _Optional[_Union[PrefillResponse, _Mapping]] = ..., reserve_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., pulling_ahead_blocks: _Optional[int] = ...) -> None: ...

class PromptKv(_message.Message):
    __slots__ = ("cached_tokens", "store_tokens", "store_fetch_ms", "store_conversion", "origins")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORE_FETCH_MS_FIELD_NUMBER: _ClassVar[int]
    STORE_CONVERSION_FIELD_NUMBER: _ClassVar[int]
    ORIGINS_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    store_tokens: int
    store_fetch_ms: float
    store_conversion: _common_pb2.KvConversion
    origins: _common_pb2.KvOrigins
    def __init__(self, cached_tokens: _Optional[int] = ..., store_tokens: _Optional[int] = ..., store_fetch_ms: _Optional[float] = ..., store_conversion: _Optional[_Union[_common_pb2.KvConversion, _Mapping]] = ..., origins: _Optional[_Union[_common_pb2.KvOrigins, _Mapping]] = ...) -> None: ...

class TransferReport(_message.Message):
    __slots__ = ("bytes", "transfer_ms", "blocks", "blocks_reused", "backend", "bytes_ahead", "exposed_ms", "began_ahead_ms", "why", "conversion")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_REUSED_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    BYTES_AHEAD_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_MS_FIELD_NUMBER: _ClassVar[int]
    BEGAN_AHEAD_MS_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    CONVERSION_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    transfer_ms: float
    blocks: int
    blocks_reused: int
    backend: str
    bytes_ahead: int
    exposed_ms: float
    began_ahead_ms: float
    why: str
    conversion: _common_pb2.KvConversion
    def __init__(self, bytes: _Optional[int] = ..., transfer_ms: _Optional[float] = ..., blocks: _Optional[int] = ..., blocks_reused: _Optional[int] = ..., backend: _Optional[str] = ..., bytes_ahead: _Optional[int] = ..., exposed_ms: _Optional[float] = ..., began_ahead_ms: _Optional[float] = ..., why: _Optional[str] = ..., conversion: _Optional[_Union[_common_pb2.KvConversion, _Mapping]] = ...) -> None: ...

class DecodeSessionRequest(_message.Message):
    __slots__ = ("reserve", "decode", "cancel", "release", "renew", "pull_ahead", "hand_over", "routed")
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    PULL_AHEAD_FIELD_NUMBER: _ClassVar[int]
    HAND_OVER_FIELD_NUMBER: _ClassVar[int]
    ROUTED_FIELD_NUMBER: _ClassVar[int]
    reserve: ReserveRequest
    decode: DecodeRequest
    cancel: CancelRequest
    release: ReleaseReservationRequest
    renew: RenewReservationRequest
    pull_ahead: PullAheadRequest
    hand_over: HandOverRequest
    routed: RoutedRequest
    def __init__(self, reserve: _Optional[_Union[ReserveRequest, _Mapping]] = ..., decode: _Optional[_Union[DecodeRequest, _Mapping]] = ..., cancel: _Optional[_Union[CancelRequest, _Mapping]] = ..., release: _Optional[_Union[ReleaseReservationRequest, _Mapping]] = ..., renew: _Optional[_Union[RenewReservationRequest, _Mapping]] = ..., pull_ahead: _Optional[_Union[PullAheadRequest, _Mapping]] = ..., hand_over: _Optional[_Union[HandOverRequest, _Mapping]] = ..., routed: _Optional[_Union[RoutedRequest, _Mapping]] = ...) -> None: ...

class RoutedRequest(_message.Message):
    __slots__ = ("route", "request", "emitted_token_ids", "source")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    EMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    route: _inference_pb2.SignedRoute
    request: _inference_pb2.GenerateRequest
    emitted_token_ids: bytes
    source: _common_pb2.KvSource
    def __init__(self, route: _Optional[_Union[_inference_pb2.SignedRoute, _Mapping]] = ..., request: _Optional[_Union[_inference_pb2.GenerateRequest, _Mapping]] = ..., emitted_token_ids: _Optional[bytes] = ..., source: _Optional[_Union[_common_pb2.KvSource, _Mapping]] = ...) -> None: ...

class PullAheadRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "source", "timeout_ms", "trace_context", "priority", "wire_dtype")
    class TraceContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TRACE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    source: _common_pb2.KvSource
    timeout_ms: int
    trace_context: _containers.ScalarMap[str, str]
    priority: int
    wire_dtype: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., source: _Optional[_Union[_common_pb2.KvSource, _Mapping]] = ..., timeout_ms: _Optional[int] = ..., trace_context: _Optional[_Mapping[str, str]] = ..., priority: _Optional[int] = ..., wire_dtype: _Optional[str] = ...) -> None: ...

class ReserveResult(_message.Message):
    __slots__ = ("request_id", "attempt", "response", "error")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    response: ReserveResponse
    error: _status_pb2.Status
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., response: _Optional[_Union[ReserveResponse, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class DecodeSessionResponse(_message.Message):
    __slots__ = ("outputs", "reservations")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[DecodeResponse]
    reservations: _containers.RepeatedCompositeFieldContainer[ReserveResult]
    def __init__(self, outputs: _Optional[_Iterable[_Union[DecodeResponse, _Mapping]]] = ..., reservations: _Optional[_Iterable[_Union[ReserveResult, _Mapping]]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchStatusRequest(_message.Message):
    __slots__ = ("min_interval_ms", "from_revision", "incarnation", "max_interval_ms")
    MIN_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    FROM_REVISION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MAX_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    min_interval_ms: int
    from_revision: int
    incarnation: str
    max_interval_ms: int
    def __init__(self, min_interval_ms: _Optional[int] = ..., from_revision: _Optional[int] = ..., incarnation: _Optional[str] = ..., max_interval_ms: _Optional[int] = ...) -> None: ...

class BlockEvents(_message.Message):
    __slots__ = ("revision", "snapshot", "stored_hashes", "removed_hashes", "since_revision", "more", "tier", "age_ms")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    STORED_HASHES_FIELD_NUMBER: _ClassVar[int]
    REMOVED_HASHES_FIELD_NUMBER: _ClassVar[int]
    SINCE_REVISION_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    revision: int
    snapshot: bool
    stored_hashes: bytes
    removed_hashes: bytes
    since_revision: int
    more: bool
    tier: _common_pb2.KvTier
    age_ms: float
    def __init__(self, revision: _Optional[int] = ..., snapshot: _Optional[bool] = ..., stored_hashes: _Optional[bytes] = ..., removed_hashes: _Optional[bytes] = ..., since_revision: _Optional[int] = ..., more: _Optional[bool] = ..., tier: _Optional[_Union[_common_pb2.KvTier, str]] = ..., age_ms: _Optional[float] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("record", "kv", "running_requests", "waiting_requests", "reservations", "pinned_transfers", "block_events", "session", "transport_changes", "indexed", "kv_health", "steps")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    PINNED_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_EVENTS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_CHANGES_FIELD_NUMBER: _ClassVar[int]
    INDEXED_FIELD_NUMBER: _ClassVar[int]
    KV_HEALTH_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    record: WorkerRecord
    kv: _common_pb2.KvStats
    running_requests: int
    waiting_requests: int
    reservations: int
    pinned_transfers: int
    block_events: BlockEvents
    session: str
    transport_changes: _containers.RepeatedCompositeFieldContainer[TransportChange]
    indexed: IndexedBlocks
    kv_health: KvHealth
    steps: _containers.RepeatedCompositeFieldContainer[StepCost]
    def __init__(self, record: _Optional[_Union[WorkerRecord, _Mapping]] = ..., kv: _Optional[_Union[_common_pb2.KvStats, _Mapping]] = ..., running_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., reservations: _Optional[int] = ..., pinned_transfers: _Optional[int] = ..., block_events: _Optional[_Union[BlockEvents, _Mapping]] = ..., session: _Optional[str] = ..., transport_changes: _Optional[_Iterable[_Union[TransportChange, _Mapping]]] = ..., indexed: _Optional[_Union[IndexedBlocks, _Mapping]] = ..., kv_health: _Optional[_Union[KvHealth, _Mapping]] = ..., steps: _Optional[_Iterable[_Union[StepCost, _Mapping]]] = ...) -> None: ...

class StepCost(_message.Message):
    __slots__ = ("prompts", "prompt_tokens", "prompt_squares", "sequences", "context_tokens", "ms", "cpu_ms")
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SQUARES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MS_FIELD_NUMBER: _ClassVar[int]
    CPU_MS_FIELD_NUMBER: _ClassVar[int]
    prompts: int
    prompt_tokens: int
    prompt_squares: int
    sequences: int
    context_tokens: int
    ms: float
    cpu_ms: float
    def __init__(self, prompts: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., prompt_squares: _Optional[int] = ..., sequences: _Optional[int] = ..., context_tokens: _Optional[int] = ..., ms: _Optional[float] = ..., cpu_ms: _Optional[float] = ...) -> None: ...

class IndexedBlocks(_message.Message):
    __slots__ = ("revision", "blocks", "staleness_ms", "lag_ms", "credited")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STALENESS_MS_FIELD_NUMBER: _ClassVar[int]
    LAG_MS_FIELD_NUMBER: _ClassVar[int]
    CREDITED_FIELD_NUMBER: _ClassVar[int]
    revision: int
    blocks: int
    staleness_ms: float
    lag_ms: float
    credited: bool
    def __init__(self, revision: _Optional[int] = ..., blocks: _Optional[int] = ..., staleness_ms: _Optional[float] = ..., lag_ms: _Optional[float] = ..., credited: _Optional[bool] = ...) -> None: ...

class TenantUsage(_message.Message):
    __slots__ = ("tenant", "charged_blocks", "borrowed_blocks", "guaranteed_blocks", "limit_blocks", "rejections")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CHARGED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BORROWED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    GUARANTEED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REJECTIONS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    charged_blocks: int
    borrowed_blocks: int
    guaranteed_blocks: int
    limit_blocks: int
    rejections: int
    def __init__(self, tenant: _Optional[str] = ..., charged_blocks: _Optional[int] = ..., borrowed_blocks: _Optional[int] = ..., guaranteed_blocks: _Optional[int] = ..., limit_blocks: _Optional[int] = ..., rejections: _Optional[int] = ...) -> None: ...

class KvHealth(_message.Message):
    __slots__ = ("checks", "failed_checks", "problems", "sampled_blocks", "corrupt_blocks", "internal_fragmentation", "external_fragmentation", "moved_blocks", "tenants", "rejected_hits", "lifetime_skill")
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    FAILED_CHECKS_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    INTERNAL_FRAGMENTATION_FIELD_NUMBER: _ClassVar[int]
    EXTERNAL_FRAGMENTATION_FIELD_NUMBER: _ClassVar[int]
    MOVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_HITS_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_SKILL_FIELD_NUMBER: _ClassVar[int]
    checks: int
    failed_checks: int
    problems: _containers.RepeatedScalarFieldContainer[str]
    sampled_blocks: int
    corrupt_blocks: int
    internal_fragmentation: float
    external_fragmentation: float
    moved_blocks: int
    tenants: _containers.RepeatedCompositeFieldContainer[TenantUsage]
    rejected_hits: int
    lifetime_skill: float
    def __init__(self, checks: _Optional[int] = ..., failed_checks: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ..., sampled_blocks: _Optional[int] = ..., corrupt_blocks: _Optional[int] = ..., internal_fragmentation: _Optional[float] = ..., external_fragmentation: _Optional[float] = ..., moved_blocks: _Optional[int] = ..., tenants: _Optional[_Iterable[_Union[TenantUsage, _Mapping]]] = ..., rejected_hits: _Optional[int] = ..., lifetime_skill: _Optional[float] = ...) -> None: ...

class ProbeWorkerLinksRequest(_message.Message):
    __slots__ = ("sources", "max_bytes")
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedCompositeFieldContainer[WorkerRecord]
    max_bytes: int
    def __init__(self, sources: _Optional[_Iterable[_Union[WorkerRecord, _Mapping]]] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class ProbeWorkerLinksResponse(_message.Message):
    __slots__ = ("links", "failures")
    LINKS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    links: _containers.RepeatedCompositeFieldContainer[_common_pb2.LinkCost]
    failures: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, links: _Optional[_Iterable[_Union[_common_pb2.LinkCost, _Mapping]]] = ..., failures: _Optional[_Iterable[str]] = ...) -> None: ...

class SetWorkerTransportRequest(_message.Message):
    __slots__ = ("settings",)
    class SettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    settings: _containers.ScalarMap[str, str]
    def __init__(self, settings: _Optional[_Mapping[str, str]] = ...) -> None: ...

class SetWorkerTransportResponse(_message.Message):
    __slots__ = ("in_force", "changes")
    class InForceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    IN_FORCE_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    in_force: _containers.ScalarMap[str, str]
    changes: _containers.RepeatedCompositeFieldContainer[TransportChange]
    def __init__(self, in_force: _Optional[_Mapping[str, str]] = ..., changes: _Optional[_Iterable[_Union[TransportChange, _Mapping]]] = ...) -> None: ...

class SetWorkerEvictionRequest(_message.Message):
    __slots__ = ("policy", "migration")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    policy: str
    migration: str
    def __init__(self, policy: _Optional[str] = ..., migration: _Optional[str] = ...) -> None: ...

class SetWorkerEvictionResponse(_message.Message):
    __slots__ = ("policy", "cached_blocks", "migration")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    policy: str
    cached_blocks: int
    migration: str
    def __init__(self, policy: _Optional[str] = ..., cached_blocks: _Optional[int] = ..., migration: _Optional[str] = ...) -> None: ...

class TransportChange(_message.Message):
    __slots__ = ("key", "loaded", "now")
    KEY_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    key: str
    loaded: str
    now: str
    def __init__(self, key: _Optional[str] = ..., loaded: _Optional[str] = ..., now: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace_ms",)
    GRACE_MS_FIELD_NUMBER: _ClassVar[int]
    grace_ms: int
    def __init__(self, grace_ms: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("unfinished_requests",)
    UNFINISHED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    unfinished_requests: int
    def __init__(self, unfinished_requests: _Optional[int] = ...) -> None: ...

class SetRoleRequest(_message.Message):
    __slots__ = ("role", "grace_ms", "keep_engine")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    GRACE_MS_FIELD_NUMBER: _ClassVar[int]
    KEEP_ENGINE_FIELD_NUMBER: _ClassVar[int]
    role: _common_pb2.WorkerRole
    grace_ms: int
    keep_engine: bool
    def __init__(self, role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ..., grace_ms: _Optional[int] = ..., keep_engine: _Optional[bool] = ...) -> None: ...

class SetRoleResponse(_message.Message):
    __slots__ = ("record", "before", "unfinished_requests")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    UNFINISHED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    record: WorkerRecord
    before: _common_pb2.WorkerRole
    unfinished_requests: int
    def __init__(self, record: _Optional[_Union[WorkerRecord, _Mapping]] = ..., before: _Optional[_Union[_common_pb2.WorkerRole, str]] = ..., unfinished_requests: _Optional[int] = ...) -> None: ...

class ListHandoffsRequest(_message.Message):
    __slots__ = ("request_id", "last", "failed")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    last: int
    failed: bool
    def __init__(self, request_id: _Optional[str] = ..., last: _Optional[int] = ..., failed: _Optional[bool] = ...) -> None: ...

class ListHandoffsResponse(_message.Message):
    __slots__ = ("worker_id", "incarnation", "records")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    records: _containers.RepeatedCompositeFieldContainer[HandoffRecord]
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., records: _Optional[_Iterable[_Union[HandoffRecord, _Mapping]]] = ...) -> None: ...

class HandoffRecord(_message.Message):
    __slots__ = ("request_id", "attempt", "epoch", "side", "backend", "backend_why", "peer_id", "peer_incarnation", "state", "reason", "failed_at", "message", "queued_ms", "handshake_ms", "first_byte_ms", "transfer_ms", "exposed_ms", "digest_ms", "bytes", "blocks_moved", "blocks_reused", "stalls", "longest_stall_ms", "retries", "overlap_share", "total_ms", "age_ms", "events")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SIDE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    BACKEND_WHY_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FAILED_AT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_MS_FIELD_NUMBER: _ClassVar[int]
    HANDSHAKE_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_BYTE_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_MS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_MS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_MOVED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_REUSED_FIELD_NUMBER: _ClassVar[int]
    STALLS_FIELD_NUMBER: _ClassVar[int]
    LONGEST_STALL_MS_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_SHARE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    epoch: int
    side: HandoffSide
    backend: str
    backend_why: str
    peer_id: str
    peer_incarnation: str
    state: HandoffState
    reason: HandoffReason
    failed_at: str
    message: str
    queued_ms: float
    handshake_ms: float
    first_byte_ms: float
    transfer_ms: float
    exposed_ms: float
    digest_ms: float
    bytes: int
    blocks_moved: int
    blocks_reused: int
    stalls: int
    longest_stall_ms: float
    retries: int
    overlap_share: float
    total_ms: float
    age_ms: float
    events: _containers.RepeatedCompositeFieldContainer[HandoffEvent]
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., epoch: _Optional[int] = ..., side: _Optional[_Union[HandoffSide, str]] = ..., backend: _Optional[str] = ..., backend_why: _Optional[str] = ..., peer_id: _Optional[str] = ..., peer_incarnation: _Optional[str] = ..., state: _Optional[_Union[HandoffState, str]] = ..., reason: _Optional[_Union[HandoffReason, str]] = ..., failed_at: _Optional[str] = ..., message: _Optional[str] = ..., queued_ms: _Optional[float] = ..., handshake_ms: _Optional[float] = ..., first_byte_ms: _Optional[float] = ..., transfer_ms: _Optional[float] = ..., exposed_ms: _Optional[float] = ..., digest_ms: _Optional[float] = ..., bytes: _Optional[int] = ..., blocks_moved: _Optional[int] = ..., blocks_reused: _Optional[int] = ..., stalls: _Optional[int] = ..., longest_stall_ms: _Optional[float] = ..., retries: _Optional[int] = ..., overlap_share: _Optional[float] = ..., total_ms: _Optional[float] = ..., age_ms: _Optional[float] = ..., events: _Optional[_Iterable[_Union[HandoffEvent, _Mapping]]] = ...) -> None: ...

class HandoffEvent(_message.Message):
    __slots__ = ("what", "at_ms")
    WHAT_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    what: str
    at_ms: float
    def __init__(self, what: _Optional[str] = ..., at_ms: _Optional[float] = ...) -> None: ...

class WorkerRecord(_message.Message):
    __slots__ = ("worker_id", "role", "state", "address", "data_address", "incarnation", "pid", "model", "transport", "host_id", "engine", "paths")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DATA_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: _common_pb2.WorkerRole
    state: _common_pb2.WorkerState
    address: str
    data_address: str
    incarnation: str
    pid: int
    model: _inference_pb2.ModelInfo
    transport: str
    host_id: str
    engine: str
    paths: _containers.RepeatedCompositeFieldContainer[_common_pb2.DataPath]
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ..., state: _Optional[_Union[_common_pb2.WorkerState, str]] = ..., address: _Optional[str] = ..., data_address: _Optional[str] = ..., incarnation: _Optional[str] = ..., pid: _Optional[int] = ..., model: _Optional[_Union[_inference_pb2.ModelInfo, _Mapping]] = ..., transport: _Optional[str] = ..., host_id: _Optional[str] = ..., engine: _Optional[str] = ..., paths: _Optional[_Iterable[_Union[_common_pb2.DataPath, _Mapping]]] = ...) -> None: ...
