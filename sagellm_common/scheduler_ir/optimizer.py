"""IRGraph → IRGraph: the passes in their order, and a check of what came of it."""

from __future__ import annotations

from collections.abc import Sequence

from sagellm_common.scheduler_ir.facts import Facts
from sagellm_common.scheduler_ir.ir_graph import IRGraph
from sagellm_common.scheduler_ir.passes import Pass
from sagellm_common.scheduler_ir.passes.legality import check_legal
from sagellm_common.scheduler_ir.passes.micro_batching import batch_decodes
from sagellm_common.scheduler_ir.passes.overlap import overlap_transfers
from sagellm_common.scheduler_ir.passes.prefill_chunking import chunk_prefills
from sagellm_common.scheduler_ir.passes.prefix_elision import elide_prefixes
from sagellm_common.scheduler_ir.passes.transfer_fusion import fuse_transfers
from sagellm_common.scheduler_ir.pd_separation import PDSeparator

REWRITES: tuple[Pass, ...] = (elide_prefixes, chunk_prefills, fuse_transfers, overlap_transfers, batch_decodes)
"""After the choice of devices, which says where there is something to elide, to chunk and to move."""


class IROptimizer:
    """`separator` chooses the devices: whether a prompt is computed where it was placed, or where it is decoded. (A
    worker's parallelism is chosen with it: engines are started with theirs, so there is one per worker.)"""

    def __init__(self, separator: PDSeparator | None = None, rewrites: Sequence[Pass] = REWRITES) -> None:
        self._passes: tuple[Pass, ...] = ((separator or PDSeparator()).split, *rewrites, check_legal)

    def optimize(self, graph: IRGraph, facts: Facts) -> IRGraph:
        """Raises IllegalPlan, ContextTooLong; see `passes.legality`."""
        for rewrite in self._passes:
            graph = rewrite(graph, facts)
        return graph
