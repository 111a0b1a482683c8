"""Prefill and decode workers without an engine, over real gRPC: tokens follow from the prefix, faults from a script.

Every token is a hash of all tokens before it (and of the seed, when sampled), so a generation that lost, repeated or
invented a token anywhere ends differently from `oracle`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import xxhash

from sagellm_common.core.errors import Cancelled, EngineFailed, LeaseExpired, PeerLost, SageError
from sagellm_common.core.topology import Registration, TopologyStore
from sagellm_common.core.types import (
    BlockHash,
    HandoffTicket,
    KvLayout,
    KvSource,
    ModelInfo,
    SamplingParams,
    WorkerRecord,
    WorkerRole,
    WorkerState,
    as_token_ids,
    pack_int32,
    unpack_int32,
)
from sagellm_common.rpc import codec
from sagellm_common.rpc.channels import ChannelPool
from sagellm_common.rpc.gen.sagellm.v1 import common_pb2, inference_pb2, worker_pb2, worker_pb2_grpc
from sagellm_common.rpc.routes import decode_address, parse_route
from sagellm_common.rpc.server import GrpcServer, Registrar
from sagellm_common.rpc.sessions import PrefillSession
from sagellm_common.rpc.status import from_status, to_status
from sagellm_common.rpc.worker_sessions import WorkerSessions

LAYOUT = KvLayout(
    model_fingerprint="scripted",
    dtype="float32",
    block_size_tokens=4,
    num_layers=2,
    num_kv_heads=1,
    head_dim=8,
    block_bytes=512,
)
MODEL = ModelInfo(
    name="scripted", path="/models/scripted", context_length_tokens=256, vocab_size=1000, kv_layout=LAYOUT
)
STOP_TOKEN = 7

Action = Callable[[], Awaitable[None]]
Attempt = tuple[str, int]
"""(request_id, attempt)"""


def next_token(tokens: Sequence[int], sampling: SamplingParams) -> int:
    salt = "" if sampling.greedy else f"seed {sampling.seed}"
    return xxhash.xxh3_64_intdigest(pack_int32(tokens) + salt.encode()) % MODEL.vocab_size


def oracle(prompt: Sequence[int], sampling: SamplingParams) -> list[int]:
    """What an undisturbed worker generates."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < sampling.max_new_tokens:
        token = next_token(tokens, sampling)
        if token == STOP_TOKEN and not sampling.ignore_eos:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


class StreamBroken(Exception):
    """What a session of a scripted worker ends with when the script says so."""


class ScriptedWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Serves WorkerService. `on(point, action)` runs the action, once, when the worker next gets to that point."""

    role: WorkerRole
    total_blocks = 64

    def __init__(self, worker_id: str, *, model: ModelInfo = MODEL) -> None:
        self.worker_id = worker_id
        self.model = model
        self.incarnation = secrets.token_hex(4)
        self.cancelled: list[Attempt] = []
        self.sessions_opened = 0
        self.reached: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.trace_contexts: list[dict[str, str]] = []
        self.cached_hashes: list[BlockHash] = []
        self.watches: list[worker_pb2.WatchStatusRequest] = []
        self._changed = asyncio.Event()
        self._status_change = worker_pb2.WorkerStatus()
        self._script: dict[str, deque[Action]] = defaultdict(deque)
        self._server: GrpcServer | None = None
        self._registration: Registration | None = None
        self._stopping: asyncio.Task[None] | None = None
        self.record = WorkerRecord(worker_id, self.role, "", "", self.incarnation, os.getpid(), model)

    # ---- life ----

    async def start(self, topology: TopologyStore, port: int = 0, ttl_s: float = 60.0) -> None:
        own = Registrar("sagellm.v1.WorkerService", worker_pb2_grpc.add_WorkerServiceServicer_to_server, self)
        self._server = GrpcServer(f"127.0.0.1:{port}", [own, self._service()])
        port = await self._server.start()
        await self._server.set_serving(True)
        self.record = replace(self.record, address=f"127.0.0.1:{port}", data_address="127.0.0.1:1")
        self._registration = await topology.register(self.record, ttl_s)

    async def stop(self) -> None:
        await self.leave()
        if self._stopping is not None:
            await self._stopping
        elif self._server is not None:
            await self._server.stop(0)

    async def rejoin(self, topology: TopologyStore, ttl_s: float = 60.0) -> None:
        """After `leave`, as the same incarnation."""
        self._registration = await topology.register(self.record, ttl_s)

    async def leave(self) -> None:
        """Out of the topology; the server goes on."""
        registration, self._registration = self._registration, None
        if registration is not None:
            await registration.close()

    async def set_state(self, state: WorkerState) -> None:
        assert self._registration is not None
        self.record = replace(self.record, state=state)
        await self._registration.update(self.record)

    @property
    def dead(self) -> bool:
        return self._stopping is not None

    # ---- faults ----

    def on(self, point: str, *actions: Action) -> None:
        self._script[point].extend(actions)

    async def die(self) -> None:
        """As after kill -9: connections break, the topology still lists it. Never returns."""
        self.kill()
        await asyncio.Event().wait()

    def kill(self) -> None:
        """As `die`, from outside."""
        assert self._server is not None
        self._stopping = asyncio.create_task(self._server.stop(0))

    async def break_stream(self) -> None:
        """The session that got here ends, the process lives."""
        raise StreamBroken

    async def hang(self) -> None:
        await asyncio.Event().wait()

    @staticmethod
    def refuse(error: SageError) -> Action:
        async def act() -> None:
            raise error

        return act

    @staticmethod
    def wait_for(event: asyncio.Event) -> Action:
        async def act() -> None:
            await event.wait()

        return act

    async def reach(self, point: str) -> None:
        self.reached[point].set()
        if self._script[point]:
            await self._script[point].popleft()()

    # ---- WorkerService ----

    @property
    def used_blocks(self) -> int:
        return 0

    def status(self) -> worker_pb2.WorkerStatus:
        used = self.used_blocks
        return worker_pb2.WorkerStatus(
            record=codec.encode_worker_record(self.record),
            kv=common_pb2.KvStats(
                total_blocks=self.total_blocks, used_blocks=used, free_blocks=self.total_blocks - used
            ),
        )

    async def GetStatus(self, request: Any, context: Any) -> worker_pb2.WorkerStatus:
        return self.status()

    async def WatchStatus(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.WorkerStatus]:
        self.watches.append(request)
        first = self.status()
        first.block_events.revision = 1
        first.block_events.snapshot = True
        first.block_events.stored_hashes = codec.encode_hashes(self.cached_hashes)
        yield first
        while True:
            await self._changed.wait()
            self._changed.clear()
            yield self._status_change

    def publish(self, revision: int, *, stored: Sequence[BlockHash] = (), removed: Sequence[BlockHash] = ()) -> None:
        """Sends block events to the watcher."""
        self._status_change = self.status()
        self._status_change.block_events.revision = revision
        self._status_change.block_events.since_revision = revision - 1
        self._status_change.block_events.stored_hashes = codec.encode_hashes(stored)
        self._status_change.block_events.removed_hashes = codec.encode_hashes(removed)
        self._changed.set()

    def _service(self) -> Registrar:
        raise NotImplementedError

    async def _serve_session(self, requests: AsyncIterator[Any], handle: Callable[[Any], Awaitable[None]]) -> None:
        """Each message in a task of its own; the session's end cancels them."""
        self.sessions_opened += 1
        try:
            async with asyncio.TaskGroup() as group:
                async for message in requests:
                    group.create_task(_as_coroutine(handle(message)))
        except* StreamBroken:
            raise PeerLost("scripted") from None


Write = Callable[[Any], Awaitable[None]]


def _one_at_a_time(context: Any) -> Write:
    """Concurrent writes on one gRPC stream are an error."""
    lock = asyncio.Lock()

    async def write(message: Any) -> None:
        async with lock:
            await context.write(message)

    return write


async def _as_coroutine(work: Awaitable[None]) -> None:
    await work


