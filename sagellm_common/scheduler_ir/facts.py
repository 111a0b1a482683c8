"""What the passes know beside the requests: the workers that a plan names, costs, and how KV crosses between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sagellm_common.scheduler_ir.cost_model import CostModel


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """`kv_tokens` fit into its pool, 0: not known. `queued_tokens` of prompts, with `queued_squares` the Σ (end² −
    start²) of them, are to be computed there; `sequences` decode there on `context_tokens` of KV, in as many batches
    as its pipeline has `stages`."""

    block_tokens: int
    kv_tokens: int = 0
    queued_tokens: int = 0
    queued_squares: int = 0
    sequences: int = 0
    context_tokens: int = 0
    stages: int = 1


@dataclass(frozen=True, slots=True)
class TransferHow:
    """As in IRNode; what is not known is left to the workers."""

    overlap: bool | None = None
    segment_bytes: int = 0
    wire_dtype: str = ""
    reason: str = ""


HowToTransfer = Callable[[str, str, int, int], TransferHow]
"""(source id, target id, tokens to be computed meanwhile, tokens to be moved) → how. None are computed: it is all
there."""


def _as_configured(source_id: str, target_id: str, compute_tokens: int, move_tokens: int) -> TransferHow:
    return TransferHow()


@dataclass(frozen=True, slots=True)
class Facts:
    """`workers` has all that the requests' placements name. `costs` None: nothing was learned.

    A token's KV has `kv_bytes_per_token` in `num_layers`; it `overlaps` where layers cross while later ones are
    computed. `chunk_tokens` is configured, 0: by the workers. Where prompts are computed between steps of who decodes,
    these are to keep `tpot_target_s`.
    """

    workers: Mapping[str, WorkerFacts]
    costs: CostModel | None = None
    how_to_transfer: HowToTransfer = field(default=_as_configured, compare=False)
    kv_bytes_per_token: int = 0
    num_layers: int = 1
    overlaps: bool = True
    chunk_tokens: int = 0
    tpot_target_s: float = math.inf
