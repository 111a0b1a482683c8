"""Registration of the CPU with LMDeploy 0.11.0."""

from __future__ import annotations

import contextlib
import secrets
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lmdeploy.pytorch.backends.selector as selector
import lmdeploy.pytorch.engine.engine as engine
import lmdeploy.pytorch.engine.executor as executor
import lmdeploy.pytorch.engine.model_agent as model_agent
import lmdeploy.pytorch.strategies.ar.sampling as sampling_strategy
import lmdeploy.pytorch.weight_loader.model_weight_loader as weight_loader
import psutil
import torch
from lmdeploy.messages import PytorchEngineConfig

from sagellm_common.engines.lmdeploy.device_cpu.backend import CpuOpsBackend
from sagellm_common.engines.lmdeploy.device_cpu.cache import CpuCacheEngine, CpuStateCacheEngine
from sagellm_common.engines.lmdeploy.sampling import RowwiseLogitsProcessor


@dataclass
class CpuEngineConfig(PytorchEngineConfig):
    """PytorchEngineConfig that accepts device_type `cpu` and dtype `float32`.

    The original's checks are of CUDA devices; `sagellm_common.core.config` has checked the values already.
    """

    device_type: str = "cpu"

    def __post_init__(self) -> None:
        if self.device_type != "cpu":
            raise ValueError(f"device_type is {self.device_type!r}, not 'cpu'")


class _Stream:
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...


class _Event(_Stream):
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...


@contextlib.contextmanager
def _stream_context(_: Any) -> Iterator[None]:
    yield


class _TorchOnCpu(types.ModuleType):
    """torch as some of LMDeploy's modules see it: `cuda` replaced by synchronous stand-ins, and `seed` without effect.

    LMDeploy calls torch.seed() for each batch, although every sequence has a seed of its own. Without a GPU torch keeps
    each call, with its stack, for the day CUDA is initialised: a leak, and time in each step.
    """

    def __init__(self) -> None:
        super().__init__("torch")
        stream = _Stream()
        self.cuda = types.SimpleNamespace(
            Stream=_Stream,
            Event=_Event,
            stream=_stream_context,
            current_stream=lambda: stream,
            synchronize=lambda: None,
            empty_cache=lambda: None,
        )
        self.seed = lambda: secrets.randbits(63)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class CpuModelAgent(model_agent.BaseModelAgent):
    """LMDeploy's model agent with its device set to the CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.device = "cpu"

    def get_free_mem(self) -> int:
        return int(psutil.virtual_memory().available)

    def get_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """In float32 whatever the model's dtype: penalties, temperatures and sums of probabilities need it."""
        logits = self.patched_model.get_logits(hidden_states)
        return None if logits is None else logits.float()

    def build_cache_engine(self, pool_file: int | None = None) -> None:
        """Over the memory of `pool_file`, num_blocks × world_size × a rank's bytes of a block, or over its own."""
        with self.all_context():
            self.cache_engine = CpuCacheEngine(
                self.cache_config,
                self.model_config,
                rank=self.rank,
                tp_rank=self.dist_ctx.attn_tp_group.rank,
                world_size=self.dist_config.attn_tp,
                cache_stream=self.cache_stream,
                pool_file=pool_file,
            )
            self.state_cache_engine = CpuStateCacheEngine(self.cache_config)
            self.spec_agent.build_cache_engine(self.cache_stream)

    def warmup(self) -> None:
        """Nothing to capture or compile on a CPU."""


def _build_executor(model_path: str, *, dist_config: Any, **config: Any) -> Any:
    """LMDeploy's, but for several ranks."""
    if dist_config.world_size == 1:
        return executor.build_executor(model_path, dist_config=dist_config, **config)
    from sagellm_common.engines.lmdeploy.device_cpu import tensor_parallel

    return tensor_parallel.build_executor(model_path, dist_config=dist_config, **config)


def _on_cpu(value: Any, non_blocking: bool = False) -> Any:
    """It is there: a step's inputs are made for that step alone, so nothing needs a copy."""
    return value


class _Unrecorded(contextlib.ContextDecorator):
    """torch.profiler.record_function without effect: seven of them cost a tenth of a small model's step."""

    def __init__(self, name: str) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def install() -> None:
    """Makes LMDeploy in this process run on the CPU, and only there. Idempotent."""
    selector._get_backend = lambda: CpuOpsBackend
    model_agent.torch = sampling_strategy.torch = _TorchOnCpu()
    model_agent.BaseModelAgent = CpuModelAgent
    model_agent.CacheEngine = CpuCacheEngine
    model_agent.StateCacheEngine = CpuStateCacheEngine
    engine.build_executor = _build_executor
    model_agent._try_to_cuda = _on_cpu
    model_agent.FusedLogitsProcessor = RowwiseLogitsProcessor
    model_agent.record_function = _Unrecorded
    weight_loader.tqdm = lambda paths, **_: paths  # a worker's log is no place for a progress bar