class ScriptedPrefill(ScriptedWorker, worker_pb2_grpc.PrefillServiceServicer):
    """Points: prefill (request came), told (the first token was), prefilled (KV pinned, answer not sent), answered."""

    role = WorkerRole.PREFILL

    def __init__(self, worker_id: str = "prefill-0", **kwargs: Any) -> None:
        super().__init__(worker_id, **kwargs)
        self.pins: set[Attempt] = set()
        self.running: set[Attempt] = set()
        self.requests: list[worker_pb2.PrefillRequest] = []
        self.announces = False
        """Whether it says where the KV is before it has computed it."""
        self.tells_token = False
        """Whether the first token comes before the answer, where that is wanted."""

    @property
    def used_blocks(self) -> int:
        return len(self.pins)

    def _service(self) -> Registrar:
        return Registrar("sagellm.v1.PrefillService", worker_pb2_grpc.add_PrefillServiceServicer_to_server, self)

    async def Session(self, requests: AsyncIterator[Any], context: Any) -> None:
        jobs: dict[Attempt, asyncio.Task[Any]] = {}
        write = _one_at_a_time(context)

        async def handle(message: worker_pb2.PrefillSessionRequest) -> None:
            if message.HasField("cancel"):
                attempt = (message.cancel.request_id, message.cancel.attempt)
                self.cancelled.append(attempt)
                self.pins.discard(attempt)
                if attempt in jobs:
                    jobs[attempt].cancel()
                return
            request = message.prefill
            attempt = (request.request_id, request.attempt)
            jobs[attempt] = asyncio.current_task()  # type: ignore[assignment]
            self.running.add(attempt)
            result = worker_pb2.PrefillResult(request_id=request.request_id, attempt=request.attempt)
            if self.announces and request.announce:
                started = worker_pb2.PrefillStarted(source=self._source(request))
                announced = worker_pb2.PrefillResult(
                    request_id=request.request_id, attempt=request.attempt, started=started
                )
                await write(worker_pb2.PrefillSessionResponse(results=[announced]))

            async def tell(token_ids: bytes) -> None:
                token = worker_pb2.PrefillToken(token_ids=token_ids)
                told = worker_pb2.PrefillResult(request_id=request.request_id, attempt=request.attempt, token=token)
                await write(worker_pb2.PrefillSessionResponse(results=[told]))

            try:
                told = tell if self.tells_token and request.token_first else None
                result.response.CopyFrom(await self._prefill(request, told))
            except SageError as err:
                result.error.CopyFrom(to_status(err))
            finally:
                self.running.discard(attempt)
            await write(worker_pb2.PrefillSessionResponse(results=[result]))
            await self.reach("answered")

        await self._serve_session(requests, handle)

    async def _prefill(
        self, request: worker_pb2.PrefillRequest, tell: Callable[[bytes], Awaitable[None]] | None
    ) -> worker_pb2.PrefillResponse:
        self.requests.append(request)
        self.trace_contexts.append(dict(request.trace_context))
        await self.reach("prefill")
        prompt = unpack_int32(request.prompt_token_ids).tolist()
        sampling = codec.decode_sampling(request.sampling)
        token = next_token(prompt, sampling)
        response = worker_pb2.PrefillResponse(request_id=request.request_id, attempt=request.attempt)
        response.compute_ms, response.engine_ms = 1.0, 0.75
        if token == STOP_TOKEN and not sampling.ignore_eos:
            response.finish_reason = common_pb2.FINISH_REASON_STOP
            return response
        response.token_ids = pack_int32([token])
        if sampling.max_new_tokens == 1:
            response.finish_reason = common_pb2.FINISH_REASON_LENGTH
            return response
        if tell is not None:
            await tell(response.token_ids)
            await self.reach("told")
        self.pins.add((request.request_id, request.attempt))
        response.source.CopyFrom(self._source(request))
        await self.reach("prefilled")
        return response

    def _source(self, request: worker_pb2.PrefillRequest) -> common_pb2.KvSource:
        num_tokens = len(request.prompt_token_ids) // 4
        source = KvSource(
            transfer_id=request.request_id,
            epoch=request.attempt,
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            control_address=self.record.address,
            data_address=self.record.data_address,
            backend="tcp",
            block_table=as_token_ids(range(-(-num_tokens // LAYOUT.block_size_tokens))),
            num_tokens=num_tokens,
            lease_expires_in_ms=30_000,
        )
        return codec.encode_kv_source(source)


class ScriptedDecode(ScriptedWorker, worker_pb2_grpc.DecodeServiceServicer):
    """Points: reserve (request came), reserved (answer not sent), pull, token:N (before the N-th token is sent), last
    (all tokens were sent, that it was the last was not).

    `prefills` are the workers it can pull from, by id; a dead one's pull fails as a real one's would.
    """

    role = WorkerRole.DECODE

    def __init__(self, worker_id: str = "decode-0", *, prefills: Sequence[ScriptedPrefill] = (), **kwargs: Any) -> None:
        super().__init__(worker_id, **kwargs)
        self.prefills = {prefill.worker_id: prefill for prefill in prefills}
        self.reservations: set[Attempt] = set()
        self.released: list[Attempt] = []
        self.renewed: list[Attempt] = []
        self.ended_by_client: set[bool] = set()
        """What releases and cancellations said."""
        self.pulling_ahead: list[worker_pb2.PullAheadRequest] = []
        self.routed: list[inference_pb2.Route] = []
        self.prefill_sessions = WorkerSessions(PrefillSession, ChannelPool(), "auto")
        self.lease_ttl_ms = 30_000
        self.running: set[Attempt] = set()
        self.requests: list[worker_pb2.DecodeRequest] = []
        self.index_error = 0

    async def stop(self) -> None:
        await self.prefill_sessions.close()
        await super().stop()

    @property
    def used_blocks(self) -> int:
        return len(self.reservations) + len(self.running)

    def _service(self) -> Registrar:
        return Registrar("sagellm.v1.DecodeService", worker_pb2_grpc.add_DecodeServiceServicer_to_server, self)

    async def Session(self, requests: AsyncIterator[Any], context: Any) -> None:
        jobs: dict[Attempt, asyncio.Task[Any]] = {}
        write = _one_at_a_time(context)

        async def handle(message: worker_pb2.DecodeSessionRequest) -> None:
            operation = message.WhichOneof("op")
            request = getattr(message, operation)
            attempt = (request.request_id, request.attempt) if operation != "routed" else ("", 0)
            if operation == "reserve":
                await write(worker_pb2.DecodeSessionResponse(reservations=[await self._reserve(request)]))
            elif operation == "release":
                self.ended_by_client.add(request.by_client)
                self.released.append(attempt)
                self.reservations.discard(attempt)
            elif operation == "renew":
                self.renewed.append(attempt)
            elif operation == "pull_ahead":
                self.pulling_ahead.append(request)
            elif operation == "cancel":
                self.ended_by_client.add(request.by_client)
                self.cancelled.append(attempt)
                if attempt in jobs:
                    jobs[attempt].cancel()
            elif operation == "routed":
                route = parse_route(request.route)
                jobs[route.request_id, route.attempt] = asyncio.current_task()  # type: ignore[assignment]
                await self._routed(request, route, write)
            else:
                jobs[attempt] = asyncio.current_task()  # type: ignore[assignment]
                self.running.add(attempt)
                try:
                    await self._decode(request, write)
                finally:
                    self.running.discard(attempt)

        await self._serve_session(requests, handle)

    async def _reserve(self, request: worker_pb2.ReserveRequest) -> worker_pb2.ReserveResult:
        result = worker_pb2.ReserveResult(request_id=request.request_id, attempt=request.attempt)
        try:
            await self.reach("reserve")
            self.reservations.add((request.request_id, request.attempt))
            await self.reach("reserved")
        except SageError as err:
            result.error.CopyFrom(to_status(err))
            return result
        ticket = HandoffTicket(
            transfer_id=request.request_id,
            epoch=request.attempt,
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            block_table=as_token_ids([0]),
            num_cached_tokens=0,
            expires_in_ms=self.lease_ttl_ms,
        )
        result.response.ticket.CopyFrom(codec.encode_ticket(ticket))
        return result

    async def _routed(self, message: worker_pb2.RoutedRequest, route: inference_pb2.Route, write: Write) -> None:
        """As a real one: reserved here, prefilled there, decoded here. What it holds ends with its task."""
        self.routed.append(route)
        request, attempt = message.request, (route.request_id, route.attempt)
        decoding = worker_pb2.DecodeRequest(
            request_id=route.request_id,
            attempt=route.attempt,
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            emitted_token_ids=message.emitted_token_ids,
        )
        output = worker_pb2.DecodeResponse(request_id=route.request_id, attempt=route.attempt)
        stage = "decode"
        self.running.add(attempt)
        session: PrefillSession | None = None
        try:
            if route.HasField("prefill"):
                stage = "reserve"
                reserved = await self._reserve(worker_pb2.ReserveRequest(request_id=attempt[0], attempt=attempt[1]))
                if reserved.HasField("error"):
                    raise from_status(reserved.error)
                stage, session = "prefill", self.prefill_sessions.get(decode_address(route.prefill, "prefill"))
                asked, ticket = codec.decode_generation_request(request), codec.decode_ticket(reserved.response.ticket)
                outcome = await session.prefill(asked, route.attempt, ticket, timeout_s=10.0)
                output.token_ids = pack_int32(outcome.token_ids)
                output.finish_reason = codec.encode_finish_reason(outcome.finish_reason)
                output.prefilled.response.compute_ms = outcome.compute_ms
                await write(worker_pb2.DecodeSessionResponse(outputs=[output]))
                if outcome.source is None:
                    return
                decoding.emitted_token_ids = pack_int32(outcome.token_ids)
                decoding.source.CopyFrom(codec.encode_kv_source(outcome.source))
            session = None
            await self._decode(decoding, write)
        except SageError as err:
            err.metadata.setdefault("stage", stage)
            output.finish_reason = common_pb2.FINISH_REASON_ERROR
            output.error.CopyFrom(to_status(err))
            await write(worker_pb2.DecodeSessionResponse(outputs=[output]))
        finally:
            self.running.discard(attempt)
            self.reservations.discard(attempt)
            if session is not None:
                session.cancel(*attempt)

    async def _decode(self, request: worker_pb2.DecodeRequest, write: Write) -> None:
        self.requests.append(request)
        self.trace_contexts.append(dict(request.trace_context))
        prompt = unpack_int32(request.prompt_token_ids).tolist()
        emitted = unpack_int32(request.emitted_token_ids).tolist()
        sampling = codec.decode_sampling(request.sampling)
        output = worker_pb2.DecodeResponse(request_id=request.request_id, attempt=request.attempt)
        try:
            if request.HasField("source"):
                self._claim(request)
                await self.reach("pull")
                output.transfer.CopyFrom(self._pull(request.source))
            while True:
                output.index = len(emitted)
                await self.reach(f"token:{len(emitted)}")
                token = next_token(prompt + emitted, sampling)
                if token == STOP_TOKEN and not sampling.ignore_eos:
                    output.finish_reason = common_pb2.FINISH_REASON_STOP
                else:
                    emitted.append(token)
                    output.index += self.index_error
                    output.token_ids = pack_int32([token])
                    if len(emitted) == sampling.max_new_tokens:
                        if self._script["last"]:
                            await write(worker_pb2.DecodeSessionResponse(outputs=[output]))
                            await self.reach("last")
                        output.finish_reason = common_pb2.FINISH_REASON_LENGTH
                        output.engine_ms = 2.5
                await write(worker_pb2.DecodeSessionResponse(outputs=[output]))
                if output.finish_reason:
                    return
                output = worker_pb2.DecodeResponse(request_id=request.request_id, attempt=request.attempt)
        except Cancelled:
            output.finish_reason = common_pb2.FINISH_REASON_CANCELLED
            await write(worker_pb2.DecodeSessionResponse(outputs=[output]))
        except SageError as err:
            output.finish_reason = common_pb2.FINISH_REASON_ERROR
            output.error.CopyFrom(to_status(err))
            await write(worker_pb2.DecodeSessionResponse(outputs=[output]))

    def _claim(self, request: worker_pb2.DecodeRequest) -> None:
        attempt = (request.request_id, request.attempt)
        if attempt not in self.reservations:
            raise LeaseExpired(f"no reservation of {attempt}")
        self.reservations.discard(attempt)

    def _pull(self, source: common_pb2.KvSource) -> worker_pb2.TransferReport:
        prefill = self.prefills.get(source.worker_id)
        if prefill is None:
            raise EngineFailed(f"the test gave {self.worker_id} no prefill worker {source.worker_id}")
        pin = (source.transfer_id, source.epoch)
        if pin not in prefill.pins:
            raise LeaseExpired(f"{pin} is not pinned")
        prefill.pins.discard(pin)
        blocks = len(source.block_table) // 4
        return worker_pb2.TransferReport(
            bytes=blocks * LAYOUT.block_bytes, transfer_ms=0.5, blocks=blocks, backend="tcp"
        )
