"""Probes of LMDeploy's classes: `python -m tests.support.lmdeploy_patches_probes NAME…` prints what each saw, as JSON.

`defect_*` run on the stock and on the patched tree and report the same facts; `hook_*` need the patches.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import zmq

# First: it makes the engine's modules importable without an accelerator.
from sagellm_common.engines.lmdeploy.device_cpu.install import install  # isort: skip
from lmdeploy.pytorch.config import CacheConfig, SchedulerConfig
from lmdeploy.pytorch.disagg.config import EngineRole
from lmdeploy.pytorch.disagg.conn.engine_conn import EngineP2PConnection
from lmdeploy.pytorch.disagg.conn.protocol import (
    DistServeConnectionRequest,
    DistServeDropConnectionRequest,
    DistServeEngineConfig,
    DistServeEngineEndpointInfo,
    DistServeInitRequest,
    MigrationProtocol,
    MigrationRequest,
)
from lmdeploy.pytorch.disagg.messages import MigrationAssignment, MigrationExecutionBatch
from lmdeploy.pytorch.engine.cache_engine import CacheEngine
from lmdeploy.pytorch.engine.engine import Engine, InputsMakerAsync
from lmdeploy.pytorch.engine.mp_engine.base_worker import EngineWorkerBase
from lmdeploy.pytorch.messages import MessageStatus, SequenceMeta
from lmdeploy.pytorch.paging import Scheduler
from lmdeploy.pytorch.strategies.ar.sequence import ARSequenceStrategy

BLOCK_SIZE = 4
PROMPT = np.arange(3 * BLOCK_SIZE + 1)
WAIT_S = 10


def scheduler(num_blocks: int = 16, prefix_caching: bool = True, role: EngineRole = EngineRole.Hybrid) -> Any:
    cache = CacheConfig(
        max_batches=4,
        block_size=BLOCK_SIZE,
        num_cpu_blocks=0,
        num_gpu_blocks=num_blocks,
        enable_prefix_caching=prefix_caching,
        num_state_caches=0,
        role=role,
    )
    meta = SequenceMeta(BLOCK_SIZE, strategy=ARSequenceStrategy())
    return Scheduler(SchedulerConfig(max_batches=4, max_session_len=128), cache, meta)


def add(to: Any, session_id: int, prompt: Any = PROMPT, migrating: bool = False) -> Any:
    """A waiting sequence, or one that waits for its KV from a prefill engine."""
    request = None
    if migrating:
        blocks = list(range(-(-len(prompt) // BLOCK_SIZE)))
        request = MigrationRequest(
            protocol=MigrationProtocol.TCP,
            remote_engine_id="prefill",
            remote_session_id=session_id,
            remote_token_id=5,
            remote_block_ids=blocks,
        )
    seq = to.add_session(session_id).add_sequence(prompt, migration_request=request)
    to.add_sequence(seq)
    seq.resp = SimpleNamespace()
    if migrating:
        seq.status = MessageStatus.WAITING_MIGRATION
    return seq


def num_used_blocks(of: Any) -> int:
    return int(of.block_manager.num_gpu_blocks - of.block_manager.get_num_free_gpu_blocks())


# ---- the defects, by their number in third_party/patches/lmdeploy/README.md ----


def defect_1_prefix_caching_ends_the_migration_loop() -> Any:
    decode = scheduler(role=EngineRole.Decode)
    add(decode, 1, migrating=True)
    return {"migrating": [seq.session_id for seq in decode._schedule_migration()]}


class CopyingBackend:
    """Moves bytes between two caches, as RDMA would: at the offsets it is given, within registered memory."""

    def __init__(self, source: Any, target: Any) -> None:
        config = SimpleNamespace(num_gpu_blocks=source.cache_config.num_gpu_blocks)
        self.links = {"prefill": SimpleNamespace(remote_engine_config=config)}
        self._source, self._target = source, target

    async def p2p_migrate(self, assignment: MigrationAssignment) -> None:
        for piece in assignment.batch:
            source = self._source.full_gpu_cache[int(piece.mr_key)].view(torch.uint8).flatten()
            target = self._target.full_gpu_cache[int(piece.mr_key)].view(torch.uint8).flatten()
            read = source[piece.target_offset : piece.target_offset + piece.length]
            target[piece.source_offset : piece.source_offset + piece.length] = read


def cache_engine(num_blocks: int, quant_policy: int) -> Any:
    """LMDeploy's own cache on the CPU; its constructor would open CUDA streams."""
    engine = object.__new__(CacheEngine)
    engine.cache_config = CacheConfig(4, BLOCK_SIZE, 0, num_blocks, quant_policy=quant_policy)
    engine.model_config = SimpleNamespace(
        dtype=torch.float16,
        num_layers=2,
        num_key_value_heads=2,
        k_head_dim=8,
        v_head_dim=8,
        head_dim=8,
        get_head_size=lambda: 8,
    )
    engine.world_size = 1
    engine.block_size, engine.num_layers = BLOCK_SIZE, 2
    engine.kv_cache_dtype = torch.uint8 if quant_policy else torch.float16
    engine.full_gpu_cache = engine._allocate_cache(num_blocks, "cpu")
    for tensor in engine.full_gpu_cache:
        tensor.zero_()
    return engine


