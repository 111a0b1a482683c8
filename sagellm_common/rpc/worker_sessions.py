"""Sessions with workers that a route names: one per worker, opened on first use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc

from sagellm_common.core.errors import PeerLost
from sagellm_common.core.types import WorkerAddress
from sagellm_common.rpc.carriers import Choice
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.session_client import SessionClient

S = TypeVar("S", bound=SessionClient[Any, Any, Any])


class WorkerSessions(Generic[S]):
    """That of an earlier incarnation is closed when the worker is asked for anew. The caller closes `channels`."""

    def __init__(
        self, make: Callable[[grpc.aio.Channel, str, str, Choice], S], channels: ChannelPool, choice: Choice
    ) -> None:
        self._make = make
        self._channels = channels
        self._choice = choice
        self._open: dict[str, tuple[WorkerAddress, S]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def get(self, worker: WorkerAddress) -> S:
        """Raises PeerLost once closed."""
        if self._closed:
            raise PeerLost(f"the sessions with workers are closed, that with {worker.worker_id}, too")
        known = self._open.get(worker.worker_id)
        if known is not None and known[0] == worker:
            return known[1]
        if known is not None:
            self._retire(*known, keep_channel=known[0].address == worker.address)
        session = self._make(self._channels.get(worker.address), worker.worker_id, worker.address, self._choice)
        self._open[worker.worker_id] = worker, session
        return session

    async def close(self) -> None:
        """Ends all sessions; calls waiting on them fail with PeerLost. Idempotent."""
        self._closed = True
        for worker_id in list(self._open):
            self._retire(*self._open.pop(worker_id), keep_channel=True)
        if self._closing:
            await asyncio.wait(self._closing)

    def _retire(self, worker: WorkerAddress, session: S, *, keep_channel: bool) -> None:
        async def end() -> None:
            await session.close()
            if not keep_channel:
                await self._channels.drop(worker.address)

        task = asyncio.create_task(end(), name=f"closing the session with {worker.worker_id}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
