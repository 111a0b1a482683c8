"""Tells a source that its blocks are no longer needed, off the path of the request."""

from __future__ import annotations

from sagellm_common.core.types import KvSource
from sagellm_common.rpc.background import Background
from sagellm_common.rpc.kv_transfer_client import KvTransferClient


class LeaseReleaser:
    """`release` never waits, so it may stand in any `finally`. Where the message is lost, the lease's end frees."""

    def __init__(self, transfers: KvTransferClient, background: Background) -> None:
        self._transfers = transfers
        self._background = background

    def release(self, source: KvSource, committed: bool) -> None:
        self._background.spawn(
            self._transfers.release(source, committed),
            f"release transfer {source.transfer_id} at {source.worker_id}",
        )
