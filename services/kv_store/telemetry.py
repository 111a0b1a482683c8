"""What became of the store's blocks, read from the pool at scrape time."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from sagellm_common.kv_runtime.hierarchy import HierarchyManager

OUTCOMES = ("hit", "stored", "evicted", "torn", "failed", "dropped", "recovered")


class StoreCollector:
    def __init__(self, tiers: HierarchyManager) -> None:
        self._tiers = tiers
        self._pool = tiers.pool

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
        held = GaugeMetricFamily("sagellm_kv_store_tier_blocks", "Blocks of each tier.", labels=["tier", "state"])
        size = GaugeMetricFamily("sagellm_kv_store_tier_bytes", "KV held in each tier.", labels=["tier"])
        events = CounterMetricFamily(
            "sagellm_kv_store_tier_events",
            "Blocks hit, stored and evicted in each tier; found to be torn, not read or written, evicted above before "
            "they were written here, and there when the store began.",
            labels=["tier", "outcome"],
        )
        moved = CounterMetricFamily(
            "sagellm_kv_store_tier_moved_bytes", "KV read from and written to each tier.", labels=["tier", "direction"]
        )
        seconds = CounterMetricFamily(
            "sagellm_kv_store_tier_seconds",
            "Spent on reading from and writing to a tier.",
            labels=["tier", "direction"],
        )
        for tier in self._tiers.stats():
            held.add_metric([tier.name, "used"], tier.used_blocks)
            held.add_metric([tier.name, "free"], tier.total_blocks - tier.used_blocks)
            size.add_metric([tier.name], tier.used_bytes)
            for outcome in OUTCOMES:
                events.add_metric([tier.name, outcome], getattr(tier, f"{outcome}_blocks"))
            moved.add_metric([tier.name, "read"], tier.bytes_read)
            moved.add_metric([tier.name, "written"], tier.bytes_written)
            seconds.add_metric([tier.name, "read"], tier.read_s)
            seconds.add_metric([tier.name, "written"], tier.write_s)
        yield from (held, size, events, moved, seconds)
