"""Every port of the project. No port literal stands anywhere else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SagePorts:
    """Ports of a cluster on one machine, counted from `base`. A worker uses four, see below."""

    base: int = 18800
    WORKERS_FROM = 10
    METRICS_FROM = 500
    SESSIONS_FROM = 750

    @property
    def gateway(self) -> int:
        return self.base

    @property
    def router(self) -> int:
        return self.base + 1

    @property
    def etcd_client(self) -> int:
        return 2379

    def worker(self, index: int) -> int:
        """gRPC port of the index-th worker (stores included)."""
        return self.base + self.WORKERS_FROM + 2 * index

    def worker_data(self, index: int) -> int:
        """KV byte path of the index-th worker."""
        return self.worker(index) + 1

    def session(self, index: int) -> int:
        """Framed sessions: router is 0, workers from 1."""
        return self.base + self.SESSIONS_FROM + index

    def metrics(self, index: int) -> int:
        """Prometheus port: router is 0, workers from 1. The gateway serves /metrics on its own port."""
        return self.base + self.METRICS_FROM + index
