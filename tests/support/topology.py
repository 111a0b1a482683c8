"""Worker records for tests, and waiting for a snapshot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, cast

from sagellm_common.core.topology import TopologySnapshot, TopologyStore
from sagellm_common.core.types import KvLayout, ModelInfo, WorkerRecord, WorkerRole

LAYOUT = KvLayout(
    model_fingerprint="f1",
    dtype="float32",
    block_size_tokens=16,
    num_layers=2,
    num_kv_heads=2,
    head_dim=16,
    block_bytes=16384,
)
MODEL = ModelInfo(name="tiny", path="/models/tiny", context_length_tokens=128, vocab_size=512, kv_layout=LAYOUT)


def make_record(worker_id: str = "prefill-0", incarnation: str = "i1", **changes: Any) -> WorkerRecord:
    values: dict[str, Any] = {
        "role": WorkerRole.PREFILL,
        "address": "127.0.0.1:1",
        "data_address": "127.0.0.1:2",
        "pid": 1,
        "model": MODEL,
        "host_id": "here",
    }
    return WorkerRecord(worker_id=worker_id, incarnation=incarnation, **(values | changes))


async def until(
    store: TopologyStore, wanted: Callable[[TopologySnapshot], bool], timeout_s: float = 10.0
) -> TopologySnapshot:
    """The first snapshot that satisfies `wanted`; fails with the last one seen when none does in time."""
    seen = store.snapshot()
    try:
        async with asyncio.timeout(timeout_s), aclosing(cast("Any", store.changes())) as changes:
            async for seen in changes:
                if wanted(seen):
                    return seen
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s; last: {seen}") from None
    raise AssertionError(f"the store was closed; last: {seen}")


def ids(snapshot: TopologySnapshot) -> list[str]:
    return [record.worker_id for record in snapshot.workers]
