"""The factory and the metrics it wraps around a channel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY

from sagellm_common.comm_backend import make_channel
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.comm_backend.protocol import Pull
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import ConfigError, InvalidRequest, LeaseExpired
from sagellm_common.core.kv import Allocation, KvRegion
from sagellm_common.core.types import BlockIds, KvSource
from tests.support.kv_channels import HOST, blocks_of, missing, random_region, staged

IDS = np.array([1, 2, 3], dtype=np.int32)


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize("backend", ["tcp", "shm", "gloo", "mooncake"])
async def test_a_measured_pull(backend: str) -> None:
    if why := missing(backend):
        pytest.skip(why)
    leases = HandoffSource(10, ManualClock(), lambda _: None)
    regions = [random_region(8, 64, seed) for seed in range(2)]
    late: list[KvRegion] = []
    config = TransportConfig(backend=backend)  # type: ignore[arg-type]

    async def pull_rpc(source: KvSource, blocks: BlockIds, pair_id: str, timeout_s: float) -> bytes:
        return await one.serve_pull(source.transfer_id, source.epoch, blocks, pair_id)

    # The region of the first comes later, as in a store.
    one = make_channel(config, lambda: late[0], leases, HOST, 0, pull_rpc)
    two = make_channel(config, regions[1], leases, HOST, 0, pull_rpc)
    assert one.address == ""
    address = await one.start()
    assert (one.name, one.address) == (backend, address)
    late.append(regions[0])
    leases.pin("t", 1, Allocation(IDS), 0)
    source = KvSource("t", 1, "w", "i", "c", address, backend, IDS, 0, 1000)
    before = [
        metric("sagellm_comm_transfer_bytes_total", backend=backend, direction="in"),
        metric("sagellm_comm_transfer_bytes_total", backend=backend, direction="out"),
        metric("sagellm_comm_transfer_seconds_count", backend=backend),
        metric("sagellm_comm_transfer_failures_total", backend=backend, error="LeaseExpired"),
    ]
    try:
        await two.pull(Pull(source, IDS, IDS, timeout_s=10))
        leases.release("t", 1, committed=True)
        with pytest.raises(LeaseExpired):
            await two.pull(Pull(source, IDS, IDS, timeout_s=10))
    finally:
        await one.close()
        await two.close()
    assert blocks_of(regions[1], IDS) == blocks_of(regions[0], IDS)
    after = [
        metric("sagellm_comm_transfer_bytes_total", backend=backend, direction="in"),
        metric("sagellm_comm_transfer_bytes_total", backend=backend, direction="out"),
        metric("sagellm_comm_transfer_seconds_count", backend=backend),
        metric("sagellm_comm_transfer_failures_total", backend=backend, error="LeaseExpired"),
    ]
    assert np.subtract(after, before).tolist() == [192, 192, 1, 1]


async def test_gloo_needs_a_way_to_ask() -> None:
    leases = HandoffSource(10, ManualClock(), lambda _: None)
    with pytest.raises(ConfigError, match="pull_rpc"):
        make_channel(TransportConfig(backend="gloo"), random_region(1, 1), leases, HOST, 0)


async def test_shm_refuses_memory_that_is_not_the_hosts() -> None:
    leases = HandoffSource(10, ManualClock(), lambda _: None)
    with pytest.raises(ConfigError, match=r"transport\.backend: 'shm' .* use 'tcp'"):
        make_channel(TransportConfig(backend="shm"), staged(random_region(4, 64)), leases, HOST, 0)


async def test_nccl_says_what_it_lacks() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has what nccl needs")
    leases = HandoffSource(10, ManualClock(), lambda _: None)
    with pytest.raises(ConfigError, match=r"transport\.backend: 'nccl' .*(CUDA build|GPU)"):
        make_channel(TransportConfig(backend="nccl"), random_region(1, 1), leases, HOST, 0)


async def test_tcp_asks_in_band() -> None:
    leases = HandoffSource(10, ManualClock(), lambda _: None)
    channel = make_channel(TransportConfig(backend="tcp"), random_region(1, 1), leases, HOST, 0)
    with pytest.raises(InvalidRequest, match="in band"):
        await channel.serve_pull("t", 1, IDS, "pair")
    await channel.close()
