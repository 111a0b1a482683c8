"""A cluster of real processes for tests, driven from synchronous or asynchronous code."""

from __future__ import annotations

import asyncio
import signal
import tempfile
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from sagellm_common.client.router import ClusterView
from sagellm_common.core.config_loader import load_config
from sagellm_common.core.types import WorkerRole
from services.cli.cluster import Cluster, StartFailed
from services.cli.home import ClusterHome, ClusterState
from services.cli.status import view_of
from tests.support.models import tiny_model

T = TypeVar("T")

CALL_TIMEOUT_S = 180.0


class RunningCluster:
    """Starts on entry, and leaves nothing behind. A dead process stays dead unless `restart`.

    `settings` are overrides such as "transport.backend=gloo"; `model` defaults to the tiny Llama. Ports are ephemeral.
    """

    def __init__(
        self,
        *settings: str,
        num_prefill: int = 1,
        num_decode: int = 1,
        model: Path | None = None,
        restart: bool = False,
    ) -> None:
        self._settings = (f"model.path={model or tiny_model('llama')}", "cluster.port_base=0", *settings)
        self._sizes = (num_prefill, num_decode)
        self._restart = restart
        # Spawned processes die with the thread that forked them: this one lives as long as the cluster.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cluster", daemon=True)

    def __enter__(self) -> Self:
        self._scratch = tempfile.TemporaryDirectory(prefix="sagellm-test-")
        self.home = ClusterHome("test", Path(self._scratch.name))
        self._owned = self.home.owned()
        self._owned.__enter__()
        config = load_config(None, {}, self._settings)
        self.config = config
        # Tests kill often: each death is the first.
        self.cluster = Cluster(config, self.home, *self._sizes, restart=self._restart, healthy_s=0.0)
        self._thread.start()
        try:
            self._run(self.cluster.start())
        except StartFailed as err:
            self.close()
            raise AssertionError("\n".join([str(err), *err.tail])) from err
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._run(self.cluster.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._owned.__exit__(None, None, None)
        self._scratch.cleanup()

    # ---- where ----

    @property
    def gateway_url(self) -> str:
        return self.cluster.gateway_url

    @property
    def router_address(self) -> str:
        return self.cluster.router_address

    @property
    def model_path(self) -> str:
        return self.config.model.path

    def address(self, process_id: str) -> str:
        """host:port of its gRPC server (of its HTTP server for the gateway)."""
        ready = self.cluster.members[process_id].ready
        assert ready is not None
        return ready.address

    def metrics_address(self, process_id: str) -> str:
        ready = self.cluster.members[process_id].ready
        assert ready is not None
        return ready.metrics_address

    def pid(self, process_id: str) -> int:
        process = self.cluster.members[process_id].process
        assert process is not None, f"{process_id} is dead"
        return process.pid

    def alive(self, process_id: str) -> bool:
        process = self.cluster.members[process_id].process
        return process is not None and process.running

    def log(self, process_id: str) -> str:
        return self.home.log_file(process_id).read_text()

    # ---- what happens to it ----

    def kill(self, process_id: str, number: signal.Signals = signal.SIGKILL) -> None:
        """After SIGKILL, returns when it is dead. SIGSTOP and SIGCONT make a silent peer."""
        self._run(self.cluster.kill(process_id, number))

    def restart(self, process_id: str) -> None:
        """Returns when it serves again, under the same id."""
        self._run(self.cluster.restart_process(process_id))

    def add_worker(self, role: WorkerRole) -> str:
        return self._run(self.cluster.add_worker(role))

    def remove_worker(self, worker_id: str) -> None:
        self._run(self.cluster.remove_worker(worker_id))

    # ---- what it says ----

    def state(self) -> ClusterState:
        state = self.home.read()
        assert state is not None
        return state

    def status(self) -> ClusterView:
        """The router's view of the workers, KV blocks included."""
        return self._run(view_of(self.state()))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_TIMEOUT_S)
