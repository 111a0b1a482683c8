from google.rpc import status_pb2 as _status_pb2
from sagellm_common.rpc.gen.sagellm.v1 import common_pb2 as _common_pb2
from sagellm_common.rpc.gen.sagellm.v1 import plan_pb2 as _plan_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model", "prompt_token_ids", "sampling", "tenant", "priority", "cache_salt", "timeout_ms", "trace_context", "service_class")
    class TraceContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TRACE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    SERVICE_CLASS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    prompt_token_ids: bytes
    sampling: _common_pb2.SamplingParams
    tenant: str
    priority: int
    cache_salt: str
    timeout_ms: int
    trace_context: _containers.ScalarMap[str, str]
    service_class: str
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., prompt_token_ids: _Optional[bytes] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., tenant: _Optional[str] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ..., timeout_ms: _Optional[int] = ..., trace_context: _Optional[_Mapping[str, str]] = ..., service_class: _Optional[str] = ...) -> None: ...

class InferenceSessionRequest(_message.Message):
    __slots__ = ("call_id", "generate", "leave", "plan", "progress")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    generate: GenerateRequest
    leave: LeaveRequest
    plan: PlanRequest
    progress: ProgressReport
    def __init__(self, call_id: _Optional[int] = ..., generate: _Optional[_Union[GenerateRequest, _Mapping]] = ..., leave: _Optional[_Union[LeaveRequest, _Mapping]] = ..., plan: _Optional[_Union[PlanRequest, _Mapping]] = ..., progress: _Optional[_Union[ProgressReport, _Mapping]] = ...) -> None: ...

class PlanRequest(_message.Message):
    __slots__ = ("request", "emitted_token_ids", "failed_attempt", "failure", "failed_worker", "handed_over")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    EMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FAILED_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    FAILED_WORKER_FIELD_NUMBER: _ClassVar[int]
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    request: GenerateRequest
    emitted_token_ids: bytes
    failed_attempt: int
    failure: _status_pb2.Status
    failed_worker: WorkerAddress
    handed_over: _common_pb2.KvSource
    def __init__(self, request: _Optional[_Union[GenerateRequest, _Mapping]] = ..., emitted_token_ids: _Optional[bytes] = ..., failed_attempt: _Optional[int] = ..., failure: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., failed_worker: _Optional[_Union[WorkerAddress, _Mapping]] = ..., handed_over: _Optional[_Union[_common_pb2.KvSource, _Mapping]] = ...) -> None: ...

class WorkerAddress(_message.Message):
    __slots__ = ("worker_id", "incarnation", "address")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    address: str
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("request_id", "attempt", "plan", "decode", "prefill", "needed_ms", "tenant", "first_token_within_ms", "decode_block_tokens", "peer")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    NEEDED_MS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_WITHIN_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    plan: _plan_pb2.ExecutionPlan
    decode: WorkerAddress
    prefill: WorkerAddress
    needed_ms: float
    tenant: str
    first_token_within_ms: float
    decode_block_tokens: int
    peer: WorkerAddress
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., plan: _Optional[_Union[_plan_pb2.ExecutionPlan, _Mapping]] = ..., decode: _Optional[_Union[WorkerAddress, _Mapping]] = ..., prefill: _Optional[_Union[WorkerAddress, _Mapping]] = ..., needed_ms: _Optional[float] = ..., tenant: _Optional[str] = ..., first_token_within_ms: _Optional[float] = ..., decode_block_tokens: _Optional[int] = ..., peer: _Optional[_Union[WorkerAddress, _Mapping]] = ...) -> None: ...

