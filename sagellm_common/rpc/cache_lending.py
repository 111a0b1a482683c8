"""What a worker's cache holds of a prompt, leased to another worker that would have to compute it."""

from __future__ import annotations

import secrets

from prometheus_client import Counter

from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.core.types import KvSource, TokenIds
from sagellm_common.kv_runtime.backend_protocol import KVBackendProtocol
from sagellm_common.kv_runtime.owned_blocks import OwnedBlocks
from sagellm_common.rpc.kv_source import describe_source
from sagellm_common.rpc.worker_service import WorkerView

EPOCH = 1

LENT = Counter("sagellm_worker_kv_lent_blocks", "Cached blocks leased to other workers for their prompts.")


class CacheLender:
    def __init__(self, pool: KVBackendProtocol, leases: HandoffSource, worker: WorkerView) -> None:
        self._pool = pool
        self._leases = leases
        self._worker = worker

    def lend(self, token_ids: TokenIds, cache_salt: str) -> KvSource | None:
        """The leading blocks of these tokens, under a lease of their own; None for none. Raises Draining."""
        self._worker.check_accepting()
        with OwnedBlocks(self._pool, self._pool.lend(token_ids, cache_salt)) as blocks:
            num_tokens = blocks.allocation.num_cached_tokens
            if not num_tokens:
                return None
            transfer_id = f"lent:{secrets.token_hex(8)}"
            pinned = self._leases.pin(transfer_id, EPOCH, blocks.allocation, num_tokens)
            blocks.hand_over()
        LENT.inc(len(pinned.block_ids))
        return describe_source(
            self._worker.record,
            self._pool.layout,
            transfer_id=transfer_id,
            epoch=EPOCH,
            block_ids=pinned.block_ids,
            num_tokens=num_tokens,
            lease_ttl_s=self._leases.ttl_s,
        )
