"""Tensor parallelism on the CPU: rank 0 computes in the worker's own process, each other rank in a child of it.

    worker, rank 0 ──── each step's inputs, over a pipe ────► child, rank 1 …
      │    └─────── all_reduce after attention and MLP, Gloo on loopback ───────┘
      └── KV pool, one memory that all ranks map; a block: | part of rank 0 | part of rank 1 | … |

A block stays one run of bytes, so handoff, store and prefix cache know nothing of ranks. LMDeploy's own multi-process
executor needs the main thread for its signal handlers and waits without deadlines.

A rank that dies takes the engine with it: its sockets close, the collective that waits for it fails at once, and half
a model is of no use. A rank that only stops fails it after RANK_TIMEOUT_S.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import Pipe
from typing import Any

import lmdeploy.pytorch.engine.model_agent as model_agent
import torch
from lmdeploy.pytorch.config import ModelConfig
from lmdeploy.pytorch.devices import DeviceContext
from lmdeploy.pytorch.distributed import DistContext, DistGroup
from lmdeploy.pytorch.engine.executor.base import ExecutorBase
from lmdeploy.pytorch.engine.executor.uni_executor import UniExecutor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]  # not in __all__

from sagellm_common.core import shared_memory

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 120.0
"""For all ranks to start Python, import LMDeploy and meet."""
RANK_TIMEOUT_S = 60.0
"""For the slowest rank to come to a collective."""
STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class RankSetup:
    """What a rank is told first. The KV pool's file descriptor is inherited."""

    rank: int
    world_size: int
    store_port: int
    pool_fd: int
    num_threads: int
    dist_config: Any
    agent: dict[str, Any]
    """Arguments of `build_model_agent`, LMDeploy's own types; the device and the ranks' context are made in place."""


def join_ranks(setup: RankSetup) -> DistContext:
    """LMDeploy's view of the ranks, over a process group of our own: its own one has no deadline. Blocks.

    Raises RuntimeError (torch's DistError among them) when the ranks do not meet.
    """
    limit = timedelta(seconds=START_TIMEOUT_S)
    store = TCPStore(LOOPBACK, setup.store_port, is_master=False, wait_for_workers=False, timeout=limit)
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    options._timeout = limit
    group = ProcessGroupGloo(PrefixStore("ranks", store), setup.rank, setup.world_size, options)
    group._set_default_timeout(timedelta(seconds=RANK_TIMEOUT_S))
    ranks = DistGroup(rank=setup.rank, cpu_group=group, gpu_group=group)
    return DistContext(
        rank=setup.rank,
        dist_config=setup.dist_config,
        tp_group=ranks,
        attn_tp_group=ranks,
        mlp_tp_group=ranks,
        moe_tp_group=ranks,
    )


def build_agent(setup: RankSetup) -> Any:
    """This rank's model agent, once all ranks have met."""
    return model_agent.build_model_agent(
        **setup.agent, device_ctx=DeviceContext(device_type="cpu"), dist_ctx=join_ranks(setup)
    )


class _Rank:
    """One child process, as rank 0 sees it."""

    def __init__(self, setup: RankSetup) -> None:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", "sagellm_common.engines.lmdeploy.device_cpu.rank", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(), setup.pool_fd),
                stdin=subprocess.DEVNULL,
                # What is imported there must be what is imported here, the patched LMDeploy above all.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self.send(pickle.dumps(setup))

    def send(self, message: bytes) -> None:
        """Raises OSError when the rank is gone."""
        self._pipe.send_bytes(message)

    def close(self) -> None:
        """The end of the pipe ends the rank."""
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
            return
        self._process.kill()
        self._process.wait()


class TpExecutor(UniExecutor):
    """UniExecutor with company: what it does to its model agent, the ranks do to theirs.

    The pipe carries pickles of LMDeploy's types between a process and its own child; nothing else can write to it.
    """

    def __init__(self, *, dist_config: Any, device_type: str, **agent: Any) -> None:
        """`agent`: what LMDeploy's executors take beside these two, which is what it makes a model agent of."""
        ExecutorBase.__init__(self, dist_config=dist_config, device_type=device_type, **agent)
        self._store = TCPStore(
            LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=START_TIMEOUT_S)
        )
        self._pool_fd = shared_memory.create_file()
        setups = [
            RankSetup(
                rank, self.world_size, self._store.port, self._pool_fd, torch.get_num_threads(), dist_config, agent
            )
            for rank in range(self.world_size)
        ]
        self._ranks: list[_Rank] = []
        self._started = False
        try:
            for setup in setups[1:]:
                self._ranks.append(_Rank(setup))
            self.model_agent = build_agent(setups[0])
        except BaseException:
            self.release()
            raise

    def build_model(self) -> None:
        self._tell("build_model")
        super().build_model()

    def set_cache_config(self, cache_config: Any, spec_cache_config: Any = None) -> None:
        self._tell("set_cache_config", cache_config, spec_cache_config)
        super().set_cache_config(cache_config, spec_cache_config)

    def set_model_config(self, model_config: Any, spec_model_config: Any = None) -> None:
        self._tell("set_model_config", model_config, spec_model_config)
        super().set_model_config(model_config, spec_model_config)

    def build_graph_runner(self) -> None:
        self._tell("build_graph_runner")
        super().build_graph_runner()

    def build_cache_engine(self) -> None:
        self._tell("build_cache_engine")
        self.model_agent.build_cache_engine(self._pool_fd)

    def start(self, forward_event: Any) -> None:
        """Once. Raises RuntimeError the second time: after a failed step the ranks no longer agree where they are."""
        if self._started:
            raise RuntimeError("a rank of this tensor-parallel engine failed; the worker must be restarted")
        self._started = True
        super().start(forward_event)

    async def forward_async(self, inputs: dict[str, Any]) -> None:
        """Raises RuntimeError when a rank is gone."""
        self._tell("step", inputs)
        await super().forward_async(inputs)

    def release(self) -> None:
        """Also of a half-built executor."""
        while self._ranks:
            self._ranks.pop().close()
        with contextlib.suppress(AttributeError):  # rank 0 was never built
            super().release()
        os.close(self._pool_fd)

    def _tell(self, operation: str, *args: Any) -> None:
        message = pickle.dumps((operation, args), protocol=pickle.HIGHEST_PROTOCOL)
        for number, rank in enumerate(self._ranks, start=1):
            try:
                rank.send(message)
            except OSError as err:
                raise RuntimeError(f"rank {number} of this tensor-parallel engine is gone; see its log above") from err


def build_executor(
    model_path: str,
    *,
    dist_config: Any,
    misc_config: Any,
    dtype: str,
    distributed_executor_backend: str | None,
    **config: Any,
) -> TpExecutor:
    """LMDeploy's `build_executor` for more than one rank on a CPU, where there is only one kind of executor."""
    model_config = ModelConfig.from_pretrained(
        model_path, trust_remote_code=True, dtype=dtype, hf_overrides=misc_config.hf_overrides, dist_config=dist_config
    )
    return TpExecutor(
        model_path=model_path, model_config=model_config, dist_config=dist_config, misc_config=misc_config, **config
    )
