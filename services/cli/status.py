"""The state of a cluster as one document: what its supervisor wrote, and what the router knows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sagellm_common.client.aio import AsyncClient
from sagellm_common.client.router import ClusterView, WorkerView
from services.cli.home import ClusterHome, ClusterState


class NotRunning(Exception):
    """No cluster of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"cluster {name!r} is not running; `sagellm up` starts one")


def running_state(name: str) -> ClusterState:
    """Raises NotRunning."""
    state = ClusterHome(name).read()
    if state is None:
        raise NotRunning(name)
    return state


async def view_of(state: ClusterState) -> ClusterView:
    """What the router knows. Raises SageError when it does not answer."""
    async with AsyncClient(state.router_address) as client:
        return await client.topology()


def status_document(state: ClusterState, view: ClusterView) -> dict[str, Any]:
    """For `--json`; keys are only ever added."""
    pids = {process.id: process.pid for process in state.processes}
    return {
        "name": state.name,
        "ready": state.ready,
        "pid": state.pid,
        "model_path": state.model_path,
        "gateway": {"url": state.gateway_url, "pid": pids.get("gateway")},
        "router": {"address": state.router_address, "pid": pids.get("router")},
        "topology": {"backend": view.backend, "connected": view.connected, "revision": view.revision},
        "workers": [_worker(worker) for worker in view.workers],
        "processes": [asdict(process) for process in state.processes],
    }


def _worker(worker: WorkerView) -> dict[str, Any]:
    record = worker.record
    return {
        "id": record.worker_id,
        "role": record.role.value,
        "state": record.state.value,
        "address": record.address,
        "data_address": record.data_address,
        "pid": record.pid,
        "incarnation": record.incarnation,
        "transport": record.transport,
        "session": worker.session,
        "engine": record.engine,
        "kv": asdict(worker.kv) if worker.kv else None,  # None: it does not answer
        "indexed": asdict(worker.indexed) if worker.indexed else None,  # None: the router knows nothing of its blocks
        "kv_health": asdict(worker.kv_health),
        "running_requests": worker.running_requests,
        "waiting_requests": worker.waiting_requests,
        "reservations": worker.reservations,
        "pinned_transfers": worker.pinned_transfers,
        "paths": [path.backend for path in record.paths] or [record.transport],
        "transport_changes": [{"key": key, "loaded": a, "now": b} for key, a, b in worker.transport_changes],
    }
