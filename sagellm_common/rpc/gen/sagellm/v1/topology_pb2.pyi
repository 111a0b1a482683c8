from sagellm_common.rpc.gen.sagellm.v1 import common_pb2 as _common_pb2
from sagellm_common.rpc.gen.sagellm.v1 import plan_pb2 as _plan_pb2
from sagellm_common.rpc.gen.sagellm.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetCostModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCostModelResponse(_message.Message):
    __slots__ = ("state_json",)
    STATE_JSON_FIELD_NUMBER: _ClassVar[int]
    state_json: str
    def __init__(self, state_json: _Optional[str] = ...) -> None: ...

class GetTopologyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchTopologyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TopologySnapshot(_message.Message):
    __slots__ = ("revision", "backend", "connected", "workers", "links")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    revision: int
    backend: str
    connected: bool
    workers: _containers.RepeatedCompositeFieldContainer[_worker_pb2.WorkerStatus]
    links: _containers.RepeatedCompositeFieldContainer[_common_pb2.LinkCost]
    def __init__(self, revision: _Optional[int] = ..., backend: _Optional[str] = ..., connected: _Optional[bool] = ..., workers: _Optional[_Iterable[_Union[_worker_pb2.WorkerStatus, _Mapping]]] = ..., links: _Optional[_Iterable[_Union[_common_pb2.LinkCost, _Mapping]]] = ...) -> None: ...

class ExplainPlanRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainPlanResponse(_message.Message):
    __slots__ = ("plan", "events", "candidates", "counterfactual", "node_states")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    COUNTERFACTUAL_FIELD_NUMBER: _ClassVar[int]
    NODE_STATES_FIELD_NUMBER: _ClassVar[int]
    plan: _plan_pb2.ExecutionPlan
    events: _containers.RepeatedCompositeFieldContainer[_plan_pb2.PlanEvent]
    candidates: _containers.RepeatedCompositeFieldContainer[PlanCandidate]
    counterfactual: PlanCounterfactual
    node_states: _containers.RepeatedCompositeFieldContainer[PlanNodeStatus]
    def __init__(self, plan: _Optional[_Union[_plan_pb2.ExecutionPlan, _Mapping]] = ..., events: _Optional[_Iterable[_Union[_plan_pb2.PlanEvent, _Mapping]]] = ..., candidates: _Optional[_Iterable[_Union[PlanCandidate, _Mapping]]] = ..., counterfactual: _Optional[_Union[PlanCounterfactual, _Mapping]] = ..., node_states: _Optional[_Iterable[_Union[PlanNodeStatus, _Mapping]]] = ...) -> None: ...

class PlanCandidate(_message.Message):
    __slots__ = ("worker_id", "role", "chosen", "score", "expected_ms", "matched_tokens", "outstanding", "queued_tokens", "sequences")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_MS_FIELD_NUMBER: _ClassVar[int]
    MATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTSTANDING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: _common_pb2.WorkerRole
    chosen: bool
    score: float
    expected_ms: float
    matched_tokens: int
    outstanding: int
    queued_tokens: int
    sequences: int
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ..., chosen: _Optional[bool] = ..., score: _Optional[float] = ..., expected_ms: _Optional[float] = ..., matched_tokens: _Optional[int] = ..., outstanding: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., sequences: _Optional[int] = ...) -> None: ...

class PlanCounterfactual(_message.Message):
    __slots__ = ("disaggregated", "expected_ms", "other_expected_ms", "taken_ms", "regret_ms", "detail")
    DISAGGREGATED_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_MS_FIELD_NUMBER: _ClassVar[int]
    OTHER_EXPECTED_MS_FIELD_NUMBER: _ClassVar[int]
    TAKEN_MS_FIELD_NUMBER: _ClassVar[int]
    REGRET_MS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    disaggregated: bool
    expected_ms: float
    other_expected_ms: float
    taken_ms: float
    regret_ms: float
    detail: str
    def __init__(self, disaggregated: _Optional[bool] = ..., expected_ms: _Optional[float] = ..., other_expected_ms: _Optional[float] = ..., taken_ms: _Optional[float] = ..., regret_ms: _Optional[float] = ..., detail: _Optional[str] = ...) -> None: ...

