"""What the autoscaler knows of its cluster: routers' counters over HTTP, workers and learned costs from a router."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from sagellm_common.client.router import RouterClient, WorkerView
from sagellm_common.core.errors import ConfigError, PeerLost, SageError
from sagellm_common.core.types import WorkerRole, WorkerState
from sagellm_common.scheduler_ir.cost_model import CostModel
from services.autoscaler.capacity import WorkerLimits
from services.autoscaler.demand import Counters

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
REJECTIONS = frozenset({"QUEUE_FULL", "TENANT_QUOTA", "KV_EXHAUSTED", "NO_WORKER", "DRAINING"})
"""Outcomes of requests that were load all the same."""
DEFAULT_LIMITS = WorkerLimits(max_batch=16, kv_tokens=1 << 16)
"""Until a decode worker has told its own."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """`counters` by router; `workers` are all that the router knows of, and `*_ready` those that serve, by phase."""

    counters: Mapping[str, Counters]
    prefill_ready: int
    decode_ready: int
    limits: WorkerLimits
    workers: tuple[WorkerView, ...] = ()

    def least_requests(self, role: WorkerRole) -> int:
        """On the least busy worker of the role; 0: there is none."""
        return min((requests_on(worker) for worker in self.workers if serves(worker, role)), default=0)


class Observer:
    """`metrics` are host:port; a name with several addresses is as many routers."""

    def __init__(self, router: RouterClient, http: httpx.AsyncClient, metrics: Sequence[str], max_batch: int) -> None:
        self._router = router
        self._http = http
        self._metrics = tuple(metrics)
        self._max_batch = max_batch
        self.costs = CostModel()
        """As last told."""

    async def look(self) -> Cluster:
        """Raises PeerLost when no router answers; one of several that is silent is left out and logged."""
        view = await self._router.topology()
        await self._learn()
        return Cluster(
            await self._counters(),
            sum(serves(worker, WorkerRole.PREFILL) for worker in view.workers),
            sum(serves(worker, WorkerRole.DECODE) for worker in view.workers),
            self._limits(view.workers),
            view.workers,
        )

    async def _learn(self) -> None:
        try:
            self.costs = await self._router.cost_model()
        except SageError as err:
            log.warning("the router tells no costs, those of before are used: %s", err.message)

    def _limits(self, workers: Sequence[WorkerView]) -> WorkerLimits:
        """The smallest decode worker's: sequences go to any of them."""
        found = [
            (worker.kv.total_blocks * layout.block_size_tokens, layout.block_bytes // layout.block_size_tokens)
            for worker in workers
            if worker.kv is not None and worker.record.model is not None and serves(worker, WorkerRole.DECODE)
            for layout in [worker.record.model.kv_layout]
        ]
        kv_tokens, kv_bytes_per_token = min(found, default=(DEFAULT_LIMITS.kv_tokens, 0))
        return WorkerLimits(self._max_batch, kv_tokens, kv_bytes_per_token)

    async def _counters(self) -> dict[str, Counters]:
        addresses = [address for name in self._metrics for address in await _addresses(name)]
        texts = await asyncio.gather(*(self._scrape(address) for address in addresses))
        found = {address: counters_in(text) for address, text in zip(addresses, texts, strict=True) if text}
        if not found:
            raise PeerLost(f"no router tells its metrics at {', '.join(self._metrics)}; see autoscaler.routers")
        return found

    async def _scrape(self, address: str) -> str:
        try:
            response = await self._http.get(f"http://{address}/metrics", timeout=TIMEOUT_S)
            response.raise_for_status()
        except httpx.HTTPError as err:
            log.warning("the router at %s tells no metrics: %r", address, err)
            return ""
        return response.text


def serves(worker: WorkerView, role: WorkerRole) -> bool:
    """In that role alone."""
    return worker.kv is not None and worker.record.role is role and worker.record.state is WorkerState.SERVING


def requests_on(worker: WorkerView) -> int:
    return worker.running_requests + worker.waiting_requests


async def _addresses(name: str) -> list[str]:
    """host:port of everything behind a name. Raises ConfigError for what is no host:port."""
    host, colon, port = name.rpartition(":")
    if not colon or not port.isdigit():
        raise ConfigError(f"autoscaler.routers: {name!r} is no host:port")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except socket.gaierror as err:
        log.warning("the routers at %s are not found: %s", name, err)
        return []
    ips = {str(at[0]) for *_, at in found}
    return sorted(f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}" for ip in ips)


def counters_in(text: str) -> Counters:
    """Of a router's metrics page."""
    totals: dict[str, float] = {}
    rejected = 0.0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("sagellm_router_"):
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
            if sample.name == "sagellm_router_requests_total" and sample.labels.get("code") in REJECTIONS:
                rejected += sample.value

    def of(name: str) -> float:
        return totals.get(f"sagellm_router_{name}", 0.0)

    return Counters(
        requests=of("requests_total"),
        rejected=rejected,
        prompt_tokens=of("prompt_tokens_total"),
        kv_hit_tokens=of("kv_hit_tokens_total"),
        generated_tokens=of("generated_tokens_total"),
        in_flight=of("in_flight_requests"),
    )
