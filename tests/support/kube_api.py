"""A small Kubernetes API server: the scale of Deployments, and Leases with optimistic concurrency; in this process.

What it accepts and answers is held to the real one's published schemas in `tests/k8s`.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Object = dict[str, Any]


@dataclass
class KubeApi:
    """`objects` by (resource, name), all in namespace `llm`. `forbidden` answers 403, `down` answers 503, for all."""

    url: str = ""
    objects: dict[tuple[str, str], Object] = field(default_factory=dict)
    forbidden: bool = False
    down: bool = False
    scales: list[tuple[str, int]] = field(default_factory=list)
    """Deployments as they were scaled, in order."""
    _versions: Any = field(default_factory=lambda: itertools.count(1))

    def deployment(self, name: str, replicas: int) -> None:
        self.objects["deployments", name] = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": self._metadata(name),
            "spec": {"replicas": replicas},
            "status": {"replicas": replicas},
        }

    def replicas(self, name: str) -> int:
        return int(self.objects["deployments", name]["spec"]["replicas"])

    def _metadata(self, name: str) -> Object:
        return {"name": name, "namespace": "llm", "resourceVersion": str(next(self._versions))}

    def scale_of(self, name: str) -> Object:
        deployment = self.objects["deployments", name]
        return {
            "apiVersion": "autoscaling/v1",
            "kind": "Scale",
            "metadata": copy.deepcopy(deployment["metadata"]),
            "spec": {"replicas": deployment["spec"]["replicas"]},
            "status": {"replicas": deployment["status"]["replicas"], "selector": f"app={name}"},
        }

    # ---- HTTP ----

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._gate])
        scale = "/apis/apps/v1/namespaces/llm/deployments/{name}/scale"
        leases = "/apis/coordination.k8s.io/v1/namespaces/llm/leases"
        app.router.add_get(scale, self._get_scale)
        app.router.add_patch(scale, self._patch_scale)
        app.router.add_post(leases, self._create_lease)
        app.router.add_get(leases + "/{name}", self._get_lease)
        app.router.add_put(leases + "/{name}", self._put_lease)
        return app

    @web.middleware
    async def _gate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.down:
            return _status(503, "ServiceUnavailable", "the server is shutting down")
        if self.forbidden:
            return _status(403, "Forbidden", "the service account cannot do this")
        try:
            answer: web.StreamResponse = await handler(request)
        except KeyError:
            return _status(404, "NotFound", f"{request.path} not found")
        return answer

    async def _get_scale(self, request: web.Request) -> web.Response:
        return web.json_response(self.scale_of(request.match_info["name"]))

    async def _patch_scale(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        deployment = self.objects["deployments", name]
        deployment["spec"]["replicas"] = (await _merge_patch(request))["spec"]["replicas"]
        deployment["metadata"]["resourceVersion"] = str(next(self._versions))
        self.scales.append((name, deployment["spec"]["replicas"]))
        return web.json_response(self.scale_of(name))

    async def _create_lease(self, request: web.Request) -> web.Response:
        lease = await request.json()
        name = lease["metadata"]["name"]
        if ("leases", name) in self.objects:
            return _status(409, "AlreadyExists", f"leases {name} already exists")
        lease["metadata"] = self._metadata(name)
        self.objects["leases", name] = lease
        return web.json_response(lease, status=201)

    async def _get_lease(self, request: web.Request) -> web.Response:
        return web.json_response(self.objects["leases", request.match_info["name"]])

    async def _put_lease(self, request: web.Request) -> web.Response:
        name, lease = request.match_info["name"], await request.json()
        held = self.objects["leases", name]["metadata"]["resourceVersion"]
        if lease["metadata"].get("resourceVersion") != held:
            return _status(409, "Conflict", f"leases {name}: the object has been modified")
        lease["metadata"] = self._metadata(name)
        self.objects["leases", name] = lease
        return web.json_response(lease)


async def _merge_patch(request: web.Request) -> Object:
    """The fields that a patch sets, whether a merge patch or a list of JSON patch operations."""
    body = json.loads(await request.read())
    if isinstance(body, dict):
        return body
    raise web.HTTPUnsupportedMediaType(text="only merge patches are taken here")


def _status(code: int, reason: str, message: str) -> web.Response:
    body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return web.json_response(body | {"message": message, "reason": reason, "code": code}, status=code)


@asynccontextmanager
async def kube_api() -> AsyncIterator[KubeApi]:
    api = KubeApi()
    runner = web.AppRunner(api.app())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    api.url = f"http://{host}:{port}"
    try:
        yield api
    finally:
        await runner.cleanup()
