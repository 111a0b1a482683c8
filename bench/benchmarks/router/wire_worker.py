"""A mock worker of sageLLM's own wire: the real servicers and sessions, `Pace` for an engine, no KV.

python -m bench.benchmarks.router.wire_worker --role decode --router HOST:PORT --interval-ms 10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import uvloop

from bench.benchmarks.router.pace import TOKEN, Pace
from sagellm_common.comm_backend.handoff import Party
from sagellm_common.core.types import (
    FinishReason,
    HandoffTicket,
    KvLayout,
    KvSource,
    KvStats,
    ModelInfo,
    WorkerRecord,
    WorkerRole,
)
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import worker_pb2, worker_pb2_grpc
from sagellm_common.rpc.routes import RouteSigner
from sagellm_common.rpc.server import GrpcServer, Registrar
from sagellm_common.rpc.sessions import PrefillSession
from sagellm_common.rpc.topology_client import RemoteTopology
from sagellm_common.rpc.worker_client import WorkerStatus, encode_status
from sagellm_common.rpc.worker_sessions import WorkerSessions
from services.decode.jobs import DecodeChunk, DecodeJob, Emit, PullAheadJob, ReserveJob, Transfer
from services.decode.routed import RoutedRequests
from services.decode.servicer import DecodeServicer
from services.prefill.jobs import PrefillDone, PrefillJob
from services.prefill.servicer import PrefillServicer

STATUS_S = 0.5
NO_BLOCKS = np.zeros(0, np.int32)


class MockPrefill:
    """Answers at once."""

    def __init__(self, record: WorkerRecord) -> None:
        self.record = record

    async def prefill(self, job: PrefillJob) -> PrefillDone:
        if job.sampling.max_new_tokens == 1:
            return PrefillDone((TOKEN,), finish_reason=FinishReason.LENGTH)
        source = KvSource(
            transfer_id=job.request_id,
            epoch=job.attempt,
            worker_id=self.record.worker_id,
            incarnation=self.record.incarnation,
            control_address=self.record.address,
            data_address=self.record.data_address,
            backend="tcp",
            block_table=np.arange(-(-len(job.prompt) // 16), dtype=np.int32),
            num_tokens=len(job.prompt),
            lease_expires_in_ms=30_000,
        )
        return PrefillDone((TOKEN,), source=source, compute_ms=0.1, engine_ms=0.1)

    def cancel(self, request_id: str, attempt: int, by: Party = "router") -> None: ...


class MockDecode:
    """`Decode` on `Pace`."""

    def __init__(self, record: WorkerRecord, pace: Pace) -> None:
        self.record = record
        self._pace = pace

    def reserve(self, job: ReserveJob) -> HandoffTicket:
        return HandoffTicket(
            transfer_id=job.request_id,
            epoch=job.attempt,
            worker_id=self.record.worker_id,
            incarnation=self.record.incarnation,
            block_table=np.arange(-(-len(job.prompt) // 16), dtype=np.int32),
            num_cached_tokens=0,
            expires_in_ms=30_000,
        )

    def release(self, request_id: str, attempt: int, by: Party = "router") -> None: ...

    def pull_ahead(self, job: PullAheadJob) -> None: ...

    def renew(self, request_id: str, attempt: int) -> float:
        return 30.0

    def cancel(self, request_id: str, attempt: int, by: Party = "router") -> None: ...

    async def decode(self, job: DecodeJob, emit: Emit) -> None:
        over = asyncio.get_running_loop().create_future()
        first = len(job.emitted)

        def on_token(index: int, last: bool) -> None:
            moved = Transfer(1 << 20, 0.1, 4, 0, "tcp") if index == first and job.source is not None else None
            emit(DecodeChunk(index, (TOKEN,), (), FinishReason.LENGTH if last else None, moved))
            if last and not over.done():
                over.set_result(None)

        key = job.request_id, job.attempt
        self._pace.submit(key, first, job.sampling.max_new_tokens, on_token)
        try:
            await over
        finally:
            self._pace.cancel(key)


class Status(worker_pb2_grpc.WorkerServiceServicer):
    """Always idle."""

    def __init__(self, record: WorkerRecord) -> None:
        self.status = WorkerStatus(record, KvStats(1 << 20, 1 << 20, 0, 0))

    async def GetStatus(self, request: Any, context: Any) -> worker_pb2.WorkerStatus:
        return encode_status(self.status)

    async def WatchStatus(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.WorkerStatus]:
        message = encode_status(self.status)
        message.block_events.revision, message.block_events.snapshot = 1, True
        yield message
        message.block_events.snapshot, message.block_events.since_revision = False, 1
        while True:
            await asyncio.sleep(STATUS_S)
            yield message


async def serve(role: WorkerRole, router: str, model: ModelInfo, interval_s: float) -> None:
    async with AsyncExitStack() as stack:
        channels = await stack.enter_async_context(ChannelPool())
        topology = RemoteTopology(router, channels, connect_timeout_s=10.0)
        stack.push_async_callback(topology.close)
        worker_id = f"{role}-0"
        record = WorkerRecord(worker_id, role, "", "127.0.0.1:1", secrets.token_hex(4), os.getpid(), model)
        mock: MockPrefill | MockDecode
        if role is WorkerRole.PREFILL:
            mock = MockPrefill(record)
            service = Registrar(
                "sagellm.v1.PrefillService",
                worker_pb2_grpc.add_PrefillServiceServicer_to_server,
                PrefillServicer(mock, 60.0),
            )
        else:
            mock = MockDecode(record, Pace(interval_s))
            prefills = WorkerSessions(PrefillSession, channels, "auto")
            stack.push_async_callback(prefills.close)
            service = Registrar(
                "sagellm.v1.DecodeService",
                worker_pb2_grpc.add_DecodeServiceServicer_to_server,
                DecodeServicer(mock, 60.0, RoutedRequests(mock, prefills), RouteSigner("")),
            )
        status = Status(record)
        own = Registrar("sagellm.v1.WorkerService", worker_pb2_grpc.add_WorkerServiceServicer_to_server, status)
        server = GrpcServer("127.0.0.1:0", [service, own])
        address = f"127.0.0.1:{await server.start()}"
        stack.push_async_callback(server.stop, 0.1)
        await server.set_serving(True)
        record = WorkerRecord(worker_id, role, address, "127.0.0.1:1", record.incarnation, os.getpid(), model)
        mock.record = record
        status.status = WorkerStatus(record, status.status.kv)
        await topology.start()
        await topology.register(record, 2.0)
        print(json.dumps({"address": address, "incarnation": record.incarnation}), flush=True)
        await asyncio.Event().wait()


def model_at(path: str, vocab_size: int) -> ModelInfo:
    layout = KvLayout("mock", "float32", 16, 2, 1, 8, 4096)
    return ModelInfo("mock", path, 1 << 17, vocab_size, layout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--role", choices=["prefill", "decode"], required=True)
    parser.add_argument("--router", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--interval-ms", type=float, required=True)
    args = parser.parse_args()
    model = model_at(args.model, args.vocab_size)
    uvloop.run(serve(WorkerRole(args.role), args.router, model, args.interval_ms / 1e3))
