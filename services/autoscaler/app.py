"""HTTP of the autoscaler: probes, metrics, what was decided and why, and the same for an HPA and for KEDA.

    /health /ready /metrics
    /explain                                         the last decisions, the newest first
    /keda/{prefill|decode|pool}                      {"value": workers wanted}, for KEDA's metrics-api scaler
    /apis/custom.metrics.k8s.io/v1beta2/...          sagellm_wanted_replicas of the workloads, for a HPA

A HPA gets as many replicas as are wanted by an Object metric with averageValue 1.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.autoscaler.loop import Autoscaler
from services.autoscaler.orchestrator import Workload

GROUP_VERSION = "custom.metrics.k8s.io/v1beta2"
METRIC = "sagellm_wanted_replicas"
_RESOURCES = {"deployment": "deployments.apps", "statefulset": "statefulsets.apps"}
_KINDS = {"deployment": "Deployment", "statefulset": "StatefulSet"}


def make_app(autoscaler: Autoscaler, namespace: str, targets: Mapping[Workload, str]) -> Starlette:
    """`targets` as `autoscaler.{prefill,decode,pool}_target`."""

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)

    async def explain(_: Request) -> Response:
        return JSONResponse([step.to_dict() for step in reversed(autoscaler.steps)])

    async def keda(request: Request) -> Response:
        phase = request.path_params["phase"]
        if phase not in targets:
            return _not_found(f"no phase {phase!r}; there are {', '.join(targets)}")
        value = _wanted(autoscaler, phase)
        return _undecided() if value is None else JSONResponse({"value": value})

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/ready", health),
            Route("/metrics", metrics),
            Route("/explain", explain),
            Route("/keda/{phase}", keda),
            *_custom_metrics(autoscaler, namespace, targets),
        ]
    )


def make_custom_metrics_app(autoscaler: Autoscaler, namespace: str, targets: Mapping[Workload, str]) -> Starlette:
    """What API servers ask, and nothing else: any client that reaches the port may."""
    return Starlette(routes=_custom_metrics(autoscaler, namespace, targets))


def _custom_metrics(autoscaler: Autoscaler, namespace: str, targets: Mapping[Workload, str]) -> list[Route]:
    async def resources(_: Request) -> Response:
        found = [
            {"name": f"{_RESOURCES[kind]}/{METRIC}", "singularName": "", "namespaced": True, "kind": "MetricValueList"}
            | {"verbs": ["get"]}
            for kind in sorted({target.partition("/")[0] for target in targets.values()})
        ]
        return JSONResponse(
            {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": GROUP_VERSION, "resources": found}
        )

    async def metric(request: Request) -> Response:
        at = request.path_params
        for phase, target in targets.items():
            kind, _, name = target.partition("/")
            if (at["resource"], at["name"]) != (_RESOURCES[kind], name):
                continue
            if at["namespace"] != namespace or at["metric"] != METRIC:
                continue
            value = _wanted(autoscaler, phase)
            return _undecided() if value is None else JSONResponse(_values(namespace, kind, name, value))
        return _not_found(f"no metric {at['metric']} of {at['resource']}/{at['name']} in {at['namespace']}")

    base = f"/apis/{GROUP_VERSION}"
    return [Route(base, resources), Route(base + "/namespaces/{namespace}/{resource}/{name}/{metric}", metric)]


def _wanted(autoscaler: Autoscaler, workload: Workload) -> int | None:
    if not autoscaler.steps:
        return None
    now = autoscaler.steps[-1].decision
    return {"prefill": now.prefill, "decode": now.decode, "pool": now.prefill + now.decode}[workload]


def _values(namespace: str, kind: str, name: str, value: int) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    described = {"kind": _KINDS[kind], "namespace": namespace, "name": name, "apiVersion": "apps/v1"}
    item = {"describedObject": described, "metric": {"name": METRIC}, "timestamp": now, "value": str(value)}
    return {"kind": "MetricValueList", "apiVersion": GROUP_VERSION, "metadata": {}, "items": [item]}


def _undecided() -> Response:
    return _status(503, "ServiceUnavailable", "nothing is decided yet; ask the replica that leads, or later")


def _not_found(message: str) -> Response:
    return _status(404, "NotFound", message)


def _status(code: int, reason: str, message: str) -> Response:
    """As the API machinery of Kubernetes says it."""
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message}
    return JSONResponse(body | {"metadata": {}, "code": code}, status_code=code)
