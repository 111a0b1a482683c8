"""What a configuration comes to on which machine, without loading anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sagellm_common.comm_backend.hardware import select_device
from sagellm_common.core.capability import DeviceKind
from sagellm_common.core.config import Config, EngineConfig, TransportConfig
from sagellm_common.core.errors import ConfigError
from sagellm_common.engines import make_engine
from sagellm_common.engines.lmdeploy.device import NativeDevice, kv_dtype, prepare, resolve
from tests.support.recorded_machines import ASCEND, CAMBRICON, NVIDIA, RecordedHost


@pytest.mark.parametrize(
    ("host", "wanted", "device", "dtype"),
    [
        (RecordedHost(), {}, "cpu", "float32"),
        (RecordedHost(), {"dtype": "bfloat16"}, "cpu", "bfloat16"),
        (RecordedHost(), {"device": "auto"}, "cpu", "float32"),
        (NVIDIA, {}, "cpu", "float32"),
        (NVIDIA, {"device": "auto"}, "cuda", "bfloat16"),
        (NVIDIA, {"device": "cuda", "dtype": "float16"}, "cuda", "float16"),
        (ASCEND, {"device": "ascend", "kv_quant_bits": 8}, "ascend", "bfloat16"),
    ],
)
def test_auto_becomes_what_the_machine_has(host: RecordedHost, wanted: dict[str, Any], device: str, dtype: str) -> None:
    engine, found = resolve(EngineConfig(**wanted), TransportConfig(), host)
    assert (engine.device, engine.dtype, found.kind) == (device, dtype, device)


@pytest.mark.parametrize(
    ("host", "engine", "transport", "complaint"),
    [
        (NVIDIA, {"device": "cuda", "dtype": "float32"}, {}, "engine.dtype: 'float32' .* use bfloat16 or float16"),
        (NVIDIA, {"device": "cuda"}, {"backend": "shm"}, "transport.backend: 'shm' .* use tcp"),
        (NVIDIA, {"device": "cuda", "block_size_tokens": 8}, {}, "engine.block_size_tokens: 8 .* power of two"),
        (NVIDIA, {"device": "cuda", "block_size_tokens": 24}, {}, "engine.block_size_tokens: 24 .* power of two"),
        (NVIDIA, {"device": "cuda", "num_blocks": 8}, {}, "engine.num_blocks: 8 .* at least 16"),
        (ASCEND, {"device": "ascend", "kv_quant_bits": 4}, {}, "engine.kv_quant_bits: 4 .* use 0 or 8"),
        (CAMBRICON, {"device": "cambricon", "kv_quant_bits": 8}, {}, "engine.kv_quant_bits: 8 .* use 0$"),
        (CAMBRICON, {"device": "cambricon", "block_size_tokens": 64}, {}, "engine.block_size_tokens: 64 .* use 16$"),
        (RecordedHost(), {"device": "cuda"}, {}, "engine.device: 'cuda' cannot be used here: there is no device node"),
    ],
)
def test_what_a_device_cannot_serve_is_told_before_anything_is_loaded(
    host: RecordedHost, engine: dict[str, Any], transport: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        resolve(EngineConfig(**engine), TransportConfig(**transport), host)


@pytest.mark.parametrize("device", ["hygon", "kunlun"])
def test_an_engine_for_a_device_lmdeploy_does_not_know_is_not_made(device: str, tiny_llama: Path) -> None:
    config = Config.model_validate({"model": {"path": str(tiny_llama)}, "engine": {"device": device}})
    with pytest.raises(ConfigError, match=rf"engine\.device: '{device}' .* LMDeploy 0\.11\.0 has no device_type"):
        make_engine(config)


@pytest.mark.parametrize(("wanted", "eager"), [({}, False), ({"cuda_graphs": False}, True)])
def test_cuda_is_lmdeploys_own_without_the_cpu_plug_in(wanted: dict[str, Any], eager: bool) -> None:
    engine, found = resolve(EngineConfig(device="cuda", **wanted), TransportConfig(), NVIDIA)
    device = prepare(engine, found)
    assert isinstance(device, NativeDevice)
    config = device.engine_config(dtype=engine.dtype, block_size=64, num_gpu_blocks=engine.num_blocks)
    assert (config.device_type, config.eager_mode, config.dtype) == ("cuda", eager, "bfloat16")


def test_graphs_are_cudas() -> None:
    engine, found = resolve(EngineConfig(device="ascend"), TransportConfig(), ASCEND)
    assert prepare(engine, found).engine_config(block_size=64).eager_mode


def test_a_native_pool_starts_without_nans() -> None:
    caches = tuple(torch.full((2, 16, 16, 1, 8), float("nan"), dtype=torch.bfloat16) for _ in "kv")
    memory = NativeDevice("cuda", eager=True).kv_memory(SimpleNamespace(full_gpu_cache=caches))
    assert (memory.num_blocks, memory.block_bytes) == (16, 2 * 2 * 16 * 8 * 2)
    assert all(bool((cache == 0).all()) for cache in caches)


def test_another_order_of_a_blocks_bytes_is_another_layout() -> None:
    engine, _ = resolve(EngineConfig(device="cambricon", kv_quant_bits=0), TransportConfig(), CAMBRICON)
    heads_first = SimpleNamespace(full_gpu_cache=(torch.empty(2, 16, 4, 16, 8),))
    tokens_first = SimpleNamespace(full_gpu_cache=(torch.empty(2, 16, 16, 4, 8),))
    assert kv_dtype(engine, tokens_first) == "bfloat16"
    assert kv_dtype(engine, heads_first) == f"bfloat16@{DeviceKind.CAMBRICON}"


def test_a_device_has_a_name_for_people() -> None:
    assert select_device("cuda", NVIDIA).summary == "cuda: 2 x NVIDIA H200"


async def test_memory_that_does_not_suffice_is_said_as_such(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, emit: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30.00 GiB")

    monkeypatch.setattr("sagellm_common.engines.lmdeploy.engine.LmdeployEngine._load", full)
    config = Config.model_validate({"model": {"path": str(tiny_llama)}, "engine": {"num_blocks": 99}})
    engine = make_engine(config)
    with pytest.raises(ConfigError, match=r"engine\.num_blocks: 99 KV blocks and the weights do not fit"):
        await engine.start(lambda _: None)
    await engine.close()
