"""KV of a device as byte paths see it, on tensors of the CPU: only the copies themselves differ elsewhere."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from sagellm_common.comm_backend.backends.nccl_staging import DeviceKvMemory
from sagellm_common.core.types import BlockIds
from sagellm_common.engines.lmdeploy.kv_memory import TensorKvMemory

LAYERS, BLOCKS, TOKENS, HEADS, DIM = 3, 11, 4, 2, 8


def caches(quant_bits: int = 0, seed: int = 0) -> list[torch.Tensor]:
    """As LMDeploy's CacheEngine makes them, bf16."""
    generator = torch.Generator().manual_seed(seed)

    def random(dtype: torch.dtype, dim: int) -> torch.Tensor:
        shape = (LAYERS, BLOCKS, TOKENS, HEADS, dim * dtype.itemsize)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(dtype)

    if not quant_bits:
        return [random(torch.bfloat16, DIM) for _ in "kv"]
    scales = [random(torch.bfloat16, 2) for _ in "kv"]
    return [random(torch.uint8, DIM * quant_bits // 8) for _ in "kv"] + scales


def ids(*values: int) -> BlockIds:
    return np.array(values, dtype=np.int32)


def one_block(tensors: list[torch.Tensor], block: int) -> bytes:
    """The documented order: tensor by tensor, layer by layer."""
    return b"".join(
        t[layer, block].contiguous().view(torch.uint8).numpy().tobytes() for t in tensors for layer in range(LAYERS)
    )


@pytest.mark.parametrize("quant_bits", [0, 8, 4])
def test_reads_and_writes_whole_blocks_in_the_documented_order(quant_bits: int) -> None:
    source, target = caches(quant_bits), caches(quant_bits, seed=1)
    untouched = [one_block(target, block) for block in range(BLOCKS)]
    memory, other = TensorKvMemory(source), TensorKvMemory(target)
    assert (memory.num_blocks, memory.block_bytes) == (BLOCKS, len(untouched[0]))
    with memory.reading(ids(7, 0, 10)) as (region, rows), other.writing(ids(1, 9, 2)) as (into, into_rows):
        for n, block in enumerate((7, 0, 10)):
            assert region.block(int(rows[n])).tobytes() == one_block(source, block)
            into.block(int(into_rows[n]))[:] = region.block(int(rows[n]))
    for block, wanted in {1: 7, 9: 0, 2: 10}.items():
        assert one_block(target, block) == one_block(source, wanted)
    for block in set(range(BLOCKS)) - {1, 9, 2}:
        assert one_block(target, block) == untouched[block]


@pytest.mark.parametrize("quant_bits", [0, 8, 4])
def test_gathers_and_scatters_on_the_device(quant_bits: int) -> None:
    """The same bytes as through the host, for byte paths that need none of it."""
    source, target = caches(quant_bits), caches(quant_bits, seed=1)
    untouched = [one_block(target, block) for block in range(BLOCKS)]
    memory, other = TensorKvMemory(source), TensorKvMemory(target)
    assert isinstance(memory, DeviceKvMemory)
    rows = torch.empty(3, memory.block_bytes, dtype=torch.uint8)
    memory.gather(ids(7, 0, 10), rows)
    assert [row.numpy().tobytes() for row in rows] == [one_block(source, block) for block in (7, 0, 10)]
    other.scatter(rows, ids(1, 9, 2))
    for block, wanted in {1: 7, 9: 0, 2: 10}.items():
        assert one_block(target, block) == one_block(source, wanted)
    for block in set(range(BLOCKS)) - {1, 9, 2}:
        assert one_block(target, block) == untouched[block]
    with pytest.raises(IndexError, match="pool of 11"):
        memory.gather(ids(11), rows[:1])


def test_a_block_has_the_bytes_that_the_cpu_plug_in_gives_it() -> None:
    """So a worker on one device can take over from one on another."""
    from sagellm_common.engines.lmdeploy.device_cpu import install
    from sagellm_common.engines.lmdeploy.device_cpu.cache import CpuCacheEngine

    install()

    @dataclass
    class Model:
        num_layers: int = LAYERS
        num_key_value_heads: int = HEADS
        head_dim: int = DIM
        k_head_dim: int = DIM
        v_head_dim: int = DIM
        dtype: Any = torch.bfloat16

    @dataclass
    class Cache:
        block_size: int = TOKENS
        num_gpu_blocks: int = BLOCKS
        num_cpu_blocks: int = 0
        quant_policy: int = 8

    engine = CpuCacheEngine(Cache(), Model())
    for flat, layered in zip(engine.full_gpu_cache, caches(quant_bits=8), strict=True):
        flat.copy_(layered)
    with TensorKvMemory(engine.full_gpu_cache).reading(ids(5)) as (region, rows):
        assert region.block(int(rows[0])).tobytes() == engine.pool[5].numpy().tobytes()
    assert engine.pool[5].numpy().tobytes() == one_block(caches(quant_bits=8), 5)


def test_what_a_failed_transfer_brought_never_reaches_the_blocks() -> None:
    target = caches()
    before = [one_block(target, block) for block in range(BLOCKS)]
    memory = TensorKvMemory(target)
    with pytest.raises(ConnectionError), memory.writing(ids(3, 4)) as (region, _):
        region.view[:] = bytes(len(region.view))
        raise ConnectionError
    assert [one_block(target, block) for block in range(BLOCKS)] == before


@pytest.mark.parametrize("block_ids", [ids(0, BLOCKS), ids(-1)])
def test_blocks_outside_the_pool_are_refused(block_ids: BlockIds) -> None:
    memory = TensorKvMemory(caches())
    with pytest.raises(IndexError, match=f"outside the pool of {BLOCKS} blocks"), memory.reading(block_ids):
        pass
    with pytest.raises(IndexError, match="outside"), memory.writing(block_ids):
        pass


def test_blocks_that_are_not_contiguous_are_refused() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        TensorKvMemory([cache.transpose(2, 3) for cache in caches()])


def test_transfers_at_a_time_do_not_share_their_staging() -> None:
    source = caches()
    memory, wrong = TensorKvMemory(source), []

    def read(block: int) -> None:
        for size in (1, 3, 2, 4) * 5:
            wanted = ids(*((block + n) % BLOCKS for n in range(size)))
            with memory.reading(wanted) as (region, rows):
                found = [region.block(int(row)).tobytes() for row in rows]
            wrong.extend(b for b, got in zip(wanted.tolist(), found, strict=True) if got != one_block(source, b))

    threads = [threading.Thread(target=read, args=(block,)) for block in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
