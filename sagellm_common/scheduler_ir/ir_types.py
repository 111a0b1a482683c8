"""The execution plan of one request, as a value: which worker does what with which tokens, after what.

    Lookup ──► Fetch ──► Prefill ──► Transfer ──► Decode ──► Offload
    (prefill)  (prefill)  (prefill)   (decode)    (decode)   (decode)

Nodes that have nothing to do are left out; without a prefill, lookup and fetch are on decode. The wire carries the
plan, a trace shows it, `sagellm explain` prints it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class PlanNodeKind(enum.StrEnum):
    LOOKUP = "lookup"  # asks the store which prefix it holds
    FETCH = "fetch"  # pulls prefix blocks from the store, or out of another worker's cache
    PREFILL = "prefill"  # computes the KV of prompt tokens and samples the first token
    TRANSFER = "transfer"  # pulls KV from the prefill worker
    DECODE = "decode"  # generates; computes any token whose KV is not there
    OFFLOAD = "offload"  # gives full blocks to the store


@dataclass(frozen=True, slots=True)
class PlanNode:
    """One step on one worker, on tokens [start_token, end_token) of prompt + generated tokens.

    Of a transfer: whether it is done along the prefill (None: as the workers are configured), how much KV is gathered
    before it is moved on (0: likewise), and in which dtype it crosses ("": likewise). Of a prefill: how many tokens are
    computed at a time (0: likewise). Of prefill and decode: `priority`, on their worker the larger goes first. Of a
    fetch: the worker `source_id` has it in its cache ("": the kv_stores have it).
    """

    node_id: int
    kind: PlanNodeKind
    worker_id: str
    depends_on: tuple[int, ...]
    start_token: int
    end_token: int
    overlap: bool | None = None
    segment_bytes: int = 0
    chunk_tokens: int = 0
    priority: int = 0
    wire_dtype: str = ""
    source_id: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.start_token <= self.end_token:
            raise ValueError(f"node {self.node_id}: tokens [{self.start_token}, {self.end_token}) are not a range")
        if self.chunk_tokens < 0:
            raise ValueError(f"node {self.node_id}: chunk_tokens is {self.chunk_tokens}, but must be at least 0")


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """Nodes in an order that respects `depends_on`. `reason` says why these workers, for people.

    Raises ValueError when node ids repeat or a node depends on one that does not stand before it.
    """

    plan_id: str
    request_id: str
    strategy: str
    nodes: tuple[PlanNode, ...]
    reason: str = ""

    def __post_init__(self) -> None:
        seen: set[int] = set()
        for node in self.nodes:
            if node.node_id in seen:
                raise ValueError(f"plan {self.plan_id}: node id {node.node_id} is used twice")
            if missing := [d for d in node.depends_on if d not in seen]:
                raise ValueError(f"plan {self.plan_id}: node {node.node_id} depends on unknown nodes {missing}")
            seen.add(node.node_id)

    def node(self, kind: PlanNodeKind) -> PlanNode | None:
        """The first node of this kind."""
        return next((node for node in self.nodes if node.kind is kind), None)
