"""What the device decides: LMDeploy's configuration and plug-in, and where its KV is. The rest is the same on all.

engine.device ──► probe ──► resolve: what is missing is said here ──► prepare ──► CpuDevice: our plug-in
                                                                             └──► NativeDevice: LMDeploy's own
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from sagellm_common.comm_backend.hardware import select_device
from sagellm_common.comm_backend.hardware.host import Host
from sagellm_common.core.capability import CapabilityDescriptor, DeviceKind
from sagellm_common.core.config import EngineConfig, TransportConfig
from sagellm_common.core.errors import ConfigError
from sagellm_common.core.kv import KvMemory

if TYPE_CHECKING:
    from lmdeploy.messages import PytorchEngineConfig

MIN_NATIVE_BLOCKS, MIN_NATIVE_BLOCK_TOKENS, CAMBRICON_BLOCK_TOKENS = 16, 16, 16
"""Of LMDeploy: `engine_checker.py`, `messages.py`, and its kernels."""


class Device(Protocol):
    def engine_config(self, **settings: Any) -> PytorchEngineConfig:
        """LMDeploy's configuration for this device."""

    def kv_memory(self, cache_engine: Any) -> KvMemory:
        """The blocks of LMDeploy's cache engine."""


def resolve(
    engine: EngineConfig, transport: TransportConfig, host: Host | None = None
) -> tuple[EngineConfig, CapabilityDescriptor]:
    """The configuration with `auto` replaced by what it is on this machine, and the device.

    Raises ConfigError for a device that cannot be used here, and for settings that it cannot serve.
    """
    found = select_device(engine.device, host)
    dtype = found.dtypes[0] if engine.dtype == "auto" else engine.dtype
    _check(found, engine, dtype, transport)
    return engine.model_copy(update={"device": found.kind.value, "dtype": dtype}), found


def _check(found: CapabilityDescriptor, engine: EngineConfig, dtype: str, transport: TransportConfig) -> None:
    def refuse(key: str, value: object, use: str) -> ConfigError:
        return ConfigError(f"{key}: {value!r} cannot be served on device {found.kind.value!r}; use {use}")

    if dtype not in found.dtypes:
        raise refuse("engine.dtype", dtype, " or ".join(found.dtypes))
    if engine.kv_quant_bits not in found.kv_quant_bits:
        raise refuse("engine.kv_quant_bits", engine.kv_quant_bits, " or ".join(map(str, found.kv_quant_bits)))
    if transport.backend not in ("auto", *found.transport.byte_paths):  # auto offers what the KV memory can do
        raise refuse("transport.backend", transport.backend, " or ".join(found.transport.byte_paths))
    if found.kind is DeviceKind.CPU:
        return
    if engine.tensor_parallel > 1:  # its ranks would be processes of LMDeploy's, whose KV this one cannot reach
        raise refuse("engine.tensor_parallel", engine.tensor_parallel, "1, and more workers")
    size = engine.block_size_tokens
    if found.kind is DeviceKind.CAMBRICON and size != CAMBRICON_BLOCK_TOKENS:
        raise refuse("engine.block_size_tokens", size, str(CAMBRICON_BLOCK_TOKENS))
    if size < MIN_NATIVE_BLOCK_TOKENS or size & (size - 1):
        raise refuse("engine.block_size_tokens", size, "16 or a greater power of two; 64 is fast")
    if engine.num_blocks < MIN_NATIVE_BLOCKS:
        raise refuse("engine.num_blocks", engine.num_blocks, f"at least {MIN_NATIVE_BLOCKS}")


def prepare(engine: EngineConfig, found: CapabilityDescriptor) -> Device:
    """Sets this process up for the device. Before anything of LMDeploy's engine is imported."""
    from sagellm_common.engines.lmdeploy import transformers5

    transformers5.install()
    if found.kind is DeviceKind.CPU:
        from sagellm_common.engines.lmdeploy.device_cpu import CpuDevice

        return CpuDevice()
    eager = not (engine.cuda_graphs and found.kind is DeviceKind.CUDA)
    return NativeDevice(found.lmdeploy_device_type, eager=eager)


class NativeDevice:
    """A device that LMDeploy serves by itself, with its own cache and kernels. No plug-in of ours is loaded."""

    def __init__(self, device_type: str, *, eager: bool) -> None:
        self._device_type = device_type
        self._eager = eager

    def engine_config(self, **settings: Any) -> PytorchEngineConfig:
        from lmdeploy.messages import PytorchEngineConfig

        return PytorchEngineConfig(device_type=self._device_type, eager_mode=self._eager, **settings)

    def kv_memory(self, cache_engine: Any) -> KvMemory:
        from sagellm_common.engines.lmdeploy.kv_memory import TensorKvMemory

        for cache in cache_engine.full_gpu_cache:
            # Attention masks hide no NaN, and slots not written yet hold whatever was there before.
            cache.zero_()
        return TensorKvMemory(cache_engine.full_gpu_cache)


def kv_dtype(engine: EngineConfig, cache_engine: Any) -> str:
    """KvLayout.dtype: how a block's bytes are to be read, so that two sides that differ in it do not mix them up."""
    name: str = f"int{engine.kv_quant_bits}/{engine.dtype}" if engine.kv_quant_bits else engine.dtype  # scales: latter
    # [layers, blocks, tokens, heads, …] on the CPU and CUDA; some devices put the heads first, or tile them.
    tokens_first = cache_engine.full_gpu_cache[0].shape[2] == engine.block_size_tokens
    return name if tokens_first else f"{name}@{engine.device}"