class SignedRoute(_message.Message):
    __slots__ = ("route", "signature")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    route: bytes
    signature: bytes
    def __init__(self, route: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class ProgressReport(_message.Message):
    __slots__ = ("first_token", "finish_reason", "error", "summary", "events")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    first_token: FirstToken
    finish_reason: _common_pb2.FinishReason
    error: _status_pb2.Status
    summary: GenerationSummary
    events: _containers.RepeatedCompositeFieldContainer[_plan_pb2.PlanEvent]
    def __init__(self, first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., summary: _Optional[_Union[GenerationSummary, _Mapping]] = ..., events: _Optional[_Iterable[_Union[_plan_pb2.PlanEvent, _Mapping]]] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("cached_tokens", "compute_ms", "engine_ms")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_MS_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    compute_ms: float
    engine_ms: float
    def __init__(self, cached_tokens: _Optional[int] = ..., compute_ms: _Optional[float] = ..., engine_ms: _Optional[float] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InferenceSessionResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[GenerateResult]
    def __init__(self, results: _Optional[_Iterable[_Union[GenerateResult, _Mapping]]] = ...) -> None: ...

class GenerateResult(_message.Message):
    __slots__ = ("call_id", "output", "error", "route")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    output: GenerateResponse
    error: _status_pb2.Status
    route: SignedRoute
    def __init__(self, call_id: _Optional[int] = ..., output: _Optional[_Union[GenerateResponse, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., route: _Optional[_Union[SignedRoute, _Mapping]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "index", "token_ids", "logprobs", "finish_reason", "summary")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    index: int
    token_ids: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    finish_reason: _common_pb2.FinishReason
    summary: GenerationSummary
    def __init__(self, request_id: _Optional[str] = ..., index: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., summary: _Optional[_Union[GenerationSummary, _Mapping]] = ...) -> None: ...

class GenerationSummary(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens", "cached_tokens", "store_tokens", "prefill_worker_id", "decode_worker_id", "kv_bytes_transferred", "queue_ms", "reserve_ms", "prefill_ms", "transfer_ms", "ttft_ms", "tpot_ms", "attempts", "plan", "transport", "prefill_compute_ms", "store_fetch_ms", "kv_bytes_ahead", "transfer_exposed_ms", "kv_conversion", "prefill_engine_ms", "decode_engine_ms", "decode_cached_tokens", "store_conversion", "origins")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_TRANSFERRED_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    RESERVE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    TPOT_MS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    STORE_FETCH_MS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_AHEAD_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_EXPOSED_MS_FIELD_NUMBER: _ClassVar[int]
    KV_CONVERSION_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ENGINE_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_ENGINE_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORE_CONVERSION_FIELD_NUMBER: _ClassVar[int]
    ORIGINS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    store_tokens: int
    prefill_worker_id: str
    decode_worker_id: str
    kv_bytes_transferred: int
    queue_ms: float
    reserve_ms: float
    prefill_ms: float
    transfer_ms: float
    ttft_ms: float
    tpot_ms: float
    attempts: int
    plan: _plan_pb2.ExecutionPlan
    transport: str
    prefill_compute_ms: float
    store_fetch_ms: float
    kv_bytes_ahead: int
    transfer_exposed_ms: float
    kv_conversion: _common_pb2.KvConversion
    prefill_engine_ms: float
    decode_engine_ms: float
    decode_cached_tokens: int
    store_conversion: _common_pb2.KvConversion
    origins: _common_pb2.KvOrigins
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., store_tokens: _Optional[int] = ..., prefill_worker_id: _Optional[str] = ..., decode_worker_id: _Optional[str] = ..., kv_bytes_transferred: _Optional[int] = ..., queue_ms: _Optional[float] = ..., reserve_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., transfer_ms: _Optional[float] = ..., ttft_ms: _Optional[float] = ..., tpot_ms: _Optional[float] = ..., attempts: _Optional[int] = ..., plan: _Optional[_Union[_plan_pb2.ExecutionPlan, _Mapping]] = ..., transport: _Optional[str] = ..., prefill_compute_ms: _Optional[float] = ..., store_fetch_ms: _Optional[float] = ..., kv_bytes_ahead: _Optional[int] = ..., transfer_exposed_ms: _Optional[float] = ..., kv_conversion: _Optional[_Union[_common_pb2.KvConversion, _Mapping]] = ..., prefill_engine_ms: _Optional[float] = ..., decode_engine_ms: _Optional[float] = ..., decode_cached_tokens: _Optional[int] = ..., store_conversion: _Optional[_Union[_common_pb2.KvConversion, _Mapping]] = ..., origins: _Optional[_Union[_common_pb2.KvOrigins, _Mapping]] = ...) -> None: ...

class CancelGenerationRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class CancelGenerationResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "path", "context_length_tokens", "kv_layout", "vocab_size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    context_length_tokens: int
    kv_layout: _common_pb2.KvLayout
    vocab_size: int
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., context_length_tokens: _Optional[int] = ..., kv_layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., vocab_size: _Optional[int] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...
