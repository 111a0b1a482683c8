"""What became of the store's blocks, read from the pool at scrape time."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric

from sagellm_common.kv_runtime.backends.host import HostKvPool


class StoreCollector:
    def __init__(self, pool: HostKvPool) -> None:
        self._pool = pool

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        blocks = CounterMetricFamily(
            "sagellm_kv_store_blocks",
            "Blocks stored, evicted, asked for and found (hit) or not (missed).",
            labels=["outcome"],
        )
        for outcome in ("stored", "evicted", "hit", "missed"):
            blocks.add_metric([outcome], self._pool.outcomes[outcome])
        yield blocks
