"""A cluster on this machine: one process per service, started in order, kept alive, stopped in order.

start:  router → workers (together) → gateway → the gateway says it is ready
stop:   gateway → workers (together) → router
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import services
from sagellm_common.core.config import Config
from sagellm_common.core.config_loader import ENV_PREFIX, NOT_SETTINGS, dump_config
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.ports import SagePorts
from sagellm_common.core.types import WorkerRole
from sagellm_common.rpc.worker_main import MODEL_ROLES
from services.cli.home import ClusterHome, ClusterState, ProcessState
from services.cli.process import ExitedEarly, Ready, ServiceProcess, describe_exit

START_TIMEOUT_S = 120.0
READY_POLL_S = 0.05
STOP_MARGIN_S = 5.0
"""For a process that has drained, or had its grace, to end."""

BACKOFF_S = (0.2, 1.0, 2.0, 4.0, 8.0)
"""Delays before restarts of a process that keeps dying; then it is left alone."""
HEALTHY_S = 30.0


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """Something a person watching wants to know."""

    kind: Literal["starting", "ready", "died", "restarting", "gave up", "stopped"]
    process_id: str
    detail: str = ""


class StartFailed(Exception):
    """A process did not come up. `tail` is what it said last."""

    def __init__(self, process_id: str, reason: str, tail: tuple[str, ...], log: Path) -> None:
        super().__init__(f"{process_id} {reason}")
        self.process_id = process_id
        self.reason = reason
        self.tail = tail
        self.log = log


@dataclass(slots=True)
class Member:
    """One process of the cluster, over its restarts."""

    id: str
    role: str
    ports: dict[str, int]
    """Flag → port; 0 is ephemeral."""
    process: ServiceProcess | None = None
    ready: Ready | None = None
    keeper: asyncio.Task[None] | None = None


@dataclass(slots=True)
class Cluster:
    """Owns its processes from `start` to `stop`. All calls on one event loop.

    `config.model.path` is set. With `restart` a process that dies is started again under its id; after it has lived
    `healthy_s` a death counts as the first again. One that ends well was told to: it stays away.
    """

    config: Config
    home: ClusterHome
    num_prefill: int = 1
    num_decode: int = 1
    on_event: Callable[[ClusterEvent], None] = lambda _: None
    restart: bool = True
    healthy_s: float = HEALTHY_S
    members: dict[str, Member] = field(default_factory=dict)
    _num_workers: int = 0
    _complete: bool = False

    @property
    def router_address(self) -> str:
        return self._address("router")

    @property
    def gateway_url(self) -> str:
        address = self._address("gateway")
        return f"http://{address}" if address else ""

    @property
    def workers(self) -> list[Member]:
        return [m for m in self.members.values() if m.role not in ("router", "gateway")]

    async def start(self) -> None:
        """Returns when the cluster serves. Raises StartFailed or ConfigError; call `stop` then too."""
        ports = SagePorts(self.config.cluster.port_base)
        self.home.config_file.write_text(dump_config(self.config))
        self._add(
            "router",
            "router",
            {
                "--port": self._port(ports.router),
                "--session-port": self._port(ports.session(0)),
                "--metrics-port": self._port(ports.metrics(0)),
            },
        )
        roles = {WorkerRole.PREFILL: self.num_prefill, WorkerRole.DECODE: self.num_decode}
        roles[WorkerRole.KV_STORE] = self.config.kv_store.stores if self.config.kv_store.enabled else 0
        for role, count in roles.items():
            for _ in range(count):
                self._add_worker(role)
        self._add("gateway", "gateway", {"--port": self._port(ports.gateway)})
        check_free(self.config.cluster.host, self.members.values(), ports.base)

        await self._begin(self.members["router"])
        await self._begin(*self.workers)
        await self._begin(self.members["gateway"])
        await self._wait_until_serving()
        self._complete = True
        self._publish()

    async def stop(self) -> None:
        """Everything is dead when it returns. Idempotent."""
        for group in (["gateway"], [m.id for m in self.workers], ["router"]):
            await asyncio.gather(*(self._end(self.members[id]) for id in group if id in self.members))

    def kill_all(self) -> None:
        """For those who cannot wait: `stop` then returns at once."""
        for member in self.members.values():
            if member.process:
                member.process.signal(signal.SIGKILL)

    async def kill(self, process_id: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal; after SIGKILL, returns when the process is dead. Raises KeyError for an unknown id."""
        process = self.members[process_id].process
        if process:
            process.signal(number)
            if number == signal.SIGKILL:
                await process.wait()

    async def restart_process(self, process_id: str) -> None:
        """Stops a process if it runs, and starts it again. Raises StartFailed, KeyError."""
        await self._end(self.members[process_id])
        await self._begin(self.members[process_id])

    async def add_worker(self, role: WorkerRole) -> str:
        """One more worker; returns its id when it serves. Raises StartFailed."""
        member = self._add_worker(role)
        await self._begin(member)
        return member.id

    async def remove_worker(self, worker_id: str) -> None:
        """Drains and stops a worker. Raises KeyError."""
        await self._end(self.members[worker_id])
        del self.members[worker_id]
        self._publish()

    # ---- members ----

    def _add(self, process_id: str, role: str, ports: dict[str, int]) -> Member:
        self.members[process_id] = Member(process_id, role, ports)
        return self.members[process_id]

    def _add_worker(self, role: WorkerRole) -> Member:
        index, self._num_workers = self._num_workers, self._num_workers + 1
        ports = SagePorts(self.config.cluster.port_base)
        taken = {m.id for m in self.workers}
        process_id = next(id for id in _numbered(role.replace("_", "-")) if id not in taken)
        flags = {
            "--port": self._port(ports.worker(index)),
            "--data-port": self._port(ports.worker_data(index)),
            "--session-port": self._port(ports.session(1 + index)),
            "--metrics-port": self._port(ports.metrics(1 + index)),
        }
        return self._add(process_id, role, flags)

    def _port(self, port: int) -> int:
        return port if self.config.cluster.port_base else 0

    def _address(self, process_id: str) -> str:
        member = self.members.get(process_id)
        return member.ready.address if member and member.ready else ""

    def _argv(self, member: Member) -> list[str]:
        role = ["--role", member.role] if member.role in MODEL_ROLES else []
        service = "worker" if role else member.role
        argv = [sys.executable, "-m", f"services.{service}", *role, "--config", str(self.home.config_file)]
        for flag, port in member.ports.items():
            argv += [flag, str(port)]
        if member.role != "router":
            argv += ["--router", self.router_address]
        if member.role not in ("router", "gateway"):
            argv += ["--id", member.id]
        return argv

    # ---- life of a process ----

    async def _begin(self, *members: Member) -> None:
        """Starts them together; returns when all serve. Raises StartFailed of the first that does not."""
        loop = asyncio.get_running_loop()
        first: list[asyncio.Future[None]] = []
        for member in members:
            first.append(loop.create_future())
            member.keeper = asyncio.create_task(self._keep(member, first[-1]), name=f"keep {member.id}")
        try:
            await asyncio.gather(*first)
        finally:
            for future in first:
                future.cancel()

    async def _end(self, member: Member) -> None:
        if member.keeper:
            member.keeper.cancel()
            await asyncio.wait([member.keeper])
            member.keeper = None
            self.on_event(ClusterEvent("stopped", member.id))

    async def _keep(self, member: Member, first: asyncio.Future[None]) -> None:
        """Runs a process, again and again if it dies. Its first failure goes to `first` and ends it."""
        loop = asyncio.get_running_loop()
        backoff = iter(BACKOFF_S)
        while True:
            since = loop.time()
            try:
                code = await self._run_once(member, first)
                if code == 0:
                    self.on_event(ClusterEvent("stopped", member.id))
                    return
                reason = describe_exit(code)
            except (ExitedEarly, OSError) as err:
                early = err if isinstance(err, ExitedEarly) else ExitedEarly(f"cannot be started: {err}", ())
                reason = early.reason
                if not first.done():
                    log = self.home.log_file(member.id)
                    first.set_exception(StartFailed(member.id, early.reason, early.tail, log))
                    return
            self.on_event(ClusterEvent("died", member.id, reason))
            if not self.restart:
                return
            if loop.time() - since > self.healthy_s:
                backoff = iter(BACKOFF_S)
            delay_s = next(backoff, None)
            if delay_s is None:
                self.on_event(ClusterEvent("gave up", member.id, f"see {self.home.log_file(member.id)}"))
                return
            self.on_event(ClusterEvent("restarting", member.id, f"in {delay_s:g} s"))
            await asyncio.sleep(delay_s)

    async def _run_once(self, member: Member, first: asyncio.Future[None]) -> int:
        """One life of the process; its exit code. Raises ExitedEarly when it never served."""
        self.on_event(ClusterEvent("starting", member.id))
        process = await ServiceProcess.start(self._argv(member), child_env(), self.home.log_file(member.id))
        member.process = process
        try:
            member.ready = await process.ready(START_TIMEOUT_S)
            if member.role in ("router", "gateway"):
                # Others know its address: a restart keeps it.
                member.ports["--port"] = int(member.ready.address.rpartition(":")[2])
            self._publish()
            self.on_event(ClusterEvent("ready", member.id, member.ready.address))
            if not first.done():
                first.set_result(None)
            return await process.wait()
        finally:
            await process.stop(stop_grace_s(self.config))
            member.process = None
            self._publish()

    async def _wait_until_serving(self) -> None:
        """The gateway is ready when the router has workers for both roles."""
        import httpx

        async def answer() -> str:
            try:
                response = await http.get(f"{self.gateway_url}/ready")
                return "" if response.is_success else response.text
            except httpx.HTTPError as err:
                return repr(err)

        said = ""
        try:
            async with asyncio.timeout(START_TIMEOUT_S), httpx.AsyncClient(trust_env=False) as http:
                while said := await answer():  # noqa: ASYNC110 - another process
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError:
            reason = f"not ready within {START_TIMEOUT_S:g} s: {said[:200]}"
            raise StartFailed("gateway", reason, (), self.home.log_file("gateway")) from None

    def _publish(self) -> None:
        processes = (
            ProcessState(m.id, m.role, m.ready.pid, m.ready.address, m.ready.metrics_address)
            for m in self.members.values()
            if m.ready and m.process
        )
        self.home.write(
            ClusterState(
                name=self.home.name,
                pid=os.getpid(),
                model_path=self.config.model.path,
                ready=self._complete,
                gateway_url=self.gateway_url,
                router_address=self.router_address,
                processes=tuple(processes),
            )
        )


def stop_grace_s(config: Config) -> float:
    """In which a process that was told to stop has ended."""
    return config.cluster.drain_grace_s + STOP_MARGIN_S


def child_env(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a service: without settings, for those went into its configuration file already."""
    kept = {k: v for k, v in env.items() if not k.startswith(ENV_PREFIX) or k in NOT_SETTINGS}
    root = str(Path(next(iter(services.__path__))).parent)
    kept["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    kept["PYTHONUNBUFFERED"] = "1"
    return kept


def check_free(host: str, members: Iterable[Member], base: int) -> None:
    """Raises ConfigError naming the first port of `members` that is in use."""
    for member in members:
        for flag, port in member.ports.items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((host, port))
                except OSError as err:
                    raise ConfigError(
                        f"{host}:{port} ({member.id} {flag}): {err.strerror}; "
                        f"set cluster.port_base (now {base}) to another number, or to 0 for free ports"
                    ) from None


def _numbered(prefix: str) -> Iterator[str]:
    number = 0
    while True:
        yield f"{prefix}-{number}"
        number += 1
