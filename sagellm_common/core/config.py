"""The one configuration: YAML file, then SAGELLM_* environment, then flags; strict, frozen, handed out by section."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from sagellm_common.core.types import WorkerRole

Eviction = Literal["adaptive", "cost-aware", "arc", "s3-fifo", "gdsf", "lfu", "lru"]
"""See kv_policy/eviction."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class ClusterConfig(Section):
    name: str = Field("local", min_length=1, description="separates clusters that share an etcd")
    host: str = Field("127.0.0.1", description="address that services bind and advertise")
    port_base: int = Field(18800, ge=0, le=64000, description="see SagePorts; 0 lets `sagellm up` find free ports")
    drain_grace_s: float = Field(
        10.0,
        ge=0,
        description="what runs in a process may finish, or move to others, for so long after it was told to stop",
    )


class ModelConfig(Section):
    path: str = Field("", description="directory of a Hugging Face checkpoint; empty: SmolLM2-135M-Instruct")
    name: str = Field("", description="name clients use; empty: the directory's name")


class EngineConfig(Section):
    kind: Literal["lmdeploy", "vllm"] = Field("lmdeploy", description="vllm: needs `make setup-vllm`")
    patches: Literal["auto", "off", "required"] = Field(
        "auto", description="our patches to the engine; auto: where `make setup` has made the patched copy"
    )
    device: Literal["auto", "cpu", "cuda", "ascend", "cambricon", "hygon", "kunlun"] = Field(
        "cpu", description="auto: the first usable accelerator, see `sagellm devices`"
    )
    cuda_graphs: bool = Field(True, description="false: slower decoding, easier to debug; no effect on other devices")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on the CPU, the device's best on others"
    )
    weights: Literal["dtype", "int8", "int8x2"] = Field(
        "dtype",
        description="linear layers on a CPU: in dtype; in int8 (fastest); in two planes of int8 (exact enough for the "
        "same greedy tokens as float32). dtype is then that of the KV",
    )
    kv_quant_bits: Literal[0, 4, 8] = Field(0, description="0 keeps KV in dtype")
    block_size_tokens: int = Field(16, ge=1, le=256)
    num_blocks: int = Field(512, ge=4, description="KV blocks of one worker")
    max_batch_size: int = Field(16, ge=1)
    max_prefill_tokens: int = Field(512, ge=16, description="tokens of one prefill chunk")
    context_length_tokens: int = Field(0, ge=0, description="0: the model's")
    prefix_caching: bool = True
    eviction: Eviction = Field("adaptive", description="which cached blocks go first; `sagellm kv policy` changes it")
    policy: Literal["fifo", "priority", "aging", "deadline", "feasible", "on_time"] = Field(
        "priority",
        description="who starts first and loses memory last; aging: by priority, to which each second waited adds one; "
        "deadline: the earlier of equal priority; feasible: the same, who is late anyway last; on_time: the same, "
        "first those of which the most can be in time",
    )
    prefill_tokens_per_decode_step: int = Field(
        0, ge=0, description="bounds how long prompts hold up who decodes on the same worker; 0: no bound"
    )
    threads: int = Field(1, ge=1, description="torch threads; one per process is best on two cores")
    tensor_parallel: int = Field(1, ge=1, le=64, description="ranks that share each layer, a process each")
    step_timeout_s: float = Field(
        600.0, gt=0, description="a step (on a CPU: a chunk of a prompt) that takes longer ends the worker: it hangs"
    )

    @field_validator("patches", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # how YAML reads `patches: off`

    @model_validator(mode="after")
    def _int8_goes_with(self) -> EngineConfig:
        """int8 weights are computed by the CPU kernels, in one rank, over KV that is kept as it is."""
        if self.weights != "dtype":
            for name, value, only in (
                ("kind", self.kind, "lmdeploy"),
                ("device", self.device, "cpu"),
                ("kv_quant_bits", self.kv_quant_bits, 0),
                ("tensor_parallel", self.tensor_parallel, 1),
            ):
                if value != only:
                    raise ValueError(f"weights {self.weights!r} needs {name} {only!r}, not {value!r}")
        return self


class RoleConfig(Section):
    """What the engines of one role do differently; what is not set is as in `engine`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    kv_quant_bits: Literal[0, 4, 8] | None = None
    block_size_tokens: int | None = Field(None, ge=1, le=256)
    num_blocks: int | None = Field(None, ge=4)
    max_batch_size: int | None = Field(None, ge=1)
    max_prefill_tokens: int | None = Field(None, ge=16)
    prefix_caching: bool | None = None
    eviction: Eviction | None = None
    threads: int | None = Field(None, ge=1)
    tensor_parallel: int | None = Field(None, ge=1, le=64)


class TransportConfig(Section):
    preset: Literal["", "high-bw", "low-latency", "low-cost"] = Field(
        "", description="values for the keys of this section that are not set themselves; see core/presets.yaml"
    )
    backend: Literal["auto", "tcp", "gloo", "nccl", "shm", "mooncake", "rdma"] = Field(
        "tcp",
        description="auto: for each peer the best byte path that both sides have, and tcp where it fails; shm: workers "
        "of one host copy KV out of each other's memory; nccl: between GPUs, one for each worker; mooncake: Mooncake's "
        "Transfer Engine over TCP; rdma: the same over InfiniBand or RoCE",
    )
    digest: bool = Field(True, description="checks an xxh3 digest per block")
    wire_dtype: Literal["same", "auto", "bf16", "fp16", "fp8", "int8", "int4"] = Field(
        "same",
        description="KV crosses in this dtype where that is smaller (tcp): faster over a slow link, and not exact. "
        "same: nothing is lost on the way; auto: bf16 or int8 where the link is so slow that it pays",
    )
    link_bytes_per_s: float = Field(
        0.0, ge=0, description="speed of the links for wire_dtype auto, until it is measured; 0: unknown, as same"
    )
    chunk_bytes: int = Field(
        0,
        ge=0,
        le=64 << 20,
        description="KV in one message at most; 0: as it suits the byte path (4 MiB; tcp where KV is staged: 2 MiB)",
    )
    pipeline_depth: int = Field(
        2, ge=1, le=16, description="messages under way at a time (gloo and nccl: the others keep none in buffers)"
    )
    fusion: Literal["auto", "off"] = Field(
        "auto",
        description="auto: small blocks share a message as far as the link's measured costs make that faster, within "
        "chunk_bytes; off: always chunk_bytes",
    )
    overlap: Literal["auto", "off"] = Field(
        "auto",
        description="decode pulls a prompt's KV while prefill still computes it; auto: where backend can (all but gloo "
        "and nccl)",
    )
    overlap_min_bytes: int | None = Field(
        None,
        ge=0,
        description="KV below this is pulled after prefill; unset: as planned from the costs of the link and the speed "
        "of prefill, and 4 MiB as long as those are not known",
    )
    segment_min_bytes: int = Field(
        256 << 10,
        ge=1,
        le=64 << 20,
        description="layers of a chunk are gathered up to this before they are pulled, unless the plan says otherwise",
    )
    timeout_s: float = Field(10.0, gt=0, description="longest silence of a peer during a pull")
    max_pulls: int = Field(32, ge=1, le=64, description="pulls of one worker at a time; more wait, by their priority")
    max_waiting_pulls: int = Field(256, ge=0, description="beyond these the least urgent get QUEUE_FULL")
    lease_ttl_s: float = Field(30.0, gt=0, description="after which blocks held for a dead party are freed")

    @field_validator("overlap", "fusion", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # how YAML reads `overlap: off`


class TopologyConfig(Section):
    backend: Literal["embedded", "etcd"] = "embedded"
    endpoints: tuple[str, ...] = Field((), description="etcd: all of its host:port")
    lease_ttl_s: float = Field(2.0, gt=0, description="a silent worker is gone after this")


class RpcConfig(Section):
    session: Literal["auto", "framed", "grpc"] = Field(
        "auto",
        description="what carries the session streams: framed TCP connections, several times as quick to answer, or "
        "gRPC; auto: framed where the peer offers it and can be reached",
    )
    tokens: Literal["relayed", "direct"] = Field(
        "relayed",
        description="how they come to clients: through the router, or straight from the decode worker, where the "
        "router only plans. A router and a client say so each for itself; a client that cannot reach a worker has its "
        "tokens relayed",
    )
    route_key: str = Field(
        "",
        description="shared by routers and workers, who then take direct requests only with a plan that a router has "
        "signed; empty: from everybody who can connect",
    )


StrategyName = Literal["fifo", "priority", "slo_aware", "adaptive", "aegaeon", "hybrid"]


class ServiceClass(Section):
    """What is different for requests that name this class; what is not set is as in `router`."""

    strategy: StrategyName | None = None
    priority: int = Field(0, ge=-1000, le=1000, description="added to the requests' own")
    ttft_target_ms: float | None = Field(None, ge=0)
    tpot_target_ms: float | None = Field(None, ge=0)


class RouterConfig(Section):
    address: str = Field(
        "", description="host:port, for gateways several with commas between them; empty: from cluster.port_base"
    )
    strategy: StrategyName = Field(
        "fifo",
        description="who gets a request: fifo and priority go by cached prefix and requests outstanding, slo_aware and "
        "hybrid by what they have learned that these cost in seconds: slo_aware by the soonest first token, hybrid by "
        "the least work within the targets; adaptive is fifo while there is little to do, and else hybrid; aegaeon "
        "groups by model. Set engine.policy to what goes with it: fifo, aging, feasible, on_time, fifo, on_time",
    )
    classes: dict[str, ServiceClass] = Field(
        {},
        description="of requests, which name theirs in the header x-sagellm-class or as service_class; "
        "`sagellm router strategy` changes their strategies while they are served",
    )
    disaggregate: Literal["auto", "always", "never"] = Field(
        "auto",
        description="whether prompts are computed on another worker than they are decoded on; auto: each as it is "
        "expected to cost less, and always while these costs are not learned (with fifo and priority: they are with "
        "cost_model_path)",
    )
    ttft_target_ms: float = Field(0.0, ge=0, description="hybrid: first tokens are to come within; 0: no target")
    tpot_target_ms: float = Field(
        0.0, ge=0, description="hybrid: later tokens are to come every so often; 0: no target"
    )
    cost_model_path: str = Field(
        "", description="file in which learned costs outlive the router (with it, fifo learns, too); empty: nowhere"
    )
    max_queue: int = Field(
        256,
        ge=1,
        description="requests in flight; more are turned away with QUEUE_FULL, unless one that waits counts for less: "
        "by priority, or with hybrid, adaptive and aegaeon because its tenant has more of them",
    )
    max_running: int = Field(
        0,
        ge=0,
        description="of which at the workers; the others wait in the router, by the strategy's order and, with those "
        "three, in turns of their tenants by the tokens these were given. 0: all",
    )
    request_timeout_s: float = Field(300.0, gt=0)
    max_attempts: int = Field(3, ge=1)
    prefill_chunk_tokens: int = Field(
        0,
        ge=0,
        description="plans have a prompt computed by so many tokens at a time: between them more urgent prompts go; "
        "0, or more than engine.max_prefill_tokens: by that",
    )
    peer_fetch: bool = Field(
        True,
        description="what another worker's cache has of a prompt beyond the prefill worker's and the kv_stores is "
        "fetched from there, unless it is sooner computed (kv_store.fetch)",
    )
    worker_grace_s: float = Field(2.0, ge=0, description="how long a new request waits for a worker when none is there")
    resume_grace_s: float = Field(30.0, ge=0, description="the same for a request whose worker was lost: its restart")


class AutoscalerConfig(Section):
    """Needs the router's targets and learned costs: `router.{ttft,tpot}_target_ms`, and a strategy that learns."""

    mode: Literal["act", "dry-run"] = Field("act", description="dry-run: says what it would do")
    interval_s: float = Field(15.0, gt=0, description="between two looks at the load")
    startup_s: float = Field(60.0, ge=0, description="until a new worker serves: so far ahead the load is forecast")
    season_s: float = Field(0.0, ge=0, description="after which load repeats, such as 86400; 0: it does not")
    forecast_sigmas: float = Field(
        1.0, ge=0, description="standard deviations of the forecast's past errors that are added to it"
    )
    scale_down_after_s: float = Field(120.0, ge=0, description="fewer workers once none more were needed for so long")
    cooldown_s: float = Field(30.0, ge=0, description="after a change, before the next; more load does not wait for it")
    min_prefill: int = Field(1, ge=1)
    max_prefill: int = Field(8, ge=1)
    min_decode: int = Field(1, ge=1)
    max_decode: int = Field(8, ge=1)
    max_workers: int = Field(0, ge=0, description="of both phases together, such as the accelerators there are; 0: any")
    routers: tuple[str, ...] = Field(
        (), description="host:port of the routers' metrics; a name with several addresses stands for all of them"
    )
    namespace: str = Field("", description="Kubernetes; empty: the pod's own")
    prefill_target: str = Field("", description="Kubernetes: the prefill workers, such as deployment/sagellm-prefill")
    decode_target: str = Field("", description="Kubernetes: the decode workers, such as deployment/sagellm-decode")
    pool_target: str = Field(
        "",
        description="in their place: one workload whose pods take either role, such as statefulset/sagellm; "
        "its size is set, and who of it prefills and who decodes. fixed: the workers that there are, of which only the "
        "roles change; that needs no Kubernetes",
    )
    lease: str = Field("", description="Kubernetes Lease by which one of several autoscalers leads; empty: it is alone")

    @field_validator("prefill_target", "decode_target", "pool_target")
    @classmethod
    def _names_a_workload(cls, value: str, info: ValidationInfo) -> str:
        kind, slash, name = value.partition("/")
        if info.field_name == "pool_target" and value == "fixed":
            return value
        if value and (kind not in ("deployment", "statefulset") or not slash or not name):
            raise ValueError("must be deployment/NAME or statefulset/NAME")
        return value

    @model_validator(mode="after")
    def _is_pool_or_not(self) -> Self:
        if self.pool_target and (self.prefill_target or self.decode_target):
            raise ValueError("pool_target goes without prefill_target and decode_target; leave one or the other empty")
        return self

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        for role in ("prefill", "decode"):
            lowest, highest = getattr(self, f"min_{role}"), getattr(self, f"max_{role}")
            if lowest > highest:
                raise ValueError(f"min_{role} {lowest} is more than max_{role} {highest}; lower it, or raise the other")
        if self.max_workers and self.min_prefill + self.min_decode > self.max_workers:
            raise ValueError(
                f"max_workers {self.max_workers} is less than min_prefill {self.min_prefill} and min_decode "
                f"{self.min_decode} together; raise it"
            )
        return self


class IndexConfig(Section):
    max_blocks: int = Field(
        1 << 24,
        ge=1,
        le=1 << 31,
        description="blocks of all workers together that a router knows of, 37 bytes each (320 where the index is not "
        "compiled); beyond that the least "
        "recently used are forgotten",
    )
    max_staleness_s: float = Field(
        2.0, gt=0, description="a worker that was silent for longer gets no credit for what it may have cached"
    )
    history_blocks: int = Field(
        1 << 16,
        ge=0,
        description="changes of its cache that a worker remembers for routers that come back, 130 bytes each; who has "
        "missed more is told everything again",
    )


class GatewayConfig(Section):
    max_body_bytes: int = Field(8 << 20, ge=1024)
    api_keys: tuple[str, ...] = Field((), description="empty: open to everybody who can connect")
    tenant_keys: dict[str, tuple[str, ...]] = Field(
        {}, description="API keys by tenant, see kv.tenants; who has none of these may name its tenant in a header"
    )


class TenantConfig(Section):
    guaranteed: float = Field(0.0, ge=0, le=1, description="share of each pool that it gets whenever it asks")
    limit: float = Field(1.0, gt=0, le=1, description="share that it never has more of, idle blocks included")

    @model_validator(mode="after")
    def _limit_holds_the_guarantee(self) -> Self:
        if self.guaranteed > self.limit:
            raise ValueError(f"guaranteed {self.guaranteed:g} is beyond limit {self.limit:g}; raise the limit")
        return self


class KvConfig(Section):
    self_check_s: float = Field(
        5.0,
        gt=0,
        description="an idle worker checks its block counts, and the digests of some cached blocks, this often",
    )
    defrag: Literal["idle", "live", "off"] = Field(
        "idle",
        description="moves KV so that free blocks lie in a row, which makes transfers of fewer pieces: while nothing "
        "runs, or (live) between steps, too",
    )
    defrag_bytes: int = Field(4 << 20, ge=1, description="KV moved at a time, about once a second")
    host_budget_bytes: int = Field(
        0,
        ge=0,
        description="of host memory on each prefill and decode worker (lmdeploy) for blocks that its cache had to give "
        "up: they come back on a prefix hit; 0: they are dropped",
    )
    tenants: dict[str, TenantConfig] = Field(
        {}, description="shares of the KV pools by tenant; `default`: all that have none of their own, together"
    )

    @field_validator("defrag", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # how YAML reads `defrag: off`

    @model_validator(mode="after")
    def _guarantees_fit(self) -> Self:
        total = sum(tenant.guaranteed for tenant in self.tenants.values())
        if total > 1 + 1e-9:
            raise ValueError(f"tenants: the guaranteed shares add up to {total:g}; lower them to 1 in all")
        return self


class KvDiskConfig(Section):
    """The kv_store's tier below memory. Off unless `path` is set."""

    path: str = Field(
        "", description="directory, best on NVMe, below which each store keeps its own; empty: memory is all there is"
    )
    budget_bytes: int = Field(8 << 30, ge=1 << 20, description="of the disk, for one store")
    write: Literal["through", "back"] = Field(
        "through",
        description="when blocks are copied to the disk: as they come, or when half of the memory waits for it, which "
        "writes less and loses more when the store dies",
    )
    migration: Literal["cost", "all"] = Field(
        "cost",
        description="which blocks are copied to the disk, and come back from it: those for which that is expected to "
        "take less time than computing them again, by what copies and prefills have taken so far; or all",
    )
    direct_io: bool = Field(False, description="past the system's cache, for disks faster than a copy in memory")
    dtype: Literal["same", "bf16", "fp16", "fp8", "int8", "int4"] = Field(
        "same",
        description="of blocks on the disk, where it is smaller: more of them fit, and what comes back from there is "
        "not exact; `sagellm explain` says by how much",
    )


class KvStoreConfig(Section):
    enabled: bool = True
    budget_bytes: int = Field(512 << 20, ge=1 << 20, description="of memory, for one store")
    stores: int = Field(1, ge=0, le=64, description="that `sagellm up` starts; prompts are sharded over all there are")
    replicas: int = Field(1, ge=1, le=8, description="stores that keep each block: one less may die without a hit lost")
    replication_bytes_per_s: float = Field(
        100e6, gt=0, description="that a store spends on giving blocks to others when stores come and go"
    )
    pin_share: float = Field(0.5, ge=0, le=1, description="of a store's blocks that may be pinned at a time")
    fetch: Literal["auto", "always"] = Field(
        "auto", description="auto: prefill computes what it would take longer to fetch, by what both took so far"
    )
    eviction: Eviction = Field("adaptive", description="which blocks go first; `sagellm kv policy` changes it")
    disk: KvDiskConfig = KvDiskConfig()


class TelemetryConfig(Section):
    otlp_endpoint: str = Field("", description="OpenTelemetry collector, gRPC; empty: no export")
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Config(Section):
    cluster: ClusterConfig = ClusterConfig()
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    prefill: RoleConfig = RoleConfig()
    decode: RoleConfig = RoleConfig()
    transport: TransportConfig = TransportConfig()
    topology: TopologyConfig = TopologyConfig()
    rpc: RpcConfig = RpcConfig()
    router: RouterConfig = RouterConfig()
    index: IndexConfig = IndexConfig()
    gateway: GatewayConfig = GatewayConfig()
    kv: KvConfig = KvConfig()
    kv_store: KvStoreConfig = KvStoreConfig()
    autoscaler: AutoscalerConfig = AutoscalerConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    def of_role(self, role: WorkerRole) -> Self:
        """As a worker of this role has it: with `engine` under what the role's own section says."""
        sections = {WorkerRole.PREFILL: self.prefill, WorkerRole.DECODE: self.decode}
        own = sections[role].model_dump(exclude_none=True) if role in sections else {}
        return self.model_copy(update={"engine": EngineConfig.model_validate(self.engine.model_dump() | own)})

    @model_validator(mode="after")
    def _roles_are_valid(self) -> Self:
        """What a role changes must go with the rest of `engine`."""
        for role in (WorkerRole.PREFILL, WorkerRole.DECODE):
            try:
                self.of_role(role)
            except ValidationError as err:
                raise ValueError(f"{role}: {err.errors()[0]['msg'].removeprefix('Value error, ')}") from err
        return self
