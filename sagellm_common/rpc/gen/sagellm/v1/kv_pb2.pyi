from sagellm_common.rpc.gen.sagellm.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HandshakeRequest(_message.Message):
    __slots__ = ("worker_id", "incarnation", "layout", "backend")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    layout: _common_pb2.KvLayout
    backend: str
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., backend: _Optional[str] = ...) -> None: ...

class HandshakeResponse(_message.Message):
    __slots__ = ("worker_id", "incarnation", "layout", "data_address")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    DATA_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    layout: _common_pb2.KvLayout
    data_address: str
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., data_address: _Optional[str] = ...) -> None: ...

class RenewLeaseRequest(_message.Message):
    __slots__ = ("transfer_id", "epoch")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class RenewLeaseResponse(_message.Message):
    __slots__ = ("expires_in_ms",)
    EXPIRES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    expires_in_ms: int
    def __init__(self, expires_in_ms: _Optional[int] = ...) -> None: ...

class ReleaseLeaseRequest(_message.Message):
    __slots__ = ("transfer_id", "epoch", "committed")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    committed: bool
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., committed: _Optional[bool] = ...) -> None: ...

class ReleaseLeaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("transfer_id", "epoch", "block_ids", "pair_id", "backend")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    PAIR_ID_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    block_ids: bytes
    pair_id: str
    backend: str
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., block_ids: _Optional[bytes] = ..., pair_id: _Optional[str] = ..., backend: _Optional[str] = ...) -> None: ...

class LendScratchRequest(_message.Message):
    __slots__ = ("num_bytes",)
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    def __init__(self, num_bytes: _Optional[int] = ...) -> None: ...

class LendScratchResponse(_message.Message):
    __slots__ = ("source", "block_bytes")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    source: _common_pb2.KvSource
    block_bytes: int
    def __init__(self, source: _Optional[_Union[_common_pb2.KvSource, _Mapping]] = ..., block_bytes: _Optional[int] = ...) -> None: ...

class LendCachedRequest(_message.Message):
    __slots__ = ("token_ids", "cache_salt", "worker_id", "layout", "backend")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    token_ids: bytes
    cache_salt: str
    worker_id: str
    layout: _common_pb2.KvLayout
    backend: str
    def __init__(self, token_ids: _Optional[bytes] = ..., cache_salt: _Optional[str] = ..., worker_id: _Optional[str] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., backend: _Optional[str] = ...) -> None: ...

class LendCachedResponse(_message.Message):
    __slots__ = ("source", "layout")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    source: _common_pb2.KvSource
    layout: _common_pb2.KvLayout
    def __init__(self, source: _Optional[_Union[_common_pb2.KvSource, _Mapping]] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("digests",)
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    digests: bytes
    def __init__(self, digests: _Optional[bytes] = ...) -> None: ...

class KvExtent(_message.Message):
    __slots__ = ("key", "first_block", "num_blocks", "sequence_block")
    KEY_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_BLOCK_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    first_block: int
    num_blocks: int
    sequence_block: int
    def __init__(self, key: _Optional[bytes] = ..., first_block: _Optional[int] = ..., num_blocks: _Optional[int] = ..., sequence_block: _Optional[int] = ...) -> None: ...

class KvRecomputeCost(_message.Message):
    __slots__ = ("token_s", "attention_s")
    TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_S_FIELD_NUMBER: _ClassVar[int]
    token_s: float
    attention_s: float
    def __init__(self, token_s: _Optional[float] = ..., attention_s: _Optional[float] = ...) -> None: ...

class KvLookupRequest(_message.Message):
    __slots__ = ("block_hashes", "layout", "extents")
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    EXTENTS_FIELD_NUMBER: _ClassVar[int]
    block_hashes: bytes
    layout: _common_pb2.KvLayout
    extents: _containers.RepeatedCompositeFieldContainer[KvExtent]
    def __init__(self, block_hashes: _Optional[bytes] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., extents: _Optional[_Iterable[_Union[KvExtent, _Mapping]]] = ...) -> None: ...

class KvLookupResponse(_message.Message):
    __slots__ = ("num_blocks", "layout", "extent_blocks")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    EXTENT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    layout: _common_pb2.KvLayout
    extent_blocks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, num_blocks: _Optional[int] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., extent_blocks: _Optional[_Iterable[int]] = ...) -> None: ...

class KvGetRequest(_message.Message):
    __slots__ = ("block_hashes", "layout", "backend", "token_ids", "extents", "contexts", "recompute_cost")
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EXTENTS_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_COST_FIELD_NUMBER: _ClassVar[int]
    block_hashes: bytes
    layout: _common_pb2.KvLayout
    backend: str
    token_ids: bytes
    extents: _containers.RepeatedCompositeFieldContainer[KvExtent]
    contexts: bytes
    recompute_cost: KvRecomputeCost
    def __init__(self, block_hashes: _Optional[bytes] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., backend: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., extents: _Optional[_Iterable[_Union[KvExtent, _Mapping]]] = ..., contexts: _Optional[bytes] = ..., recompute_cost: _Optional[_Union[KvRecomputeCost, _Mapping]] = ...) -> None: ...

class KvGetResponse(_message.Message):
    __slots__ = ("num_blocks", "source")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    source: _common_pb2.KvSource
    def __init__(self, num_blocks: _Optional[int] = ..., source: _Optional[_Union[_common_pb2.KvSource, _Mapping]] = ...) -> None: ...

class KvPutRequest(_message.Message):
    __slots__ = ("block_hashes", "source", "layout", "token_ids", "stored_layout", "extents", "tenant", "contexts")
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    STORED_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    EXTENTS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    block_hashes: bytes
    source: _common_pb2.KvSource
    layout: _common_pb2.KvLayout
    token_ids: bytes
    stored_layout: _common_pb2.KvLayout
    extents: _containers.RepeatedCompositeFieldContainer[KvExtent]
    tenant: str
    contexts: bytes
    def __init__(self, block_hashes: _Optional[bytes] = ..., source: _Optional[_Union[_common_pb2.KvSource, _Mapping]] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., token_ids: _Optional[bytes] = ..., stored_layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., extents: _Optional[_Iterable[_Union[KvExtent, _Mapping]]] = ..., tenant: _Optional[str] = ..., contexts: _Optional[bytes] = ...) -> None: ...

class KvPutResponse(_message.Message):
    __slots__ = ("num_stored", "num_present", "bytes_pulled")
    NUM_STORED_FIELD_NUMBER: _ClassVar[int]
    NUM_PRESENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_PULLED_FIELD_NUMBER: _ClassVar[int]
    num_stored: int
    num_present: int
    bytes_pulled: int
    def __init__(self, num_stored: _Optional[int] = ..., num_present: _Optional[int] = ..., bytes_pulled: _Optional[int] = ...) -> None: ...

class KvPinRequest(_message.Message):
    __slots__ = ("block_hashes", "ttl_ms")
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    block_hashes: bytes
    ttl_ms: int
    def __init__(self, block_hashes: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class KvPinResponse(_message.Message):
    __slots__ = ("num_pinned",)
    NUM_PINNED_FIELD_NUMBER: _ClassVar[int]
    num_pinned: int
    def __init__(self, num_pinned: _Optional[int] = ...) -> None: ...

class WatchBlocksRequest(_message.Message):
    __slots__ = ("from_revision", "incarnation")
    FROM_REVISION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    from_revision: int
    incarnation: str
    def __init__(self, from_revision: _Optional[int] = ..., incarnation: _Optional[str] = ...) -> None: ...

class WatchBlocksResponse(_message.Message):
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
