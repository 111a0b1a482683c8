"""The Kubernetes scale subresource as an `Orchestrator`, and the Lease by which one autoscaler leads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.config.config_exception import ConfigException
from kubernetes.aio.leaderelection.electionconfig import Config as ElectionConfig
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from sagellm_common.client.router import WorkerView
from sagellm_common.core.errors import ConfigError, PeerLost
from services.autoscaler.orchestrator import Workload

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 10.0
LEASE_S, RENEW_WITHIN_S, RETRY_S = 15, 10.0, 2.0
"""As kube-controller-manager has them; the library takes whole seconds for the first."""
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@asynccontextmanager
async def api_client(server: str = "") -> AsyncIterator[client.ApiClient]:
    """The pod's own account, else the kubeconfig; `server` (a URL) without credentials. Raises ConfigError."""
    settings = client.Configuration()
    try:
        if server:
            settings.host = server
        elif in_pod():
            config.load_incluster_config(client_configuration=settings)
        else:
            await config.load_kube_config(client_configuration=settings)
    except (ConfigException, OSError) as err:
        raise ConfigError(f"no Kubernetes API: {err}; run in a pod with a service account, or set KUBECONFIG") from err
    async with client.ApiClient(settings) as api:
        yield api


def in_pod() -> bool:
    return NAMESPACE_FILE.exists()


def own_namespace() -> str:
    """Of the pod; "default" outside of any."""
    return NAMESPACE_FILE.read_text().strip() if in_pod() else "default"


class KubernetesScale:
    """`targets`: deployment/NAME or statefulset/NAME in `namespace`. It needs get and patch of their scale."""

    flips = False
    fixed = False

    def __init__(self, api: client.ApiClient, namespace: str, targets: Mapping[Workload, str]) -> None:
        apps = client.AppsV1Api(api)
        self._namespace = namespace
        self._targets = targets
        self._read: dict[str, Callable[..., Awaitable[Any]]] = {
            "deployment": apps.read_namespaced_deployment_scale,
            "statefulset": apps.read_namespaced_stateful_set_scale,
        }
        self._patch: dict[str, Callable[..., Awaitable[Any]]] = {
            "deployment": apps.patch_namespaced_deployment_scale,
            "statefulset": apps.patch_namespaced_stateful_set_scale,
        }

    def look(self, workers: Sequence[WorkerView]) -> None:
        """It asks the API server."""

    def flip(self, count: int) -> None:
        raise ConfigError("pods of these workloads keep their roles; see autoscaler.pool_target")

    async def settle(self) -> str:
        return ""

    async def replicas(self, phase: Workload) -> int:
        kind, _, name = self._targets[phase].partition("/")
        scale = await self._call(self._read[kind](name, self._namespace, _request_timeout=CALL_TIMEOUT_S), phase)
        return int(scale.spec.replicas or 0)

    async def scale(self, phase: Workload, replicas: int) -> None:
        kind, _, name = self._targets[phase].partition("/")
        body = {"spec": {"replicas": replicas}}
        await self._call(self._patch[kind](name, self._namespace, body, _request_timeout=CALL_TIMEOUT_S), phase)
        log.info("%s scaled to %d", self._targets[phase], replicas)

    async def _call(self, call: Awaitable[Any], phase: Workload) -> Any:
        what = f"the scale of {self._targets[phase]} in namespace {self._namespace}"
        try:
            return await call
        except ApiException as err:
            if err.status == 404:
                raise ConfigError(f"autoscaler.{phase}_target: there is no {what}") from err
            if err.status in (401, 403):
                raise ConfigError(f"{what}: the service account may not; give its role get and patch of it") from err
            raise PeerLost(f"{what}: the API server answers {err.status} {err.reason}") from err
        except (aiohttp.ClientError, TimeoutError, OSError) as err:
            raise PeerLost(f"{what}: the API server cannot be reached: {err!r}") from err


class _Lock(LeaseLock):  # type: ignore[misc]
    """The library's own (37.0) fails to create a Lease: it asks for `pretty=True`, which its client wants as text."""

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        body = client.V1Lease(metadata=client.V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        try:
            await self.api_instance.create_namespaced_lease(namespace, body)
        except ApiException as err:
            log.info("the lease %s/%s was not created: %s %s", namespace, name, err.status, err.reason)
            return False
        return True


Work = Callable[[], Coroutine[Any, Any, None]]


async def lead(api: client.ApiClient, namespace: str, lease: str, identity: str, work: Work) -> None:
    """Runs `work` whenever this process holds the Lease, and cancels it when it lost it; until cancelled.

    Raises what `work` raises: a leader that does nothing would keep the others from it.
    """
    while True:
        for end in await _one_term(_Lock(lease, namespace, identity, api), work):
            if isinstance(end, Exception) and not isinstance(end, aiohttp.ClientError | OSError | TimeoutError):
                raise end
            if isinstance(end, Exception):
                log.warning("the lease %s/%s: the API server cannot be reached: %r", namespace, lease, end)
        await asyncio.sleep(RETRY_S)


async def _one_term(lock: LeaseLock, work: Work) -> list[BaseException | None]:
    """From candidate to leader until the lease is lost, or the work has ended; how both ended."""
    working: list[asyncio.Task[None]] = []

    async def leading() -> None:
        log.info("%s leads by the lease %s/%s", lock.identity, lock.namespace, lock.name)
        working.append(asyncio.create_task(work(), name="leading"))
        await asyncio.wait(working)
        election.cancel()

    async def lost() -> None:
        log.warning("%s lost the lease %s/%s", lock.identity, lock.namespace, lock.name)

    candidate = LeaderElection(ElectionConfig(lock, LEASE_S, RENEW_WITHIN_S, RETRY_S, leading, lost))
    election = asyncio.create_task(candidate.run(), name="election")
    try:
        await asyncio.wait([election])
    finally:
        for task in (election, *working):
            task.cancel()
        ends = await asyncio.gather(election, *working, return_exceptions=True)
    return ends
