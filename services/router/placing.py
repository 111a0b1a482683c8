"""Workers and what they hold, as the strategy sees them; its answer, as an optimised plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sagellm_common.core.config import RouterConfig
from sagellm_common.core.types import KvPeer, WorkerRole
from sagellm_common.scheduler_ir.builder import IRBuilder
from sagellm_common.scheduler_ir.cost_model import CostModel
from sagellm_common.scheduler_ir.facts import Facts, TransferHow, WorkerFacts
from sagellm_common.scheduler_ir.ir_graph import IRRequest
from sagellm_common.scheduler_ir.ir_types import PlanNodeKind
from sagellm_common.scheduler_ir.optimizer import IROptimizer
from sagellm_common.scheduler_ir.strategies import RequestView, WorkerView
from services.router.generation import Generation
from services.router.load import Sent
from services.router.separations import Separations
from services.router.stages import Admitted, Matched, Routed, Seen
from services.router.strategies import Strategies, tpot_target_s, ttft_target_s
from services.router.transfers import TransferPlanner
from services.router.workers import WorkerLink


class Placer:
    """`costs` None: nothing is learned, so whether to disaggregate is not asked."""

    def __init__(
        self,
        config: RouterConfig,
        strategies: Strategies,
        transfers: TransferPlanner,
        separations: Separations,
        costs: CostModel | None,
    ) -> None:
        self._config = config
        self.strategies = strategies
        self._transfers = transfers
        self._separations = separations
        self._optimizer = IROptimizer(separations.separator)
        self._costs = costs

    def place(
        self, admitted: Admitted, matched: Matched, generation: Generation, links: Sequence[WorkerLink]
    ) -> Routed:
        """Raises NoWorker when none of `links` can decode, ContextTooLong for a prompt that its worker cannot hold."""
        resumed, pinned = bool(generation.emitted), generation.pinned
        by_id = {link.worker_id: link for link in links if not (resumed and link.record.role is WorkerRole.PREFILL)}
        view = self._view(admitted, generation, by_id)
        workers = [_view(link, matched) for link in by_id.values()]
        placement = proposed = self.strategies.place(view, workers)
        if resumed:
            how = f"KV pulled from {pinned.worker.worker_id}" if pinned else "KV recomputed"
            placement = replace(
                placement,
                prefill_worker_id=None,
                reason=f"resumed after {len(generation.emitted)} tokens, {how}; decode on {placement.decode_worker_id}",
            )
        if pinned:
            by_id[pinned.worker.worker_id] = pinned.worker
        request = IRRequest(
            view,
            placement,
            max_new_tokens=admitted.request.sampling.max_new_tokens,
            cached_tokens=matched.cached_tokens,
            stored_tokens=matched.stored_tokens,
            num_emitted_tokens=len(generation.emitted),
            kv_source_worker_id=pinned.worker.worker_id if pinned and not pinned.moved else None,
            migrate_from_worker_id=pinned.worker.worker_id if pinned and pinned.moved else None,
            attempt=generation.attempts,
        )
        peer, prefill_id = None, placement.prefill_worker_id
        if prefill_id is not None and self._config.peer_fetch:
            peer = _peer(by_id, prefill_id, matched, self._transfers)
            request = replace(request, peer=(peer.worker_id, peer.cached_tokens) if peer else None)
        hows: list[TransferHow] = []
        facts = self._facts(request, by_id, hows)
        graph = self._optimizer.optimize(IRBuilder(facts.workers).build([request]), facts)
        (plan,), (separation,) = graph.plans(), graph.separations
        if separation is not None:
            self._separations.decided(separation)
        if hows and hows[-1].reason:
            plan = replace(plan, reason=f"{plan.reason}; {hows[-1].reason}")
        prefill_id, decode_id = plan.prefill_worker_id, placement.decode_worker_id
        return Routed(
            plan,
            by_id[decode_id],
            by_id[prefill_id] if prefill_id else None,
            placement.expected_s if prefill_id else (),
            separation,
            Seen(view, workers, proposed),
            peer if any(node.kind is PlanNodeKind.FETCH and node.source_id for node in plan.nodes) else None,
        )

    def _view(self, admitted: Admitted, generation: Generation, by_id: Mapping[str, WorkerLink]) -> RequestView:
        num_tokens = len(admitted.request.prompt_token_ids)
        return RequestView(
            admitted.request.request_id,
            num_tokens,
            admitted.request.priority,
            lambda prefill_id, decode_id: self._transfers.pull_seconds(by_id[prefill_id], decode_id, num_tokens),
            waited_s=generation.age_s,
            ttft_target_s=ttft_target_s(self._config, admitted.request.service_class),
            tpot_target_s=tpot_target_s(self._config, admitted.request.service_class),
            model=admitted.model.name,
            service_class=admitted.request.service_class,
        )

    def _facts(self, request: IRRequest, by_id: Mapping[str, WorkerLink], hows: list[TransferHow]) -> Facts:
        """Of the workers that the request is placed on. `hows` gets what is told of its transfer."""
        placement, prompt = request.placement, request.prompt_tokens
        named = dict.fromkeys(filter(None, (placement.decode_worker_id, placement.prefill_worker_id)))

        def how_to_transfer(source_id: str, target_id: str, compute_tokens: int, move_tokens: int) -> TransferHow:
            source, target = by_id[source_id], by_id[target_id]
            wire_dtype = self._transfers.wire_dtype(source, target, prompt)
            overlap = None
            if compute_tokens:
                overlap = self._transfers.plan(source, target, compute_tokens=compute_tokens, move_tokens=move_tokens)
            how = TransferHow(wire_dtype=wire_dtype)
            if overlap is not None:
                how = TransferHow(overlap.overlap, overlap.segment_bytes, wire_dtype, overlap.reason)
            hows.append(how)
            return how

        model = by_id[placement.prefill_worker_id or placement.decode_worker_id].record.model
        assert model is not None, "a worker that prefills or decodes has a model"
        layout = model.kv_layout
        return Facts(
            {worker_id: _worker_facts(by_id[worker_id]) for worker_id in named},
            self._costs,
            how_to_transfer,
            kv_bytes_per_token=layout.block_bytes // layout.block_size_tokens,
            num_layers=layout.num_layers,
            overlaps=self._transfers.overlaps,
            chunk_tokens=self._config.prefill_chunk_tokens,
            tpot_target_s=request.view.tpot_target_s,
        )


def _peer(
    by_id: Mapping[str, WorkerLink], prefill_id: str, matched: Matched, transfers: TransferPlanner
) -> KvPeer | None:
    """Whose cache has the most of the prompt, and more than the prefill worker and the kv_stores; of equals the one
    with the quickest link there, as far as it is known."""
    least = max(matched.cached_tokens.get(prefill_id, 0), matched.stored_tokens)
    holders = [
        (tokens, by_id[worker_id])
        for worker_id, tokens in matched.cached_tokens.items()
        if tokens > least and worker_id in by_id and by_id[worker_id].record.role is not WorkerRole.KV_STORE
    ]
    if not holders:
        return None

    def rank(holder: tuple[int, WorkerLink]) -> tuple[int, float, int]:
        tokens, link = holder
        seconds = transfers.pull_seconds(link, prefill_id, tokens)
        return -tokens, math.inf if seconds is None else seconds, link.load

    tokens, link = min(holders, key=rank)
    return KvPeer(link.worker_id, link.record.incarnation, link.record.address, tokens)


def sent_of(admitted: Admitted, routed: Routed, num_emitted_tokens: int) -> Sent:
    """What the workers of this attempt have to do for it."""
    prompt = len(admitted.request.prompt_token_ids)
    compute = routed.plan.node(PlanNodeKind.PREFILL)
    computes = (routed.prefill or routed.decode).work if compute is not None else None
    return Sent(
        routed.decode.work,
        prompt + num_emitted_tokens,
        computes,
        compute.start_token if compute else prompt,
        compute.end_token if compute else prompt,
    )


def _worker_facts(link: WorkerLink) -> WorkerFacts:
    model, work = link.record.model, link.work
    assert model is not None, "a worker that prefills or decodes has a model"
    layout = model.kv_layout
    kv = link.status.kv if link.status is not None else None
    return WorkerFacts(
        layout.block_size_tokens,
        kv.total_blocks * layout.block_size_tokens if kv is not None else 0,
        work.queued_tokens,
        work.queued_squares,
        work.sequences,
        work.context_tokens,
        layout.pp,
    )


def _view(link: WorkerLink, matched: Matched) -> WorkerView:
    return WorkerView(
        worker_id=link.worker_id,
        role=link.record.role,
        outstanding=link.load,
        assigned=link.assigned,
        matched_tokens=matched.stored_tokens
        if link.record.role is WorkerRole.KV_STORE
        else matched.cached_tokens.get(link.worker_id, 0),
        queued_tokens=link.work.queued_tokens,
        queued_squares=link.work.queued_squares,
        sequences=link.work.sequences,
        context_tokens=link.work.context_tokens,
    )
