"""Placed requests → IRGraph: everything computed, nothing reused. What need not be done the passes take out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sagellm_common.scheduler_ir.facts import WorkerFacts
from sagellm_common.scheduler_ir.ir_graph import IRGraph, IRRequest, Nodes, full_blocks
from sagellm_common.scheduler_ir.ir_types import IRNode, PlanNodeKind


class IRBuilder:
    """One chain of nodes per request; see `ir_types`. `workers` has all that the placements name."""

    def __init__(self, workers: Mapping[str, WorkerFacts]) -> None:
        self._workers = workers

    def build(self, requests: Sequence[IRRequest]) -> IRGraph:
        nodes = tuple(map(self.chain, requests))
        return IRGraph(tuple(requests), nodes, (None,) * len(nodes))

    def chain(self, request: IRRequest) -> Nodes:
        placement, known, end = request.placement, request.known_tokens, request.end_token
        prefill, decode, store = placement.prefill_worker_id, placement.decode_worker_id, placement.kv_store_worker_id
        prompt, priority = request.prompt_tokens, request.view.priority
        nodes: list[IRNode] = []

        def then(
            kind: PlanNodeKind, worker_id: str, start: int, stop: int, priority: int = 0, source: str = ""
        ) -> None:
            number = len(nodes)
            after = (number - 1,) if number else ()
            nodes.append(IRNode(number, kind, worker_id, after, start, stop, None, 0, 0, priority, "", source))

        for worker_id in placement.switch_worker_ids:
            then(PlanNodeKind.SWITCH_MODEL, worker_id, 0, 0)
        decoded_from = known
        if request.migrate_from_worker_id is not None:
            # The KV of the newest token is written when it is fed: whoever goes on does that.
            decoded_from = known - 1
            then(PlanNodeKind.MIGRATE, decode, 0, decoded_from, 0, request.migrate_from_worker_id)
        elif request.kv_source_worker_id is not None:
            decoded_from = prompt
            then(PlanNodeKind.TRANSFER, decode, 0, prompt, 0, request.kv_source_worker_id)
        else:
            # What was emitted already is computed where it goes on.
            computes = prefill if prefill is not None and not request.num_emitted_tokens else decode
            if store is not None and (cacheable := self._full_blocks(computes, prompt - 1)):
                then(PlanNodeKind.LOOKUP, computes, 0, cacheable)
            then(PlanNodeKind.PREFILL, computes, 0, known, priority)
            if computes != decode:
                then(PlanNodeKind.TRANSFER, decode, 0, prompt, 0, computes)
        then(PlanNodeKind.DECODE, decode, decoded_from, end, priority)
        if request.num_draft_tokens:
            then(PlanNodeKind.VERIFY, decode, decoded_from, end)
        if store is not None and (full := self._full_blocks(decode, end)):
            then(PlanNodeKind.OFFLOAD, decode, 0, full)
        return tuple(nodes)

    def _full_blocks(self, worker_id: str, tokens: int) -> int:
        return full_blocks(tokens, self._workers[worker_id].block_tokens)
