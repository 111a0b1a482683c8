"""Workers and what they hold, as the strategy sees them; its answer, as a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sagellm_common.core.config import RouterConfig
from sagellm_common.core.types import KvPeer, WorkerRole
from sagellm_common.scheduler_ir.builder import IRBuilder
from sagellm_common.scheduler_ir.ir_types import PlanNodeKind
from sagellm_common.scheduler_ir.strategies import RequestView, Strategy, WorkerView
from services.router.generation import Generation
from services.router.load import Sent
from services.router.stages import Admitted, Matched, Routed
from services.router.strategies import tpot_target_s, ttft_target_s
from services.router.transfers import TransferPlanner
from services.router.workers import WorkerLink


def place(
    admitted: Admitted,
    matched: Matched,
    generation: Generation,
    links: Sequence[WorkerLink],
    strategy: Strategy,
    transfers: TransferPlanner,
    config: RouterConfig,
) -> Routed:
    """Raises NoWorker when none of `links` can decode."""
    resumed = bool(generation.emitted)
    pinned = generation.pinned
    by_id = {link.worker_id: link for link in links if not (resumed and link.record.role is WorkerRole.PREFILL)}
    num_tokens = len(admitted.request.prompt_token_ids)
    request = RequestView(
        admitted.request.request_id,
        num_tokens,
        admitted.request.priority,
        lambda prefill_id, decode_id: transfers.pull_seconds(by_id[prefill_id], decode_id, num_tokens),
        waited_s=generation.age_s,
        ttft_target_s=ttft_target_s(config, admitted.request.service_class),
        tpot_target_s=tpot_target_s(config, admitted.request.service_class),
        model=admitted.model.name,
        service_class=admitted.request.service_class,
    )
    placement = strategy.place(request, [_view(link, matched) for link in by_id.values()])
    if resumed:
        how = f"KV pulled from {pinned.worker.worker_id}" if pinned else "KV recomputed"
        placement = replace(
            placement,
            prefill_worker_id=None,
            reason=f"resumed after {len(generation.emitted)} tokens, {how}; decode on {placement.decode_worker_id}",
        )
    decode_id, prefill_id = placement.decode_worker_id, placement.prefill_worker_id
    prompt, overlap = request.num_prompt_tokens, None
    if prefill_id is not None:
        overlap = transfers.plan(
            by_id[prefill_id],
            by_id[decode_id],
            compute_tokens=prompt - matched.cached_tokens.get(prefill_id, 0),
            move_tokens=prompt - matched.cached_tokens.get(decode_id, 0),
        )
    source = by_id[prefill_id] if prefill_id else pinned.worker if pinned else None
    if overlap is not None:
        placement = replace(placement, reason=f"{placement.reason}; {overlap.reason}")
    peer = _peer(by_id, prefill_id, matched, transfers) if prefill_id and config.peer_fetch else None
    plan = IRBuilder(_block_tokens(by_id[prefill_id or decode_id]), _block_tokens(by_id[decode_id])).build(
        request,
        placement,
        max_new_tokens=admitted.request.sampling.max_new_tokens,
        num_emitted_tokens=len(generation.emitted),
        prefill_cached_tokens=matched.cached_tokens.get(prefill_id or "", 0),
        decode_cached_tokens=matched.cached_tokens.get(decode_id, 0),
        store_cached_tokens=matched.stored_tokens,
        peer=(peer.worker_id, peer.cached_tokens) if peer else ("", 0),
        kv_source_worker_id=pinned.worker.worker_id if pinned else None,
        overlap=overlap.overlap if overlap else None,
        segment_bytes=overlap.segment_bytes if overlap else 0,
        chunk_tokens=config.prefill_chunk_tokens,
        wire_dtype=transfers.wire_dtype(source, by_id[decode_id], prompt) if source else "",
        attempt=generation.attempts,
    )
    expected_s = placement.expected_s if prefill_id else ()
    fetches = any(node.source_id for node in plan.nodes)
    return Routed(
        plan, by_id[decode_id], by_id[prefill_id] if prefill_id else None, expected_s, peer if fetches else None
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
    prefill, compute = routed.prefill, routed.plan.node(PlanNodeKind.PREFILL)
    return Sent(
        routed.decode.work,
        prompt + num_emitted_tokens,
        prefill.work if prefill else None,
        compute.start_token if compute else prompt,
        prompt,
    )


def _block_tokens(link: WorkerLink) -> int:
    assert link.record.model is not None, "a worker that prefills or decodes has a model"
    return link.record.model.kv_layout.block_size_tokens


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
