"""How a worker describes blocks it has pinned to those that will pull them."""

from __future__ import annotations

from sagellm_common.core.types import BlockIds, KvLayout, KvSource, WorkerRecord


def describe_source(
    worker: WorkerRecord,
    layout: KvLayout,
    *,
    transfer_id: str,
    epoch: int,
    block_ids: BlockIds,
    num_tokens: int,
    lease_ttl_s: float,
    tokens_ready: int | None = None,
) -> KvSource:
    """A source of the first `num_tokens` tokens; `block_ids` may be longer than they need.

    `tokens_ready` of them are ready in all layers; None: all of them.
    """
    return KvSource(
        transfer_id=transfer_id,
        epoch=epoch,
        worker_id=worker.worker_id,
        incarnation=worker.incarnation,
        control_address=worker.address,
        data_address=worker.data_address,
        backend=worker.transport,
        block_table=block_ids[: -(-num_tokens // layout.block_size_tokens)],
        num_tokens=num_tokens,
        lease_expires_in_ms=round(lease_ttl_s * 1e3),
        layers_ready=layout.num_layers,
        tokens_ready=num_tokens if tokens_ready is None else tokens_ready,
        paths=worker.paths,
    )
