from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PlanNodeKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PLAN_NODE_KIND_UNSPECIFIED: _ClassVar[PlanNodeKind]
    PLAN_NODE_KIND_LOOKUP: _ClassVar[PlanNodeKind]
    PLAN_NODE_KIND_FETCH: _ClassVar[PlanNodeKind]
    PLAN_NODE_KIND_PREFILL: _ClassVar[PlanNodeKind]
    PLAN_NODE_KIND_TRANSFER: _ClassVar[PlanNodeKind]
    PLAN_NODE_KIND_DECODE: _ClassVar[PlanNodeKind]
    PLAN_NODE_KIND_OFFLOAD: _ClassVar[PlanNodeKind]
    PLAN_NODE_KIND_MIGRATE: _ClassVar[PlanNodeKind]
    PLAN_NODE_KIND_SWITCH_MODEL: _ClassVar[PlanNodeKind]
    PLAN_NODE_KIND_VERIFY: _ClassVar[PlanNodeKind]
PLAN_NODE_KIND_UNSPECIFIED: PlanNodeKind
PLAN_NODE_KIND_LOOKUP: PlanNodeKind
PLAN_NODE_KIND_FETCH: PlanNodeKind
PLAN_NODE_KIND_PREFILL: PlanNodeKind
PLAN_NODE_KIND_TRANSFER: PlanNodeKind
PLAN_NODE_KIND_DECODE: PlanNodeKind
PLAN_NODE_KIND_OFFLOAD: PlanNodeKind
PLAN_NODE_KIND_MIGRATE: PlanNodeKind
PLAN_NODE_KIND_SWITCH_MODEL: PlanNodeKind
PLAN_NODE_KIND_VERIFY: PlanNodeKind

class PlanNode(_message.Message):
    __slots__ = ("node_id", "kind", "worker_id", "depends_on", "start_token", "end_token", "overlap", "segment_bytes", "chunk_tokens", "priority", "wire_dtype", "source_id", "micro_batch")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DEPENDS_ON_FIELD_NUMBER: _ClassVar[int]
    START_TOKEN_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_FIELD_NUMBER: _ClassVar[int]
    OVERLAP_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    node_id: int
    kind: PlanNodeKind
    worker_id: str
    depends_on: _containers.RepeatedScalarFieldContainer[int]
    start_token: int
    end_token: int
    overlap: bool
    segment_bytes: int
    chunk_tokens: int
    priority: int
    wire_dtype: str
    source_id: str
    micro_batch: int
    def __init__(self, node_id: _Optional[int] = ..., kind: _Optional[_Union[PlanNodeKind, str]] = ..., worker_id: _Optional[str] = ..., depends_on: _Optional[_Iterable[int]] = ..., start_token: _Optional[int] = ..., end_token: _Optional[int] = ..., overlap: _Optional[bool] = ..., segment_bytes: _Optional[int] = ..., chunk_tokens: _Optional[int] = ..., priority: _Optional[int] = ..., wire_dtype: _Optional[str] = ..., source_id: _Optional[str] = ..., micro_batch: _Optional[int] = ...) -> None: ...

class ExecutionPlan(_message.Message):
    __slots__ = ("plan_id", "request_id", "strategy", "nodes", "reason")
    PLAN_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    plan_id: str
    request_id: str
    strategy: str
    nodes: _containers.RepeatedCompositeFieldContainer[PlanNode]
    reason: str
    def __init__(self, plan_id: _Optional[str] = ..., request_id: _Optional[str] = ..., strategy: _Optional[str] = ..., nodes: _Optional[_Iterable[_Union[PlanNode, _Mapping]]] = ..., reason: _Optional[str] = ...) -> None: ...

class PlanEvent(_message.Message):
    __slots__ = ("stage", "at_ms", "duration_ms", "detail")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    stage: str
    at_ms: float
    duration_ms: float
    detail: str
    def __init__(self, stage: _Optional[str] = ..., at_ms: _Optional[float] = ..., duration_ms: _Optional[float] = ..., detail: _Optional[str] = ...) -> None: ...
