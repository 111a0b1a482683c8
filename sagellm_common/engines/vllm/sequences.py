"""What the engine and its connectors know together about the sequences in vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

from sagellm_common.core.kv import Allocation
from sagellm_common.engines.base import EngineRequest
from sagellm_common.kv_runtime.backends.host import HostKvPool


@dataclass(slots=True, eq=False)
class VllmSequence:
    """A sequence and the blocks that hold KV of its first `num_saved_tokens` tokens. Used on the engine's thread."""

    request: EngineRequest
    allocation: Allocation | None
    stop_token_ids: frozenset[int]
    submitted_s: float | None
    """Until its first tokens."""
    num_saved_tokens: int = 0
    vllm_id: str = ""
    scheduled: bool = False
    out_of_blocks: bool = False
    new_tokens: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class SharedState:
    """One engine's pool and sequences (by request id)."""

    pool: HostKvPool
    sequences: dict[str, VllmSequence]


STATES: dict[str, SharedState] = {}
"""vLLM's engine id → state. vLLM makes its connectors itself, from its configuration: here they find what is theirs."""
