"""Workers reduced to what a byte path sees of them: memory, leases, a channel."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from sagellm_common.comm_backend.backends import End, load
from sagellm_common.comm_backend.backends.mock import Faults, MockChannel, MockNetwork
from sagellm_common.comm_backend.backends.shm import ShmChannel
from sagellm_common.comm_backend.backends.tcp import TcpChannel
from sagellm_common.comm_backend.handoff import HandoffSource
from sagellm_common.comm_backend.protocol import KVTransferChannel, LeasedBlocks, PullRpc
from sagellm_common.core import shared_memory
from sagellm_common.core.clock import ManualClock
from sagellm_common.core.config import TransportConfig
from sagellm_common.core.errors import PeerLost
from sagellm_common.core.kv import Allocation, KvMemory, KvRegion, LayerPart
from sagellm_common.core.kv_progress import KvProgress
from sagellm_common.core.types import BlockIds, KvLayout, KvSource

BACKENDS = ("tcp", "staged", "shm", "vm-read", "inline", "gloo", "nccl", "on-device", "mooncake", "mock")
"""`staged` is tcp between pools that are no host memory to it, as with a GPU; `vm-read` shm of pools in no file;
`inline` shm whose small pulls come through the socket, as they usually do; `on-device` nccl on a device that is the
CPU, which NCCL cannot reach: Gloo moves the bytes."""
VARIANTS = {"staged": "tcp", "vm-read": "shm", "inline": "shm", "nccl": "gloo", "on-device": "gloo"}
HOST = "127.0.0.1"
MOST_SIDES = 3


@functools.cache
def missing(backend: str) -> str:
    """Why the byte path cannot be tested here, and how it could; empty: it can."""
    if backend == "nccl":
        import torch

        if not torch.distributed.is_nccl_available():
            return f"NCCL needs a CUDA build of torch, this is {torch.__version__}"
        if (found := torch.cuda.device_count()) < MOST_SIDES:
            return f"NCCL wants a GPU for each of {MOST_SIDES} ends, this machine has {found}"
    if backend == "mooncake":
        try:
            import mooncake.engine  # noqa: F401
        except ModuleNotFoundError as err:
            return f"Mooncake's Transfer Engine is not installed ({err}): make setup"
        except ImportError as err:
            return f"Mooncake's Transfer Engine cannot be loaded ({err}): make system-deps"
    return ""


def a_layout(block_bytes: int = 64, block_size_tokens: int = 4, model_fingerprint: str = "tiny") -> KvLayout:
    return KvLayout(model_fingerprint, "float32", block_size_tokens, 1, 1, 2, block_bytes)


def random_region(
    num_blocks: int, block_bytes: int, seed: int = 0, num_layers: int = 0, *, in_file: bool = False
) -> KvRegion:
    """With layers a block has keys and values, one fourth and three fourths of it. `in_file`: of shared memory."""
    data = np.random.default_rng(seed).integers(0, 256, num_blocks * block_bytes, dtype=np.uint8)
    quarter = block_bytes // 4
    parts = (LayerPart(0, quarter // num_layers), LayerPart(quarter, 3 * quarter // num_layers)) if num_layers else ()
    if not in_file:
        return KvRegion(memoryview(data), block_bytes, num_blocks, parts)
    memory = shared_memory.allocate(len(data))
    memory.arena[:] = data.data
    return KvRegion(memoryview(memory.arena), block_bytes, num_blocks, parts, memory.descriptor)


def staged(region: KvRegion) -> KvMemory:
    """The same bytes as two tensors [layers, blocks, …], keys and values: as a device has them."""
    import torch

    from sagellm_common.engines.lmdeploy.kv_memory import TensorKvMemory

    pool = torch.frombuffer(region.view, dtype=torch.uint8).view(region.num_blocks, region.block_bytes)
    layers, parts = (2, 2) if region.block_bytes % 4 == 0 else (1, 1)
    shape = (region.num_blocks, layers, region.block_bytes // layers // parts)
    return TensorKvMemory([part.view(shape).transpose(0, 1) for part in pool.chunk(parts, dim=1)])


def blocks_of(region: KvRegion, block_ids: BlockIds) -> list[bytes]:
    return [bytes(region.block(int(b))) for b in block_ids]


class WatchedLeases:
    """Tells when the last read has ended."""

    def __init__(self, inner: LeasedBlocks) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._readers = 0
        self.quiet = threading.Event()

    @contextmanager
    def reading(
        self, transfer_id: str, epoch: int, block_ids: BlockIds, num_bytes: int | None = None
    ) -> Iterator[None]:
        with self._inner.reading(transfer_id, epoch, block_ids, num_bytes):
            with self._lock:
                self._readers += 1
                self.quiet.clear()
            try:
                yield
            finally:
                with self._lock:
                    self._readers -= 1
                    if not self._readers:
                        self.quiet.set()

    def progress(self, transfer_id: str, epoch: int) -> tuple[Allocation, KvProgress]:
        return self._inner.progress(transfer_id, epoch)


@dataclass
class Side:
    """One worker's end."""

    name: str
    region: KvRegion
    clock: ManualClock
    leases: HandoffSource
    watched: WatchedLeases
    channel: KVTransferChannel
    freed: list[Allocation] = field(default_factory=list)

    def pin(self, transfer_id: str, block_ids: BlockIds, epoch: int = 1) -> KvSource:
        """Leases blocks and says where to pull them."""
        self.leases.pin(transfer_id, epoch, Allocation(block_ids), 0)
        return self.source(transfer_id, block_ids, epoch)

    def source(self, transfer_id: str, block_ids: BlockIds, epoch: int = 1) -> KvSource:
        return KvSource(
            transfer_id=transfer_id,
            epoch=epoch,
            worker_id=self.name,
            incarnation=f"{self.name}-1",
            control_address=self.name,
            data_address=self.channel.address,
            backend=self.channel.name,
            block_table=block_ids,
            num_tokens=0,
            lease_expires_in_ms=10_000,
        )