class PlanNodeStatus(_message.Message):
    __slots__ = ("node_id", "state")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    node_id: int
    state: str
    def __init__(self, node_id: _Optional[int] = ..., state: _Optional[str] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("record", "ttl_ms")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    record: _worker_pb2.WorkerRecord
    ttl_ms: int
    def __init__(self, record: _Optional[_Union[_worker_pb2.WorkerRecord, _Mapping]] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    def __init__(self, lease_id: _Optional[str] = ...) -> None: ...

class KeepAliveRequest(_message.Message):
    __slots__ = ("lease_id", "record", "links")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    record: _worker_pb2.WorkerRecord
    links: _containers.RepeatedCompositeFieldContainer[_common_pb2.LinkCost]
    def __init__(self, lease_id: _Optional[str] = ..., record: _Optional[_Union[_worker_pb2.WorkerRecord, _Mapping]] = ..., links: _Optional[_Iterable[_Union[_common_pb2.LinkCost, _Mapping]]] = ...) -> None: ...

class KeepAliveResponse(_message.Message):
    __slots__ = ("ttl_ms",)
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    ttl_ms: int
    def __init__(self, ttl_ms: _Optional[int] = ...) -> None: ...

class DeregisterRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    def __init__(self, lease_id: _Optional[str] = ...) -> None: ...

class DeregisterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProbeLinksRequest(_message.Message):
    __slots__ = ("target_ids", "max_bytes")
    TARGET_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    target_ids: _containers.RepeatedScalarFieldContainer[str]
    max_bytes: int
    def __init__(self, target_ids: _Optional[_Iterable[str]] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class ProbeLinksResponse(_message.Message):
    __slots__ = ("links", "failures")
    LINKS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    links: _containers.RepeatedCompositeFieldContainer[_common_pb2.LinkCost]
    failures: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, links: _Optional[_Iterable[_Union[_common_pb2.LinkCost, _Mapping]]] = ..., failures: _Optional[_Iterable[str]] = ...) -> None: ...

class SetTransportRequest(_message.Message):
    __slots__ = ("settings", "worker_ids")
    class SettingsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    settings: _containers.ScalarMap[str, str]
    worker_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, settings: _Optional[_Mapping[str, str]] = ..., worker_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class SetTransportResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerTransport]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerTransport, _Mapping]]] = ...) -> None: ...

class WorkerTransport(_message.Message):
    __slots__ = ("worker_id", "in_force", "changes", "error")
    class InForceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    IN_FORCE_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    in_force: _containers.ScalarMap[str, str]
    changes: _containers.RepeatedCompositeFieldContainer[_worker_pb2.TransportChange]
    error: str
    def __init__(self, worker_id: _Optional[str] = ..., in_force: _Optional[_Mapping[str, str]] = ..., changes: _Optional[_Iterable[_Union[_worker_pb2.TransportChange, _Mapping]]] = ..., error: _Optional[str] = ...) -> None: ...

class SetEvictionRequest(_message.Message):
    __slots__ = ("policy", "worker_ids", "migration")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    policy: str
    worker_ids: _containers.RepeatedScalarFieldContainer[str]
    migration: str
    def __init__(self, policy: _Optional[str] = ..., worker_ids: _Optional[_Iterable[str]] = ..., migration: _Optional[str] = ...) -> None: ...

class SetEvictionResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerEviction]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerEviction, _Mapping]]] = ...) -> None: ...

class WorkerEviction(_message.Message):
    __slots__ = ("worker_id", "policy", "cached_blocks", "error", "migration")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    policy: str
    cached_blocks: int
    error: str
    migration: str
    def __init__(self, worker_id: _Optional[str] = ..., policy: _Optional[str] = ..., cached_blocks: _Optional[int] = ..., error: _Optional[str] = ..., migration: _Optional[str] = ...) -> None: ...

class SetWorkerRoleRequest(_message.Message):
    __slots__ = ("worker_id", "change")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    change: _worker_pb2.SetRoleRequest
    def __init__(self, worker_id: _Optional[str] = ..., change: _Optional[_Union[_worker_pb2.SetRoleRequest, _Mapping]] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker_id", "grace_ms")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    GRACE_MS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    grace_ms: int
    def __init__(self, worker_id: _Optional[str] = ..., grace_ms: _Optional[int] = ...) -> None: ...

class SetStrategyRequest(_message.Message):
    __slots__ = ("strategy", "service_class")
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    SERVICE_CLASS_FIELD_NUMBER: _ClassVar[int]
    strategy: str
    service_class: str
    def __init__(self, strategy: _Optional[str] = ..., service_class: _Optional[str] = ...) -> None: ...

class SetStrategyResponse(_message.Message):
    __slots__ = ("classes",)
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    classes: _containers.RepeatedCompositeFieldContainer[ClassStrategy]
    def __init__(self, classes: _Optional[_Iterable[_Union[ClassStrategy, _Mapping]]] = ...) -> None: ...

class ClassStrategy(_message.Message):
    __slots__ = ("service_class", "strategy", "engine_policy", "placed_requests")
    SERVICE_CLASS_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    ENGINE_POLICY_FIELD_NUMBER: _ClassVar[int]
    PLACED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    service_class: str
    strategy: str
    engine_policy: str
    placed_requests: int
    def __init__(self, service_class: _Optional[str] = ..., strategy: _Optional[str] = ..., engine_policy: _Optional[str] = ..., placed_requests: _Optional[int] = ...) -> None: ...