def defect_2_quantised_migration_offsets() -> Any:
    moved = [(1, 4), (2, 0)]  # (remote block, local block)
    equal = {}
    for quant_policy in (0, 4, 8):
        prefill, decode = cache_engine(3, quant_policy), cache_engine(6, quant_policy)
        for i, tensor in enumerate(prefill.full_gpu_cache):
            raw = tensor.view(torch.uint8)
            raw.copy_(torch.arange(raw.numel()).reshape(raw.shape).add(37 * i).mul(2654435761) >> 13)
        decode.migration_backend_impl = CopyingBackend(prefill, decode)
        batch = MigrationExecutionBatch(protocol=MigrationProtocol.TCP, requests=[("prefill", moved)])
        with contextlib.suppress(RuntimeError):  # an offset outside the memory
            asyncio.run(decode.migrate(batch))
        wanted = [torch.zeros_like(tensor) for tensor in decode.full_gpu_cache]
        for source, target in zip(prefill.full_gpu_cache, wanted, strict=True):
            for remote, local in moved:
                target[:, local] = source[:, remote]
        equal[str(quant_policy)] = all(
            torch.equal(have.view(torch.uint8), want.view(torch.uint8))
            for have, want in zip(decode.full_gpu_cache, wanted, strict=True)
        )
    return {"right_bytes_by_quant_policy": equal}