class Cluster:
    """Makes sides that can reach each other over one backend, and closes them."""

    def __init__(self, backend: str) -> None:
        if why := missing(backend):
            pytest.skip(why)
        self.variant = backend
        self.backend = VARIANTS.get(backend, backend)
        self.sides: dict[str, Side] = {}
        self._network = MockNetwork()

    async def side(
        self,
        name: str,
        *,
        num_blocks: int = 64,
        block_bytes: int = 64,
        num_layers: int = 0,
        digest: bool = True,
        silence_s: float = 5.0,
        ttl_s: float = 30.0,
        faults: Faults | None = None,
        pull_rpc: PullRpc | None = None,
        transport: dict[str, Any] | None = None,
    ) -> Side:
        in_file = self.variant == "shm"
        region = random_region(num_blocks, block_bytes, len(self.sides), num_layers, in_file=in_file)
        clock = ManualClock()
        freed: list[Allocation] = []
        leases = HandoffSource(ttl_s, clock, freed.append)
        watched = WatchedLeases(leases)
        channel: KVTransferChannel
        end = End(TransportConfig(segment_min_bytes=1, **(transport or {})), region, watched, HOST, 0)
        if self.backend == "tcp":
            memory = staged(region) if self.variant == "staged" else region
            channel = TcpChannel(
                lambda: memory, watched, HOST, 0, digest=digest, silence_s=silence_s, messages=end.planner()
            )
        elif self.backend == "shm":
            how = {} if self.variant == "inline" else {"inline_bytes": 0}
            channel = ShmChannel(
                lambda: region, watched, digest=digest, silence_s=silence_s, messages=end.planner(), **how
            )
        elif self.backend == "gloo":
            from sagellm_common.comm_backend.backends.pair_channel import PairChannel
            from tests.support.kv_device import a_staging, on_device

            staging = a_staging(self.variant, len(self.sides))
            memory = on_device(region) if self.variant in ("nccl", "on-device") else region
            channel = PairChannel(
                "nccl" if self.variant == "nccl" else "gloo",
                staging,
                lambda: memory,
                watched,
                HOST,
                0,
                pull_rpc or self._pull_rpc,
                digest=digest,
                silence_s=silence_s,
                settings=end.planner().settings,
            )
        elif self.backend == "mooncake":
            config = end.config.model_copy(update={"backend": "mooncake", "digest": digest, "timeout_s": silence_s})
            channel = load("mooncake").open_channel(End(config, lambda: region, watched, HOST, 0))
        else:
            channel = MockChannel(self._network, lambda: region, watched, faults, digest=digest)
        side = self.sides[name] = Side(name, region, clock, leases, watched, channel, freed)
        await channel.start()
        return side

    async def close(self) -> None:
        for side in self.sides.values():
            await side.channel.close()

    async def _pull_rpc(self, source: KvSource, blocks: BlockIds, pair_id: str, timeout_s: float) -> bytes:
        side = self.sides.get(source.control_address)
        if side is None:
            raise PeerLost(f"nobody is at {source.control_address}")
        return await side.channel.serve_pull(source.transfer_id, source.epoch, blocks, pair_id)


class Gate:
    """Stops a source between its digests and its bytes: at the n-th time, until opened."""

    def __init__(self, wrapped: Callable[..., bytes], stop_at: int = 0) -> None:
        self._wrapped = wrapped
        self._stop_at = stop_at
        self._calls = 0
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, *of: Any) -> bytes:
        digests = self._wrapped(*of)
        if self._calls == self._stop_at:
            self.reached.set()
            if not self.opened.wait(20):
                raise TimeoutError("the test has not opened the gate")
        self._calls += 1
        return digests

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Opened at the latest when the block is left, so that no thread stays behind."""
        try:
            yield
        finally:
            self.opened.set()
