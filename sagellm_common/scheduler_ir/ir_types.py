"""The execution plan of one request, as a value: which worker does what with which tokens, after what.

    Lookup ──► Fetch ──► Prefill ──► Transfer ──► Decode ──► Offload
    (prefill)  (prefill)  (prefill)   (decode)    (decode)   (decode)

Nodes that have nothing to do are left out; where decode computes the prompt itself, all of them are its. The wire
carries the plan, a trace shows it, `sagellm explain` prints it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class PlanNodeKind(enum.StrEnum):
    LOOKUP = "lookup"  # asks the store which prefix it holds
    FETCH = "fetch"  # pulls prefix blocks from the store, or out of another worker's cache
    PREFILL = "prefill"  # computes the KV of prompt tokens; after the last one there is a first new token
    TRANSFER = "transfer"  # pulls KV from the worker that computed it
    DECODE = "decode"  # generates
    OFFLOAD = "offload"  # gives full blocks to the store
    MIGRATE = "migrate"  # pulls the KV of a running sequence from the worker that decoded it so far
    SWITCH_MODEL = "switch_model"  # the worker leaves the model it serves for this request's
    VERIFY = "verify"  # checks tokens that a draft model proposed


WRITES_KV = frozenset({PlanNodeKind.FETCH, PlanNodeKind.PREFILL, PlanNodeKind.TRANSFER, PlanNodeKind.MIGRATE})
"""With DECODE and VERIFY, which write what they generate, the kinds that fill blocks of their worker."""


@dataclass(frozen=True, slots=True)
class IRNode:
    """One step on one worker, on tokens [start_token, end_token) of prompt + generated tokens.

    Of a transfer or migration: the worker pulled from (`source_id`), whether it is done along the prefill (None: as
    the workers are configured), how much KV is gathered before it is moved on (0: likewise), and in which dtype it
    crosses ("": likewise). Of a prefill: how many tokens are computed at a time (0: likewise). Of prefill and decode:
    `priority`, on their worker the larger goes first; `micro_batch`, which of its worker's batches a sequence steps in.
    Of a fetch: the worker `source_id` has it in its cache ("": the kv_stores have it).
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
    micro_batch: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.start_token <= self.end_token:
            raise ValueError(f"node {self.node_id}: tokens [{self.start_token}, {self.end_token}) are not a range")
        if self.chunk_tokens < 0:
            raise ValueError(f"node {self.node_id}: chunk_tokens is {self.chunk_tokens}, but must be at least 0")

    def cut(self, start_token: int, end_token: int, depends_on: tuple[int, ...], node_id: int | None = None) -> IRNode:
        """The same on other tokens. (As `dataclasses.replace`, at a third of its cost: passes do little else.)"""
        return IRNode(
            self.node_id if node_id is None else node_id,
            self.kind,
            self.worker_id,
            depends_on,
            start_token,
            end_token,
            self.overlap,
            self.segment_bytes,
            self.chunk_tokens,
            self.priority,
            self.wire_dtype,
            self.source_id,
            self.micro_batch,
        )


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """Nodes in an order that respects `depends_on`. `reason` says why these workers, for people.

    Raises ValueError when node ids repeat or a node depends on one that does not stand before it.
    """

    plan_id: str
    request_id: str
    strategy: str
    nodes: tuple[IRNode, ...]
    reason: str = ""

    def __post_init__(self) -> None:
        seen: set[int] = set()
        for node in self.nodes:
            if node.node_id in seen:
                raise ValueError(f"plan {self.plan_id}: node id {node.node_id} is used twice")
            if missing := [d for d in node.depends_on if d not in seen]:
                raise ValueError(f"plan {self.plan_id}: node {node.node_id} depends on unknown nodes {missing}")
            seen.add(node.node_id)

    def node(self, kind: PlanNodeKind) -> IRNode | None:
        """The first node of this kind."""
        return next((node for node in self.nodes if node.kind is kind), None)

    @property
    def prefill_worker_id(self) -> str | None:
        """Who computes the prompt for another worker to decode; None where nobody does."""
        prefill, decode = self.node(PlanNodeKind.PREFILL), self.node(PlanNodeKind.DECODE)
        return prefill.worker_id if prefill and decode and prefill.worker_id != decode.worker_id else None