async def defect_3_failed_transfer_ends_the_engine() -> Any:
    """Session 1's transfer fails, session 2's does not, and the notice for session 2 finds no peer."""
    engine, migrated, told = object.__new__(Engine), [], []

    async def migrate(batch: Any) -> None:
        migrated.append(batch)
        if len(migrated) == 1:
            raise ConnectionError("the prefill engine is gone")

    async def zmq_send(remote_engine_id: str, remote_session_id: int) -> None:
        told.append(remote_session_id)
        if remote_session_id == 2:
            raise ConnectionError("the prefill engine is gone")

    engine.scheduler = scheduler(prefix_caching=False, role=EngineRole.Decode)
    engine.cache_config = engine.scheduler.cache_config
    engine.executor = SimpleNamespace(migrate=migrate)
    engine.engine_conn = SimpleNamespace(zmq_send=zmq_send)
    engine.migration_event = asyncio.Event()
    sequences = [add(engine.scheduler, session_id, migrating=True) for session_id in (1, 2)]

    runnable = asyncio.Event()
    main_loop = asyncio.ensure_future(asyncio.Event().wait())
    migration_loop = asyncio.ensure_future(engine._async_loop_migration(asyncio.Queue(), runnable))
    Engine._add_loop_tasks_done_callback([main_loop, migration_loop])
    batch_done = asyncio.ensure_future(runnable.wait())
    await asyncio.wait({migration_loop, batch_done}, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
    batch_done.cancel()
    await asyncio.wait({main_loop}, timeout=0.05)  # a cancelled task ends within a turn of the loop
    alive = not main_loop.done()
    migration_loop.cancel()
    main_loop.cancel()
    await asyncio.wait({migration_loop, main_loop})
    return {
        "engine_alive": alive,
        "status": [seq.status.name for seq in sequences],
        "blocks": [len(seq.logical_blocks) for seq in sequences],
        "told_to_free": told,
    }


def defect_4_prefill_role_fills_no_trie() -> Any:
    prefill = scheduler(role=EngineRole.Prefill)
    add(prefill, 1)
    prefill.schedule(is_prefill=True)
    prefill.end_session(1)  # its only token was sampled, its KV is gone to decode
    again = add(prefill, 2)
    prefill.schedule(is_prefill=True)
    return {"reused_tokens": again.num_history_ids}


def defect_5_lru_in_whole_seconds() -> Any:
    allocator = scheduler().block_manager.allocator
    with mock.patch.object(time, "perf_counter", side_effect=[10.2, 10.4]):
        older, newer = allocator.allocate(1), allocator.allocate(1)
    return {"older_first": bool(allocator.get_access_time(older)[0] < allocator.get_access_time(newer)[0])}


class Peer:
    """One engine's end of a P2P connection."""

    def __init__(self, engine_id: str) -> None:
        self.engine_id = engine_id
        self.freed: list[int] = []
        self.freed_one = asyncio.Event()
        sessions = dict.fromkeys(range(10))
        self.connection = EngineP2PConnection(
            SimpleNamespace(
                executor=SimpleNamespace(p2p_initialize=lambda _: [], p2p_connect=lambda **_: None),
                scheduler=SimpleNamespace(sessions=sessions, end_session=self._end_session),
            )
        )

    def _end_session(self, session_id: int) -> None:
        self.freed.append(session_id)
        self.freed_one.set()

    async def bind(self, other: Peer) -> str:
        config = DistServeEngineConfig(
            tp_size=1, ep_size=1, dp_size=1, pp_size=1, dp_rank=0, block_size=4, num_cpu_blocks=0, num_gpu_blocks=4
        )
        request = DistServeInitRequest(
            local_engine_id=self.engine_id,
            local_engine_config=config,
            remote_engine_id=other.engine_id,
            remote_engine_config=config,
            protocol=MigrationProtocol.TCP,
        )
        return str((await self.connection.p2p_initialize(request)).engine_endpoint_info.zmq_address)

    def connect(self, other: Peer, address: str) -> None:
        self.connection.p2p_connect(
            DistServeConnectionRequest(
                protocol=MigrationProtocol.TCP,
                remote_engine_id=other.engine_id,
                remote_engine_endpoint_info=DistServeEngineEndpointInfo(zmq_address=address),
                remote_kvtransfer_endpoint_info=[],
            )
        )


async def connected_peers() -> tuple[Peer, Peer]:
    prefill, decode = Peer("http://127.0.0.1:1"), Peer("http://127.0.0.1:2")
    addresses = await prefill.bind(decode), await decode.bind(prefill)
    prefill.connect(decode, addresses[1])
    decode.connect(prefill, addresses[0])
    return prefill, decode


async def drop(peer: Peer, other: Peer) -> None:
    """As the API server does it: through the engine's worker process and its engine."""
    engine, worker = object.__new__(Engine), object.__new__(EngineWorkerBase)
    engine.engine_conn, worker.engine = peer.connection, engine
    request = DistServeDropConnectionRequest(engine_id=peer.engine_id, remote_engine_id=other.engine_id)
    answer = worker.p2p_drop_connect(request)
    assert (await answer if asyncio.iscoroutine(answer) else answer) == {"success": True}


async def defect_6_disconnect_does_nothing() -> Any:
    prefill, decode = await connected_peers()
    sockets = [*decode.connection.p2p_sender.values(), *decode.connection.p2p_receiver.values()]
    await decode.connection.p2p_sender[prefill.engine_id].send(b"{}")  # a peer that never reads must not block it
    async with asyncio.timeout(WAIT_S):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # stock: never awaited
            await drop(decode, prefill)
    closed = all(socket.closed for socket in sockets)
    for socket in sockets:
        socket.close(linger=0)
    await prefill.connection.zmq_disconnect(decode.engine_id)
    return {"sockets_closed": closed}


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


async def defect_6_peers_are_unpickled() -> Any:
    prefill, decode = await connected_peers()
    with tempfile.TemporaryDirectory() as folder:
        bomb = pickle.dumps(Bomb(os.path.join(folder, "mark")))
        await decode.connection.p2p_sender[prefill.engine_id].send(bomb)
        await decode.connection.zmq_send(prefill.engine_id, 7)
        with contextlib.suppress(TimeoutError):  # stock: the bomb ended the receiving task
            async with asyncio.timeout(1):
                await prefill.freed_one.wait()
        executed = bool(os.listdir(folder))
    for peer, other in ((prefill, decode), (decode, prefill)):
        peer.connection.p2p_sender[other.engine_id].setsockopt(zmq.LINGER, 0)
        await peer.connection.zmq_disconnect(other.engine_id)
    return {"executed": executed, "freed": prefill.freed}


# ---- the hooks ----


@contextlib.contextmanager
def hooks(**fields: Any) -> Iterator[None]:
    from lmdeploy.pytorch.extension import EXT

    with contextlib.ExitStack() as stack:
        for name, value in fields.items():
            stack.enter_context(mock.patch.object(EXT, name, value))
        yield


def hook_registry() -> Any:
    from lmdeploy.pytorch.extension import EXT

    scheduler()
    return {
        "environment": hasattr(EXT, "found_through_environment"),
        "entry_point": hasattr(EXT, "found_through_entry_point"),
    }


def hook_fetch_and_store() -> Any:
    calls: list[str] = []

    class Store:
        def __init__(self, cache_config: Any, block_manager: Any, default: Any) -> None:
            self.default = default(cache_config, block_manager)

        def match(self, seq: Any) -> None:
            calls.append(f"fetch {seq.session_id}")
            self.default.match(seq)

        def allocate(self, seq: Any) -> None:
            calls.append(f"store {seq.session_id}")
            self.default.allocate(seq)

    with hooks(prefix_store=Store):
        engine = scheduler()
        add(engine, 1)
        engine.schedule(is_prefill=True)
        second = add(engine, 2)
        reused = engine.seq_manager.fetch(second)
        replaced = engine.block_trie = SimpleNamespace()  # an engine may put its own in later
        return {"calls": calls, "reused": reused, "replaced": engine.seq_manager.prefix_store is replaced}


def hook_block_manager_and_eviction() -> Any:
    seen: list[Any] = []

    def block_manager(cache_config: Any, build_default: Any) -> Any:
        seen.append(cache_config.num_gpu_blocks)
        return build_default(cache_config)

    def eviction_helper(of: Any, eviction_type: str) -> Any:
        seen.append(eviction_type)
        return SimpleNamespace(evict_for_seq=lambda seq, evictable, prealloc: False)

    with hooks(block_manager=block_manager, eviction_helper=eviction_helper):
        engine = scheduler()
        add(engine, 1)
        return {"seen": seen, "scheduled": len(engine.schedule(is_prefill=True).running)}


def hook_on_evict() -> Any:
    told: list[list[int]] = []
    references: list[int] = []

    def on_evict(trie: Any, node: Any) -> None:
        told.append(node.tokens.tolist())
        references.append(int(trie.allocator.get_ref_count(node.block)))

    engine = scheduler()
    add(engine, 1)
    engine.schedule(is_prefill=True)
    engine.end_session(1)
    with hooks(on_evict=on_evict):
        engine.block_trie.evict(2)
    return {"told": told, "references": references}


def hook_block_info_and_migration() -> Any:
    manager = scheduler(num_blocks=4).block_manager
    blocks = manager.allocator.allocate(2)
    manager.allocator.add_ref_count(blocks[:1], 1)
    moved = manager.migrate_blocks(blocks)
    info = manager.get_block_info(blocks)
    refused = False
    try:
        manager.migrate_blocks(np.concatenate([blocks, blocks]))
    except MemoryError:
        refused = True
    after = manager.get_block_info(blocks).physical.tolist()
    free = int(manager.get_num_free_gpu_blocks())
    rest = manager.allocator.get_phy_allocator("gpu").allocate(free).tolist()
    return {
        "moved": sorted(moved.items()),
        "physical": info.physical.tolist(),
        "ref_count": info.ref_count.tolist(),
        "refused_without_moving": refused and after == info.physical.tolist(),
        "every_block_once": sorted(after + rest) == [0, 1, 2, 3],
    }


def hook_policy_and_plan() -> Any:
    class Policy:
        def order_waiting(self, of: Any, sequences: Any) -> Any:
            return sorted(sequences, key=lambda seq: -seq.session_id)

        def should_prefill(self, of: Any, stock: bool) -> bool:
            return not stock

    plan = SimpleNamespace(order_waiting=lambda of, sequences: [s for s in sequences if s.session_id == 2])
    inputs_maker = object.__new__(InputsMakerAsync)
    asked: list[bool] = []

    async def send(prefill: bool) -> Any:
        asked.append(prefill)

    def batch(engine: Any) -> list[int]:
        for session_id in (1, 2, 3):
            add(engine, session_id)
        return [seq.session_id for seq in engine.schedule(is_prefill=True).running]

    with hooks(policy=Policy()):
        policy, planned = scheduler(), scheduler()
        planned.execution_plan = plan
        orders = [batch(policy), batch(planned)]
        inputs_maker.scheduler = policy
        inputs_maker.do_prefill = lambda: False
        inputs_maker._send_next_inputs_impl = send
        asyncio.run(inputs_maker.send_next_inputs())
    return {"policy": orders[0], "plan": orders[1], "should_prefill": asked}


def hook_victims() -> Any:
    """Two stopped sequences fill the cache; a third needs the room of one. Stock evicts the later one."""
    left = []
    for policy in (None, SimpleNamespace(order_victims=lambda of, sequences: sequences[::-1])):
        with hooks(policy=policy):
            engine = scheduler(num_blocks=8, prefix_caching=False)
            sequences = [add(engine, session_id) for session_id in (1, 2)]
            engine.schedule(is_prefill=True)
            for session_id in (1, 2):
                engine.stop_session(session_id)
            add(engine, 3)
            engine.schedule(is_prefill=True)
            left.append([seq.session_id for seq in sequences if len(seq.logical_blocks)])
    return {"stock": left[0], "policy": left[1]}


async def hook_migration_skips_cached_blocks() -> Any:
    engine, batches = object.__new__(Engine), []

    async def migrate(batch: Any) -> None:
        batches.append(batch)

    async def zmq_send(**_: Any) -> None: ...

    engine.scheduler = scheduler(role=EngineRole.Decode)
    engine.cache_config = engine.scheduler.cache_config
    engine.executor = SimpleNamespace(migrate=migrate)
    engine.engine_conn = SimpleNamespace(zmq_send=zmq_send)
    engine.migration_event = asyncio.Event()
    runnable = asyncio.Event()
    loop = asyncio.ensure_future(engine._async_loop_migration(asyncio.Queue(), runnable))
    for session_id in (1, 2):
        seq = add(engine.scheduler, session_id, migrating=True)
        engine.migration_event.set()
        async with asyncio.timeout(WAIT_S):
            await runnable.wait()
        runnable.clear()
        engine.scheduler.seq_manager.store(seq)
    loop.cancel()
    await asyncio.wait({loop})
    return {"remote_blocks": [[remote for remote, _ in batch.requests[0][1]] for batch in batches]}


def hook_custom_migration_backend() -> Any:
    from lmdeploy.pytorch.disagg.backend.backend import MIGRATION_BACKENDS
    from lmdeploy.pytorch.disagg.config import MigrationBackend

    registered: list[str] = []
    backend = SimpleNamespace(
        p2p_initialize=lambda request: None,
        register_memory_region=lambda request: registered.append(request.mr_key),
        endpoint_info=lambda remote, protocol: {},
    )
    MIGRATION_BACKENDS.register_module(name="Custom", module=lambda: backend)
    engine = cache_engine(3, 8)
    engine.rank = 0
    engine.migration_backend_impl = None
    engine.cache_config.migration_backend = MigrationBackend["Custom"]
    request = SimpleNamespace(protocol=MigrationProtocol.TCP, remote_engine_id="prefill", rank=None)
    engine.p2p_initialize(request)
    return {"regions": registered}


def hook_on_kv_written() -> Any:
    from lmdeploy.pytorch.nn.attention import Attention

    attention = object.__new__(Attention)
    torch.nn.Module.__init__(attention)
    order: list[str] = []
    attention.impl = SimpleNamespace(forward=lambda *_, **__: order.append("written") or torch.ones(1))
    caches: list[Any] = []
    with hooks(on_kv_written=lambda k, v, metadata: (order.append("told"), caches.extend((k, v, metadata)))):
        output = attention(1, 2, 3, "k cache", "v cache", "metadata")
    return {"order": order, "caches": caches, "output": output.tolist()}


def hook_on_collective() -> Any:
    from lmdeploy.pytorch import distributed
    from torch import distributed as dist

    calls: list[Any] = []

    def on_collective(collective: Any, args: Any, kwargs: Any) -> Any:
        calls.append([collective.__name__, args[0].numel() * args[0].itemsize])
        return collective(*args, **kwargs)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tensor = torch.ones(4)
    with hooks(on_collective=on_collective):
        distributed.all_reduce(tensor, group="all")
        distributed.broadcast(tensor, 0, group="all")
    distributed.all_reduce(tensor, group="all")
    dist.destroy_process_group()
    return {"calls": calls}


async def as_coroutine(probe: Any) -> Any:
    return await probe()


def run(name: str) -> Any:
    probe = globals()[name]
    try:
        return asyncio.run(as_coroutine(probe)) if asyncio.iscoroutinefunction(probe) else probe()
    except Exception as error:
        return {"raised": type(error).__name__, "message": str(error)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    install()
    print(json.dumps({name: run(name) for name in sys.argv[1:]}))
