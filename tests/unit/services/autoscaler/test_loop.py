"""look → plan → act against an API server, and what HPA and KEDA are told."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import httpx
import pytest
from prometheus_client import CollectorRegistry

from sagellm_common.core.clock import ManualClock
from sagellm_common.core.config import AutoscalerConfig
from sagellm_common.core.errors import ConfigError, PeerLost
from services.autoscaler import kubernetes_scale
from services.autoscaler.app import make_app
from services.autoscaler.demand import Counters
from services.autoscaler.kubernetes_scale import KubernetesScale, api_client, lead
from services.autoscaler.loop import Autoscaler
from services.autoscaler.metrics import AutoscalerMetrics
from services.autoscaler.observe import Cluster, counters_in
from services.autoscaler.orchestrator import DryRun, Orchestrator, Phase
from services.autoscaler.planner import Planner
from tests.support.kube_api import KubeApi, kube_api
from tests.support.waiting import eventually
from tests.unit.services.autoscaler.test_planner import LIMITS, TARGETS, learned

TARGET_NAMES: dict[Phase, str] = {"prefill": "deployment/p", "decode": "deployment/d"}
CONFIG = AutoscalerConfig(interval_s=10, startup_s=10, scale_down_after_s=0, cooldown_s=30, max_prefill=40)


class Scripted:
    """A cluster as the test says."""

    def __init__(self) -> None:
        self.total = Counters()
        self.prefill_ready = self.decode_ready = 1

    def served(self, requests: int, prompt: int = 1000, output: int = 100) -> None:
        self.total += Counters(requests, 0, requests * prompt, 0, requests * output)

    async def look(self) -> Cluster:
        counters: Mapping[str, Counters] = {"router": self.total}
        return Cluster(counters, self.prefill_ready, self.decode_ready, LIMITS)


def autoscaler(cluster: Scripted, orchestrator: Orchestrator, clock: ManualClock) -> Autoscaler:
    costs = learned()
    planner = Planner(CONFIG, lambda: costs, TARGETS, LIMITS)
    return Autoscaler(CONFIG, cluster, planner, orchestrator, AutoscalerMetrics(CollectorRegistry()), clock)


def scale_of(api: KubeApi, client: object) -> KubernetesScale:
    return KubernetesScale(client, "llm", TARGET_NAMES)  # type: ignore[arg-type]


async def test_load_scales_deployments_up_and_down_again() -> None:
    cluster, clock = Scripted(), ManualClock()
    async with kube_api() as api, api_client(api.url) as client:
        api.deployment("p", 1)
        api.deployment("d", 1)
        scaler = autoscaler(cluster, scale_of(api, client), clock)
        assert await scaler.step() is None, "nothing to compare with"
        clock.advance(10)
        cluster.served(600)
        up = await scaler.step()
        assert up is not None
        high = api.replicas("p")
        assert high == up.decision.prefill > 6
        clock.advance(10)
        for _ in range(3):
            still = await scaler.step()
            clock.advance(10)
        assert still is not None
        assert "still starting" in still.done or "cooling down" in still.done
        assert api.replicas("p") == high, "workers that start are not given up at once"
        cluster.prefill_ready, cluster.decode_ready = high, api.replicas("d")
        for _ in range(40):
            await scaler.step()
            clock.advance(10)
        assert (api.replicas("p"), api.replicas("d")) == (1, 1)


async def test_a_dry_run_changes_nothing() -> None:
    cluster, clock = Scripted(), ManualClock()
    async with kube_api() as api, api_client(api.url) as client:
        api.deployment("p", 1)
        api.deployment("d", 1)
        scaler = autoscaler(cluster, DryRun(scale_of(api, client)), clock)
        await scaler.step()
        clock.advance(10)
        cluster.served(600)
        step = await scaler.step()
        assert step is not None
        assert step.decision.prefill > 6
        assert api.scales == []


async def test_errors_name_what_to_mend() -> None:
    async with kube_api() as api, api_client(api.url) as client:
        scale = scale_of(api, client)
        with pytest.raises(
            ConfigError, match=r"autoscaler\.prefill_target: there is no .* deployment/p in namespace llm"
        ):
            await scale.replicas("prefill")
        api.deployment("p", 1)
        api.forbidden = True
        with pytest.raises(ConfigError, match="give its role get and patch"):
            await scale.scale("prefill", 2)
        api.forbidden, api.down = False, True
        with pytest.raises(PeerLost, match="503"):
            await scale.replicas("prefill")
    async with api_client(api.url) as client:
        with pytest.raises(PeerLost, match="cannot be reached"):
            await scale_of(api, client).replicas("prefill")


async def test_one_leads_and_another_takes_over_when_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_scale, "LEASE_S", 2)
    monkeypatch.setattr(kubernetes_scale, "RENEW_WITHIN_S", 1.5)
    monkeypatch.setattr(kubernetes_scale, "RETRY_S", 1.01)
    leading: list[str] = []

    async def work(name: str) -> None:
        leading.append(name)
        try:
            await asyncio.Event().wait()
        finally:
            leading.remove(name)

    async with kube_api() as api, api_client(api.url) as client:
        first = asyncio.create_task(lead(client, "llm", "autoscaler", "a", lambda: work("a")))
        await eventually(lambda: leading == ["a"])
        second = asyncio.create_task(lead(client, "llm", "autoscaler", "b", lambda: work("b")))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert leading == []
        await eventually(lambda: leading == ["b"])
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)


async def test_a_leader_whose_work_fails_leads_no_more() -> None:
    async def work() -> None:
        raise ConfigError("no such deployment")

    async with kube_api() as api, api_client(api.url) as client:
        with pytest.raises(ConfigError, match="no such deployment"):
            await asyncio.wait_for(lead(client, "llm", "autoscaler", "a", work), 30)


async def test_hpa_and_keda_are_told_what_is_wanted() -> None:
    cluster, clock = Scripted(), ManualClock()
    base = "/apis/custom.metrics.k8s.io/v1beta2"
    async with kube_api() as api, api_client(api.url) as client:
        api.deployment("p", 1)
        api.deployment("d", 1)
        scaler = autoscaler(cluster, scale_of(api, client), clock)
        app = httpx.ASGITransport(make_app(scaler, "llm", TARGET_NAMES))
        async with httpx.AsyncClient(transport=app, base_url="http://autoscaler") as http:
            metric = f"{base}/namespaces/llm/deployments.apps/p/sagellm_wanted_replicas"
            assert (await http.get(metric)).status_code == 503
            assert (await http.get("/keda/prefill")).status_code == 503
            await scaler.step()
            clock.advance(10)
            cluster.served(600)
            step = await scaler.step()
            assert step is not None
            item = (await http.get(metric)).json()["items"][0]
            assert item["value"] == str(step.decision.prefill)
            assert item["describedObject"]["name"] == "p"
            assert (await http.get("/keda/decode")).json() == {"value": step.decision.decode}
            assert (await http.get(base)).json()["resources"][0]["name"] == "deployments.apps/sagellm_wanted_replicas"
            assert (await http.get(metric.replace("/p/", "/x/"))).json()["reason"] == "NotFound"
            assert (await http.get("/keda/other")).status_code == 404
            explained = (await http.get("/explain")).json()
            assert explained[0]["decision"]["reason"] == step.decision.reason


def test_a_routers_page_is_read_as_it_writes_it() -> None:
    page = """# TYPE sagellm_router_requests_total counter
sagellm_router_requests_total{code="OK"} 10.0
sagellm_router_requests_total{code="QUEUE_FULL"} 3.0
sagellm_router_requests_total{code="INVALID_ARGUMENT"} 1.0
# TYPE sagellm_router_prompt_tokens_total counter
sagellm_router_prompt_tokens_total 1000.0
# TYPE sagellm_router_in_flight_requests gauge
sagellm_router_in_flight_requests 2.0
"""
    assert counters_in(page) == Counters(14, 3, 1000, 0, 0, 2)
